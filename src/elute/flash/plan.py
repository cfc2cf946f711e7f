"""Splits a memory budget: which planes stay, and through what window the others pass. Pure.

Sizes are bytes, of which planes come in multiples of BLOCK. Knows no file and no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elute.errors import BudgetError

BLOCK = 4096  # what a read past the page cache is a multiple of
# Uses that the window holds at a time: one is multiplied, one is read, and the disk has not to
# wait for the processor at the seam.
USES_IN_WINDOW = 3


@dataclass(frozen=True)
class Use:
    """Matrices that are multiplied at once, so that all must be in memory together."""

    names: tuple[str, ...]
    n_bytes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.n_bytes)


@dataclass(frozen=True)
class BankSize:
    """A bank: equal blocks, of which any may be wanted; wanted: the share that a token wants."""

    name: str
    n_blocks: int
    block_bytes: int
    wanted: float = 1.0

    @property
    def total(self) -> int:
        return self.n_blocks * self.block_bytes


@dataclass(frozen=True)
class Plan:
    """What a budget is spent on.

    fixed     by purpose: what every plan needs
    pinned    matrices whose planes stay
    places    of the others, in the order of use: where in the window they are read to
    window    bytes
    missed    bytes that a forward of one token reads from flash; of banks, what is to be expected
    banks     of channels or experts, from which each token wants what it needs
    slots     how many blocks of each may stay
    slot_bytes, staging  of all slots, and of the memory through which the other blocks pass
    """

    budget: int
    fixed: Mapping[str, int]
    pinned: tuple[str, ...]
    pinned_bytes: int
    places: Mapping[str, int]
    window: int
    missed: int
    banks: tuple[BankSize, ...] = ()
    slots: Mapping[str, int] = field(default_factory=dict)
    slot_bytes: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        held = self.pinned_bytes + self.window + self.slot_bytes + self.staging
        return sum(self.fixed.values()) + held

    def seconds(self, *, touched: int, flash_bytes_s: float, dram_bytes_s: float) -> float:
        """A forward of one token takes at least this: reading flash and reading memory overlap."""
        return max(self.missed / flash_bytes_s, touched / dram_bytes_s)


def least_window(uses: Sequence[Use]) -> int:
    """So that a use fits wherever in the window it begins."""
    largest = max(use.total for use in uses)
    return largest + max(size for use in uses for size in use.n_bytes)


def solve(budget: int, fixed: Mapping[str, int], uses: Sequence[Use]) -> Plan:
    """The plan that reads least. Raises BudgetError, naming the least budget that works."""
    planes = sum(use.total for use in uses)
    needed = sum(fixed.values())
    rest = budget - needed
    names = [name for use in uses for name in use.names]
    if rest >= planes:
        return Plan(budget, fixed, tuple(names), planes, {}, 0, 0)
    least = least_window(uses)
    if rest < least:
        raise _too_little(budget, {**fixed, "window": least})
    window = max(least, min(USES_IN_WINDOW * max(use.total for use in uses), rest // 2))
    return split(budget, fixed, uses, window)


def split(budget: int, fixed: Mapping[str, int], uses: Sequence[Use], window: int) -> Plan:
    """The plan with that window, for a budget that holds it and not all planes beside it."""
    names = [name for use in uses for name in use.names]
    pinned, pinned_bytes = _spread(uses, budget - sum(fixed.values()) - window)
    streamed = [
        (name, size)
        for use in uses
        for name, size in zip(use.names, use.n_bytes, strict=True)
        if name not in pinned
    ]
    return Plan(
        budget,
        fixed,
        tuple(name for name in names if name in pinned),
        pinned_bytes,
        _places(streamed, window),
        window,
        sum(size for _, size in streamed),
    )


def _too_little(budget: int, needed: Mapping[str, int]) -> BudgetError:
    parts = ", ".join(f"{purpose} {size / 1e6:.0f}" for purpose, size in needed.items())
    return BudgetError(
        f"memory: found {budget / 1e6:.0f} MB, wanted at least {sum(needed.values()) / 1e6:.0f} "
        f"(MB: {parts}); give more, or a smaller context"
    )


def solve_banks(budget: int, fixed: Mapping[str, int], banks: Sequence[BankSize]) -> Plan:
    """All blocks where they fit; else as many of each bank as its share, and room through which two
    uses pass: one is multiplied while the next is read. Raises BudgetError like solve.
    """
    total = sum(bank.total for bank in banks)
    needed = sum(fixed.values())
    rest = budget - needed
    if rest >= total:
        slots = {bank.name: bank.n_blocks for bank in banks}
        return Plan(budget, fixed, (), 0, {}, 0, 0, tuple(banks), slots, total, 0)
    staging = 2 * max((bank.total for bank in banks), default=0)
    if rest < staging:
        raise _too_little(budget, {**fixed, "blocks": min(staging, total)})
    room = rest - staging
    slots = {
        bank.name: min(bank.n_blocks, bank.total * room // total // bank.block_bytes)
        for bank in banks
    }
    held = sum(slots[bank.name] * bank.block_bytes for bank in banks)
    missed = sum(
        bank.wanted * (bank.n_blocks - slots[bank.name]) * bank.block_bytes for bank in banks
    )
    return Plan(budget, fixed, (), 0, {}, 0, round(missed), tuple(banks), slots, held, staging)


def _spread(uses: Sequence[Use], room: int) -> tuple[set[str], int]:
    """Matrices to pin, evenly over the forward: then the disk reads while pinned ones multiply."""
    total = sum(use.total for use in uses)
    pinned: set[str] = set()
    used = passed = 0
    for use in uses:
        for name, size in zip(use.names, use.n_bytes, strict=True):
            passed += size
            if used + size <= room * passed // total:
                pinned.add(name)
                used += size
    # What the rounding left over, first come.
    for use in uses:
        for name, size in zip(use.names, use.n_bytes, strict=True):
            if name not in pinned and used + size <= room:
                pinned.add(name)
                used += size
    return pinned, used


def _places(streamed: Sequence[tuple[str, int]], window: int) -> dict[str, int]:
    """One behind the other; from the start again where the next does not fit."""
    places: dict[str, int] = {}
    at = 0
    for name, size in streamed:
        if at + size > window:
            at = 0
        places[name] = at
        at += size
    return places
