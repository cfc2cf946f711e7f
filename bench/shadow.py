"""What shadow outliers cost the CPU, beside the int8 product of the same rows on the same CPU.

    python bench/shadow.py [--rows 256] [--bits 4] [--isa ISA] [--rounds 30]
                           [--shapes 576x576,1536x576,576x1536,1536x1536,3072x576,3072x1536]

One thread. For each shape NxK of w and each share of x that is outliers, spread over all channels
or in 2 % of them: medians, in microseconds, of

    product   elute._native.shadow_product, into an array that is used again
    columns   weight_columns of every channel with an outlier: what no hot channel saves, at most
    peak      rows * N * K int8 multiply-adds at the speed of a register tile (multiply_gops)
    gemm      lut_gemm, the whole product of quantized activations as elute's prefill does it
    %         product / peak, product / gemm and (product + columns) / gemm

Splitting x and finishing y, which an int8 product wants with and without shadows, follow in a table
of their own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from elute import _native
from elute.pack.quads import planes_bytes
from elute.types import F32, I32, PANEL

SHARES = (0.001, 0.005, 0.01)
HOT_CHANNELS = 0.02
SCALE = 0.02
GROUP = 32
PADDING = 64  # bytes that kernels may read past the planes


def outlier_values(rows: int, k: int, share: float, *, hot: bool, seed: int) -> F32:
    """x f32 [rows, K], `share` of which lies beyond int8 at SCALE, by 23 to 473 steps."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (rows, k)).astype(np.float32)
    among = max(1, round(HOT_CHANNELS * k)) if hot else k
    channels = rng.permutation(k)[:among]
    outliers = np.zeros((rows, k), bool)
    outliers[:, channels] = rng.random((rows, among)) < share * k / among
    x[outliers] = rng.choice([-1, 1], outliers.sum()) * rng.uniform(3, 12, outliers.sum())
    return x


def random_matrix(n: int, k: int, bits: int) -> dict[str, Any]:
    """Random codes, symmetric, in groups of GROUP: arguments of the native calls."""
    rng = np.random.default_rng(n + k)
    return {
        "planes": rng.integers(0, 256, planes_bytes(n, k, bits), np.uint8),
        "scales": np.full((-(-n // PANEL), k // GROUP, PANEL), 0.01, np.float16),
        "offsets": None, "n": n, "k": k, "bits": bits, "group_size": GROUP,
        "zero": 1 << bits - 1, "affine": "symmetric",
    }  # fmt: skip


def medians_us(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """All in turn, so that a slow moment meets each."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(times[2:]) for name, times in found.items()}


def slots_of(channels: I32) -> tuple[I32, I32]:
    """-> the channels that occur, and where among them each is."""
    union, slots = np.unique(channels, return_inverse=True)
    return union, slots.astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--isa", default=_native.best_isa())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--shapes", default="576x576,1536x576,576x1536,1536x1536,3072x576,3072x1536"
    )
    given = parser.parse_args()
    isa, m = given.isa, given.rows
    gops = _native.multiply_gops(isa, 1)
    weight_scales = np.full(1, 0.01, np.float32)

    print(f"{isa}, one thread, {m} rows, {given.bits} bits; peak {gops / 2:.0f} G multiply-adds/s")
    heads = ("product", "columns", "peak", "gemm", "%peak", "%gemm", "+columns")
    print(f"{'N x K':<12}{'outliers':<16}{'channels':>8}" + "".join(f"{h:>9}" for h in heads))
    results, others = [], []
    for shape in given.shapes.split(","):
        n, k = map(int, shape.split("x"))
        matrix = random_matrix(n, k, given.bits)
        of_gemm = {name: value for name, value in matrix.items() if name != "k"}
        of_gemm["planes"] = np.pad(matrix["planes"], (0, PADDING))[None]
        of_gemm["scales"] = matrix["scales"][None]
        x = outlier_values(m, k, 0.005, hot=True, seed=1)
        y, product = np.empty((m, n), np.float32), np.empty((m, n), np.int32)
        scales, bias = np.full(n, 1e-4, np.float32), np.ones(n, np.float32)

        def gemm(x: F32 = x, of_gemm: dict[str, Any] = of_gemm) -> float:
            seconds = _native.matmul_seconds(
                isa, 1, x, **of_gemm, repeats=given.rounds, lookup=False
            )[0]
            return statistics.median(seconds) * 1e6

        peak_us = 2e-3 * m * n * k / gops
        gemm_us = gemm()
        for share in SHARES:
            for hot in (False, True):
                drawn = outlier_values(m, k, share, hot=hot, seed=2)
                _, starts, channels, residuals = _native.split_outliers(isa, drawn, SCALE)
                union, slots = slots_of(channels)
                rows = _native.weight_columns(isa, union, weight_scales, **matrix)
                us = medians_us(
                    {
                        "product": lambda a=(starts, slots, residuals, rows, product): (
                            _native.shadow_product(isa, *a)
                        ),
                        "columns": lambda u=union, w=matrix: _native.weight_columns(
                            isa, u, weight_scales, **w
                        ),
                    },
                    given.rounds,
                )
                ratios = (
                    us["product"] / peak_us,
                    us["product"] / gemm_us,
                    (us["product"] + us["columns"]) / gemm_us,
                )
                print(
                    f"{shape:<12}{f'{share:.1%} ' + ('few' if hot else 'all'):<16}{union.size:>8}"
                    + "".join(f"{v:>9.1f}" for v in (us["product"], us["columns"]))
                    + "".join(f"{v:>9.0f}" for v in (peak_us, gemm_us))
                    + "".join(f"{100 * v:>8.1f}%" for v in ratios)
                )
                results.append(
                    {"n": n, "k": k, "share": share, "hot": hot, "outliers": channels.size}
                    | {"channels": union.size, "peak_us": round(peak_us, 1)}
                    | {"gemm_us": round(gemm_us, 1)}
                    | {f"{name}_us": round(v, 1) for name, v in us.items()}
                )
        us = medians_us(
            {
                "split": lambda x=x: _native.split_outliers(isa, x, SCALE),
                "finish": lambda a=(product, product, scales, bias, y): _native.finish_product(
                    isa, *a
                ),
            },
            given.rounds,
        )
        others.append(
            {"n": n, "k": k} | {f"{name}_us": round(value, 1) for name, value in us.items()}
        )
    print(f"{'N x K':<12}{'split':>9}{'finish':>9}")
    for other in others:
        shape = f"{other['n']}x{other['k']}"
        print(f"{shape:<12}{other['split_us']:>9.1f}{other['finish_us']:>9.1f}")
    print(json.dumps({**vars(given), "gops": round(gops, 1), "results": results, "others": others}))


if __name__ == "__main__":
    main()
