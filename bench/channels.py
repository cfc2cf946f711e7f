"""How long does a product in channel order take beside lut_matmul?

    python bench/channels.py [--bits 2,4] [--shapes 4096x4096,11008x4096] [--threads 1,2]
                             [--group-size 64] [--tiles 0] [--shuffled] [--rounds 60] [--passes 3]

Builds channels.cpp with the kernels of this CPU, by $CXX (g++), and runs both on the same random
matrix, out of cache, in huge pages; every round runs lut_matmul and channel_matmul at each share of
active channels once, shuffled. Printed is the median over passes of the ratio of median times.
Table first, the last line is one JSON object. x86-64 Linux with AVX2 only; 0.3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARES = [1.0, 0.6, 0.4, 0.2]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")]
# As CMakeLists.txt builds the kernels.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math"]


def build(folder: str) -> Path:
    level = "avx512" if "avx512_vnni" in Path("/proc/cpuinfo").read_text() else "avx2"
    flags = [*FLAGS, "-ffp-contract=off", *AVX2, *(AVX512 if level == "avx512" else [])]
    program = Path(folder) / "channels"
    compiler = os.environ.get("CXX", "g++")
    sources = [Path(__file__).with_suffix(".cpp"), ROOT / f"csrc/kernels/matmul_{level}.cpp"]
    command = [compiler, *flags, "-w", f"-I{ROOT / 'csrc'}", "-pthread", *sources, "-o", program]
    subprocess.run(command, check=True)
    return program


def medians(program: Path, *numbers: int) -> list[float]:
    """Nanoseconds of lut_matmul and of channel_matmul at each share, in one pass."""
    command = [str(program), *map(str, numbers), *map(str, SHARES)]
    answer = subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE)
    return [statistics.median(map(float, line.split())) for line in answer.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="2,4")
    parser.add_argument("--shapes", default="4096x4096,11008x4096")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=0, help="a call; 0: all of a thread")
    parser.add_argument("--shuffled", action="store_true", help="channels in random order")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--passes", type=int, default=3)
    given = parser.parse_args()
    cases = [
        (int(bits), *map(int, shape.split("x")), int(threads))
        for bits in given.bits.split(",")
        for shape in given.shapes.split(",")
        for threads in given.threads.split(",")
    ]
    measured: dict[tuple[int, ...], list[list[float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        program = build(folder)
        for _ in range(given.passes):
            for bits, n, k, threads in cases:
                case = (bits, n, k, given.group_size, threads, given.tiles, given.shuffled)
                measured[bits, n, k, threads].append(
                    medians(program, *map(int, case), given.rounds)
                )
    heads = "".join(f"{f'{share:.0%}':>8}" for share in SHARES)
    print(f"{'bits':<6}{'shape':<14}{'threads':<9}{'lut_matmul us':>14}{heads}")
    results = []
    for (bits, n, k, threads), passes in measured.items():
        lut_us = statistics.median(times[0] for times in passes) / 1e3
        ratios = [
            statistics.median(times[1 + i] / times[0] for times in passes)
            for i in range(len(SHARES))
        ]
        each = "".join(f"{ratio:>8.2f}" for ratio in ratios)
        print(f"{bits:<6}{f'{n}x{k}':<14}{threads:<9}{lut_us:>14.0f}{each}")
        results.append(
            {"bits": bits, "n": n, "k": k, "threads": threads, "lut_us": round(lut_us, 1)}
            | {f"{share:.0%}": round(r, 3) for share, r in zip(SHARES, ratios, strict=True)}
        )
    print(json.dumps({**vars(given), "results": results}))


if __name__ == "__main__":
    main()
