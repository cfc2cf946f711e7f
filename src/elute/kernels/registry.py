"""Lookup or multiply? Measured on this machine, once for each instruction set and bit width.

Both kernels give the same bits (law 1), so the choice is speed alone. Looking rows up costs the
same for each row; turning codes into bytes to multiply them costs most for the first, so lookup
wins up to some number of rows, which depends on the CPU: a race of the two finds it. What it found
is kept in kernels.json in the cache folder, for this CPU, instruction set and native build.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from elute import _native
from elute.errors import NOTE, DeviceError, NoHomeError
from elute.formats import kept
from elute.formats.packed_layout import LAYOUT
from elute.formats.sources import cache_dir

log = logging.getLogger(__name__)

WIDTHS = range(1, 9)
# Rows that race. Beyond the last, multiply is taken: all that it prepares is paid for by then.
RACE_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
# A width takes some 15 rounds in this on a core of Zen 3; their medians then agree within 4 %.
BUDGET_S = 0.03
EVERY_ROW_COUNT = 1 << 30
# Where a race would say nothing: what one found for avx2 on Zen 3.
UNMEASURED_ROWS = {1: 16, 2: 10, 3: 4, 4: 3, 5: 3, 6: 3, 7: 3, 8: 3}
FORMAT, VERSION = "elute-kernel-race", 1
CPU_KEYS = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")


class Kernel(StrEnum):
    """What --kernel takes."""

    AUTO = "auto"
    LOOKUP = "lookup"
    MULTIPLY = "multiply"


@dataclass(frozen=True)
class Choice:
    """How matrices of `bits` bits are multiplied.

    lookup_rows  rows (tokens of a call) up to which they are looked up; more are multiplied
    ratios       time of lookup / time of multiply at RACE_ROWS; empty when nothing was measured
    forced       by --kernel
    """

    bits: int
    lookup_rows: int
    ratios: tuple[float, ...] = ()
    forced: bool = False

    @property
    def most_lookup_rows(self) -> int | None:
        """lookup_rows, None when that is all."""
        return None if self.lookup_rows == EVERY_ROW_COUNT else self.lookup_rows

    @property
    def one_row(self) -> Kernel:
        """What one token takes."""
        return Kernel.LOOKUP if self.lookup_rows >= 1 else Kernel.MULTIPLY

    @property
    def reason(self) -> str:
        if self.forced:
            return "forced"
        if not self.ratios:
            return "not measured: emulated instructions"
        last = sum(rows <= self.lookup_rows for rows in RACE_ROWS)
        shown = sorted({0, max(last - 1, 0), min(last, len(RACE_ROWS) - 1)})
        told = (f"{self.ratios[i]:.2f} at {RACE_ROWS[i]}" for i in shown)
        return f"measured: lookup's time over multiply's is {', '.join(told)}"


def choose(
    isa: str, widths: Iterable[int], kernel: str = Kernel.AUTO, *, folder: Path | None = None
) -> dict[int, Choice]:
    """The choice for each bit width; widths that this machine has not measured yet race now.

    folder  of the cache file; cache_dir() when None

    Raises DeviceError for a kernel that is no Kernel.
    """
    wanted = sorted(set(widths))
    if kernel not in list(Kernel):
        raise DeviceError(f"kernel: found {kernel!r}, wanted one of {', '.join(Kernel)}")
    if kernel != Kernel.AUTO:
        rows = EVERY_ROW_COUNT if kernel == Kernel.LOOKUP else 0
        return {bits: Choice(bits, rows, forced=True) for bits in wanted}
    if isa == "avx512" and _native.emulates_avx512:
        return {bits: Choice(bits, UNMEASURED_ROWS[bits]) for bits in wanted}
    measured = _measured(isa, wanted, cache_file(folder))
    return {bits: Choice(bits, winning_rows(measured[bits]), measured[bits]) for bits in wanted}


def winning_rows(ratios: Sequence[float]) -> int:
    """The last of RACE_ROWS at which lookup wins, by the rising curve that is nearest to `ratios`.

    Lookup's share of the time cannot fall with more rows: where a measured one does, it is noise,
    and neighbours are averaged until none does (the pool-adjacent-violators algorithm, on
    logarithms).
    """
    pools: list[tuple[float, int]] = []  # mean logarithm, members
    for ratio in ratios:
        mean, members = math.log(ratio), 1
        while pools and pools[-1][0] >= mean:
            before, n_before = pools.pop()
            mean = (before * n_before + mean * members) / (n_before + members)
            members += n_before
        pools.append((mean, members))
    won = sum(members for mean, members in pools if mean < 0)
    return RACE_ROWS[won - 1] if won else 0


def cache_file(folder: Path | None = None) -> Path | None:
    """Where races are kept: in `folder` or cache_dir(); None without a home folder."""
    try:
        return (folder or cache_dir()) / "kernels.json"
    except NoHomeError:
        return None


def cpu_model() -> str:
    """What tells this CPU from others, by /proc/cpuinfo; the platform's name without it."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    first_core = dict(reversed(pairs))
    found = [f"{key} {first_core[key]}" for key in CPU_KEYS if key in first_core]
    return ", ".join(found) or platform.processor() or platform.machine()


@dataclass(frozen=True)
class _Machine:
    """All that a race depends on."""

    cpu: str
    isa: str
    build: str
    layout: int


Ratios = dict[int, tuple[float, ...]]  # bits -> lookup's time / multiply's at RACE_ROWS


def _measured(isa: str, widths: Collection[int], file: Path | None) -> Ratios:
    """Of each width: from the cache file, else by a race that goes there."""
    machine = _Machine(cpu_model(), isa, _build(), LAYOUT)
    races = {} if file is None else _read(file)
    known = races.get(machine, {})
    missing = [bits for bits in widths if bits not in known]
    if not missing:
        return known
    known = known | {bits: _race(isa, bits) for bits in missing}
    if file is None:
        log.info("found no home folder to keep the measurement in; each start measures again")
        return known
    # Races of other builds on this CPU are of no use any more.
    of_others = {m: r for m, r in races.items() if (m.cpu, m.isa) != (machine.cpu, isa)}
    _write(file, of_others | {machine: known})
    return known


@functools.cache
def _race(isa: str, bits: int) -> tuple[float, ...]:
    """Once a process, for where no file can keep it."""
    import numpy as np

    _announce()
    seconds = _native.race_seconds(isa, bits, list(RACE_ROWS), BUDGET_S)
    # Its 64 MiB may lie where malloc had room left, which keeps them resident after they are freed.
    _native.return_freed_memory()
    lookup, multiply = seconds[1:, :, 0], seconds[1:, :, 1]  # the first round warms up
    return tuple(round(float(ratio), 3) for ratio in np.median(lookup / multiply, axis=0))


@functools.cache
def _announce() -> None:
    log.log(NOTE, "measuring lookup against multiply on this CPU, once")


@functools.cache
def _build() -> str:
    import hashlib

    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()[:16]


def _read(file: Path) -> dict[_Machine, Ratios]:
    """Empty without a file, or with a line that says so where it is not as _write makes it."""
    return kept.read(file, _parse, what="kernel races") or {}


def _parse(text: str) -> dict[_Machine, Ratios]:
    told = json.loads(text)
    if (told["format"], told["version"], tuple(told["rows"])) != (FORMAT, VERSION, RACE_ROWS):
        raise ValueError(f"found {told['format']} {told['version']}, wanted {FORMAT} {VERSION}")
    races: dict[_Machine, Ratios] = {}
    for entry in told["machines"]:
        ratios = {int(bits): tuple(map(float, of)) for bits, of in entry.pop("ratios").items()}
        for of in ratios.values():
            if len(of) != len(RACE_ROWS) or not all(0 < ratio < math.inf for ratio in of):
                raise ValueError(f"found ratios {of}, wanted {len(RACE_ROWS)} above 0")
        races[_Machine(**entry)] = ratios
    return races


def _write(file: Path, races: Mapping[_Machine, Ratios]) -> None:
    told = {
        "format": FORMAT,
        "version": VERSION,
        "rows": RACE_ROWS,
        "machines": [asdict(machine) | {"ratios": of} for machine, of in races.items()],
    }
    kept.write(file, told)
