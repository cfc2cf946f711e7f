"""How long a forward takes under a plan: a walk through its uses, with the disk at work beside it.

Simulated, not bounded: a read begins when its place in the window is free and the disk has done
those before it; a use begins when what it multiplies is there. Pure; knows no file and no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elute.flash.plan import Plan, Use

PASSES = 4  # forwards until every one takes as long as the one before it


@dataclass(frozen=True)
class Walk:
    """Of one forward in the middle of many."""

    seconds: float
    waited_s: float


def walk(
    plan: Plan,
    uses: Sequence[Use],
    *,
    use_s: Sequence[float],
    rest_s: float,
    flash_bytes_s: float,
) -> Walk:
    """use_s   what each use takes of the processor, with all that follows it up to the next
    rest_s  what the end of a forward takes: head and choice of the token
    """
    sizes = [
        size
        for use in uses
        for name, size in zip(use.names, use.n_bytes, strict=True)
        if name in plan.places
    ]
    ends, n = [], 0  # of each use: pieces up to its last one
    for use in uses:
        n += sum(name in plan.places for name in use.names)
        ends.append(n)
    if not n:
        return Walk(sum(use_s) + rest_s, 0.0)
    back = _distances(list(plan.places.values()), sizes)
    read: list[float] = []  # when each piece was there, counted on over all forwards
    free: list[float] = []  # when its place could be overwritten
    now = disk = 0.0
    began = waited = 0.0
    for number in range(PASSES):
        began, waited = now, 0.0
        first = 0
        for end, seconds in zip(ends, use_s, strict=True):
            for i in range(first, end):
                before = number * n + i - back[i]
                start = max(disk, free[before] if before >= 0 else 0.0)
                disk = start + sizes[i] / flash_bytes_s
                read.append(disk)
            there = read[-1] if end > first else 0.0
            waited += max(0.0, there - now)
            now = max(now, there) + seconds
            free += [now] * (end - first)
            first = end
        now += rest_s
    return Walk(now - began, waited)


def _distances(places: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """How many pieces before each lies the last that shares its place, as WeightStream counts."""
    n = len(places)

    def overlap(a: int, b: int) -> bool:
        return places[a] < places[b] + sizes[b] and places[b] < places[a] + sizes[a]

    found = []
    for i in range(n):
        back = 1
        while not overlap(i, (i - back) % n):
            back += 1
        found.append(back)
    return found
