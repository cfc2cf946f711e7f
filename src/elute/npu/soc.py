"""The Snapdragon chips that graphs are compiled for, by name.

Numbers as Qualcomm's SDK has them (QNN_SOC_MODEL_*, and the HTP architecture of each); they were
read in public sources, not tried on any of these chips.
"""

from __future__ import annotations

from dataclasses import dataclass

from elute.errors import UnsupportedError


@dataclass(frozen=True)
class Soc:
    """A chip. part: Qualcomm's number of it; model, arch: what its compiler wants."""

    name: str
    part: str
    model: int
    arch: int


SOCS = {
    soc.name: soc
    for soc in (
        Soc("8-gen-2", "SM8550", 43, 73),
        Soc("8-gen-3", "SM8650", 57, 75),
        Soc("8-elite", "SM8750", 69, 79),
        Soc("8-elite-gen-5", "SM8850", 87, 81),
        Soc("x-elite", "SC8380XP", 60, 73),
    )
}
# Without a chip the emulator computes as v68 does, which is off where activations have 16 bits.
EMULATED = SOCS["8-gen-3"]


def soc_named(name: str) -> Soc:
    """By name or part number, in any case. Raises UnsupportedError, listing what is known."""
    wanted = name.lower().replace(" ", "-")
    for soc in SOCS.values():
        if wanted in (soc.name, soc.part.lower()):
            return soc
    known = ", ".join(f"{soc.name} ({soc.part})" for soc in SOCS.values())
    raise UnsupportedError(f"--soc: found {name}, wanted one of {known}")
