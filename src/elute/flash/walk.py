"""How long a forward takes under a plan: a walk through its uses, with the disk at work beside it.

Simulated, not bounded: a read begins when its place in the window is free and the disk has done
those before it; a use begins when what it multiplies is there. Pure; knows no file and no kernel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from elute.flash.plan import Plan, Use

PASSES = 4  # forwards until every one takes as long as the one before it


@dataclass(frozen=True)
class Disk:
    """How reads take their time, as weights are read.

    A request is there latency_s + its bytes / request_bytes_s after it was sent; each keeps those
    behind it up for request_s + its bytes / bytes_s; and no more than `depth` are under way. In a
    small window few are, and small ones.
    """

    bytes_s: float
    latency_s: float
    request_bytes_s: float
    request_bytes: int
    depth: int
    request_s: float = 0.0

    @property
    def sequential_bytes_s(self) -> float:
        """The most that it gives, in requests of full size."""
        return self.request_bytes / (self.request_s + self.request_bytes / self.bytes_s)


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
    disk: Disk,
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
    reads = _Reads(disk)
    free: list[float] = []  # when the place of each piece could be overwritten, over all forwards
    now = 0.0
    began = waited = 0.0
    for number in range(PASSES):
        began, waited = now, 0.0
        first, there = 0, 0.0
        for end, seconds in zip(ends, use_s, strict=True):
            for i in range(first, end):
                before = number * n + i - back[i]
                there = reads.piece(sizes[i], free[before] if before >= 0 else 0.0)
            waited += max(0.0, there - now)
            now = max(now, there) + seconds
            free += [now] * (end - first)
            first = end
        now += rest_s
    return Walk(now - began, waited)


class _Reads:
    """Pieces one after the other, each in requests; a piece is there when all before it are."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._sent = self._passed = self._there = 0.0
        self._under_way: deque[float] = deque(maxlen=disk.depth)  # when the last ones are done

    def piece(self, n_bytes: int, free_at: float) -> float:
        """-> when it is there."""
        disk = self._disk
        self._sent = max(self._sent, free_at)
        for first in range(0, n_bytes, disk.request_bytes):
            size = min(disk.request_bytes, n_bytes - first)
            if len(self._under_way) == disk.depth:
                self._sent = max(self._sent, self._under_way[0])
            alone = self._sent + disk.latency_s + size / disk.request_bytes_s
            self._passed = max(self._passed, self._sent) + disk.request_s + size / disk.bytes_s
            done = max(alone, self._passed)
            self._under_way.append(done)
            self._there = max(self._there, done)
        return self._there


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
