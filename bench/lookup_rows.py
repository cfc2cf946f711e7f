"""Up to how many rows is looking each one up faster than dequantizing a panel and multiplying?

    python bench/lookup_rows.py [--isa ISA] [--n 1536] [--k 576] [--rounds 60]

Times both kernels on one thread, in turns so that a busy moment of the machine hits both, over a
working set larger than the caches. The last line is one JSON object: per bits, the time of lookup
over the time of multiplying for 1, 2, .. rows (medians), and the most rows at which lookup wins.
csrc/executor.cpp takes its kLookupRows from here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from elute import _native
from elute.types import OVER_READ, PANEL

MAX_ROWS = 8
BITS = range(1, 9)
WORKING_SET_BYTES = 64 << 20  # planes in all, so that each call reads its own from memory


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--isa", default=_native.best_isa(), choices=_native.isas())
    options.add_argument("--n", type=int, default=1536)
    options.add_argument("--k", type=int, default=576)
    options.add_argument("--group-size", type=int, default=32)
    options.add_argument("--rounds", type=int, default=60)
    args = options.parse_args()

    found = {}
    for bits in BITS:
        ratios = time_bits(args.isa, args.n, args.k, bits, args.group_size, args.rounds)
        wins = next((m for m, ratio in enumerate(ratios) if ratio > 1), MAX_ROWS)
        found[bits] = {"lookup_over_multiply": ratios, "lookup_wins_to_rows": wins}
        print(f"{bits} bits: {'  '.join(f'{ratio:.2f}' for ratio in ratios)}  wins to {wins}")
    print(json.dumps({"isa": args.isa, "n": args.n, "k": args.k, "bits": found}))


def time_bits(isa: str, n: int, k: int, bits: int, group_size: int, rounds: int) -> list[float]:
    """-> time of lookup / time of multiplying, for 1 .. MAX_ROWS rows."""
    rng = np.random.default_rng(bits)
    n_panels, n_bytes = -(-n // PANEL), -(-n // PANEL) * PANEL * k * bits // 8
    planes = [
        rng.integers(0, 256, n_bytes + OVER_READ, np.uint8)
        for _ in range(max(1, WORKING_SET_BYTES // n_bytes))
    ]
    scales = np.full((n_panels, k // group_size, PANEL), 0.01, np.float16)
    inputs = [rng.standard_normal((m, k)).astype(np.float32) for m in range(1, MAX_ROWS + 1)]
    seconds: dict[tuple[int, bool], list[float]] = {}
    turn = 0
    for _ in range(rounds):
        for x in inputs:
            for lookup in (True, False):
                turn = (turn + 1) % len(planes)
                start = time.perf_counter()
                _native.lut_matmul(
                    isa, x, planes[turn], scales, None, n, bits, group_size, 1 << bits - 1,
                    "symmetric", lookup=lookup,
                )  # fmt: skip
                spent = time.perf_counter() - start
                seconds.setdefault((len(x), lookup), []).append(spent)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return [round(median[m, True] / median[m, False], 2) for m in range(1, MAX_ROWS + 1)]


if __name__ == "__main__":
    main()
