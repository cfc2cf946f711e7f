"""What this machine can do at most, for speeds to be held against: measured, never assumed.

Reading is measured with each thread's part as one, two and three streams: a core that waits for one
page's first line does not wait for another's, so some CPUs read a third more from several. The
fastest is the ceiling. Multiplying is int8 multiply-adds on registers.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elute import _native
from elute.types import U8

LEAST_ARENA_BYTES = 256 << 20
L3_SIZES_IN_ARENA = 4


@dataclass(frozen=True)
class Ceilings:
    """Of all threads together.

    reads_gb_s  by number of streams that each thread reads, from one on
    """

    reads_gb_s: tuple[float, ...]
    multiply_gops: float

    @property
    def read_gb_s(self) -> float:
        return max(self.reads_gb_s)

    @property
    def read_streams(self) -> int:
        """How many it takes to read the most."""
        return 1 + self.reads_gb_s.index(self.read_gb_s)


def measured_ceilings(isa: str, n_threads: int, data: U8, *, passes: int = 1) -> Ceilings:
    """Each figure is the best of `passes`, of some 10 ms, over data u8 [n].

    `data` must have been written: reading untouched pages reads one page of zeros.
    """

    def read_gb_s(n_streams: int) -> float:
        return max(_native.read_gb_s(isa, n_threads, data, n_streams)[0] for _ in range(passes))

    return Ceilings(
        reads_gb_s=tuple(read_gb_s(1 + i) for i in range(_native.MOST_STREAMS)),
        multiply_gops=max(_native.multiply_gops(isa, n_threads) for _ in range(passes)),
    )


class MeasuredCeilings:
    """For runs of seconds. A pass is over before another program has had its turn, and one alone
    may say less than the machine did: the best of a few. Keeps its memory.
    """

    PASSES = 3

    def __init__(self, isa: str) -> None:
        self._isa = isa
        self._data = np.ones(default_arena_bytes(), np.uint8)

    def __call__(self, n_threads: int) -> Ceilings:
        return measured_ceilings(self._isa, n_threads, self._data, passes=self.PASSES)


def median_ceilings(measured: Sequence[Ceilings]) -> Ceilings | None:
    """Each figure by itself, so that one lucky pass is no ceiling; None of nothing."""
    if not measured:
        return None
    reads = zip(*(m.reads_gb_s for m in measured), strict=True)
    return Ceilings(
        reads_gb_s=tuple(statistics.median(of) for of in reads),
        multiply_gops=statistics.median(m.multiply_gops for m in measured),
    )


def default_arena_bytes() -> int:
    """So much that no cache of this machine keeps a part until its next turn."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    try:
        l3_bytes = int(path.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        l3_bytes = 0  # unknown here, or there is none
    return max(LEAST_ARENA_BYTES, L3_SIZES_IN_ARENA * l3_bytes)
