"""Which order of the planes does decode read fastest?

    python bench/layouts.py [--bits 2,4] [--shapes 4096x4096,11008x4096] [--threads 1,2]
                            [--rounds 60] [--passes 3] [--isa native]

Builds layouts.cpp with $CXX (g++) and lets it walk the same random matrix, out of cache, in many
orders and walks; every round runs each of them and the plain reads once, shuffled. A share is the
median bandwidth of planes and scales over that of the best plain read (1 to 3 streams, small or
huge pages) of the same pass; printed is the median over passes, a column a prefetch distance in
bytes. With a part of the channels active, skipped in runs of 4 or 16, active bytes alone count.
Tables first, the last line is one JSON object. x86-64 Linux only; 0.6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

ISAS = {"native": ["-march=native"], "avx2": ["-march=native", "-mno-avx512f"]}
READ, PANELS, TURNS, COLUMNS = range(4)
DISTANCES = [0, 1024, 2048, 4096, 8192, 16384]
PAGES = ["4 KiB", "huge"]


@dataclass(frozen=True)
class Variant:
    """See Variant in layouts.cpp: same fields, same order."""

    walk: int
    unit: int = 0
    panel: int = 0
    wide: int = 1
    depth: int = 16
    active: int = 0
    distance: int = 0
    huge: int = 0
    cut: int = 0
    apart: int = 0

    def order(self) -> str:
        if self.unit == 0:
            return f"panels of {self.panel}"
        stripes = f"stripes of {self.cut}, " if self.apart else ""
        return f"{stripes}units of {4 * self.unit} channels, panels of {self.panel}"

    def way(self) -> str:
        if self.walk == COLUMNS:
            streams = self.depth // self.unit
            cuts = f", {self.cut} outputs at a time" if self.cut and not self.apart else ""
            return ("a unit at a time" if streams == 1 else f"{streams} units at a time") + cuts
        turns = "64 channels" if self.walk == TURNS else "a quad"
        return "a panel" if self.wide == 1 else f"{self.wide} panels, turns of {turns}"

    def kept(self) -> str:
        return f"40 %, by {4 * self.active}" if self.active else "all"


def swept(variants: list[Variant], distances: list[int]) -> Iterator[Variant]:
    for variant in variants:
        for huge in (0, 1):
            for distance in distances:
                yield replace(variant, huge=huge, distance=distance)


def variants(bits: int, n: int) -> list[Variant]:
    line, two_lines = 128 // bits, 256 // bits  # outputs: 64 and 128 bytes of a quad
    one_panel = [Variant(PANELS, panel=panel) for panel in (32, 64, 128)]
    panels = [
        *one_panel,
        Variant(PANELS, panel=32, wide=2),
        Variant(TURNS, panel=32, wide=2),
        Variant(PANELS, panel=32, wide=4),
        Variant(TURNS, panel=32, wide=4),
        Variant(PANELS, panel=64, wide=2),
    ]
    quads = [Variant(COLUMNS, 1, line, depth=depth) for depth in (1, 8, 16)]
    units = [
        Variant(COLUMNS, 4, line, depth=4),
        Variant(COLUMNS, 4, line, depth=16),
        Variant(COLUMNS, 16, 32),
    ]
    wider = [
        Variant(COLUMNS, 1, two_lines, depth=16),
        Variant(COLUMNS, 4, two_lines, depth=16),
        Variant(COLUMNS, 16, 64),
        Variant(COLUMNS, 16, 128),
    ]
    cuts = [replace(unit, cut=512) for unit in units[1:]]
    stripes = [replace(unit, cut=cut, apart=1) for unit in units[1:] for cut in (n // 4, n // 2)]
    skipping_quads = [*one_panel, *quads, *units[1:], wider[3]]
    skipping_units = [*one_panel, quads[2], *units, wider[3], *stripes]
    sparse = [
        *(replace(variant, active=1) for variant in skipping_quads),
        *(replace(variant, active=4) for variant in skipping_units),
    ]
    return [
        *(Variant(READ, wide=wide, huge=huge) for wide in (1, 2, 3) for huge in (0, 1)),
        *swept([*panels, *quads, *units, *wider, *cuts, *stripes], DISTANCES),
        *swept(sparse, [0, 2048, 8192]),
    ]


def build(isa: str, folder: str) -> Path:
    program = Path(folder) / "layouts"
    source = Path(__file__).with_suffix(".cpp")
    compiler = os.environ.get("CXX", "g++")
    # No fused multiply-add: the scalar product that results are compared with has none either.
    flags = ["-std=c++20", "-O3", *ISAS[isa], "-ffp-contract=off", "-pthread"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True)
    return program


def bandwidths(program: Path, case: tuple[int, int, int, int], rounds: int) -> dict[Variant, float]:
    """Medians in GB/s of one pass."""
    asked = variants(*case[:2])
    lines = "\n".join(" ".join(map(str, astuple(variant))) for variant in asked)
    command = [str(program), *map(str, case), str(rounds)]
    answer = subprocess.run(command, input=lines, text=True, check=True, stdout=subprocess.PIPE)
    measured = {}
    for variant, line in zip(asked, answer.stdout.splitlines(), strict=True):
        n_bytes, *nanoseconds = map(float, line.split())
        measured[variant] = n_bytes / statistics.median(nanoseconds)
    return measured


def shares(passes: list[dict[Variant, float]]) -> tuple[float, dict[Variant, float]]:
    """The best plain read in GB/s, and each variant's share of it: medians over passes."""
    best = [max(rate for v, rate in each.items() if v.walk == READ) for each in passes]
    return statistics.median(best), {
        variant: statistics.median(
            each[variant] / top for each, top in zip(passes, best, strict=True)
        )
        for variant in passes[0]
    }


def print_sweep(share: dict[Variant, float]) -> None:
    heads = "".join(f"{distance:>8}" for distance in DISTANCES)
    print(f"{'channels':<13}{'order':<53}{'walk':<39}{'pages':<6}{heads}")
    rows = dict.fromkeys(replace(variant, distance=0) for variant in share if variant.walk != READ)
    for row in rows:
        cells = (share.get(replace(row, distance=distance)) for distance in DISTANCES)
        each = "".join("       –" if cell is None else f"{cell:>8.2f}" for cell in cells)
        pages = PAGES[row.huge]
        print(f"{row.kept():<13}{row.order():<53}{row.way():<39}{pages:<6}{each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="2,4")
    parser.add_argument("--shapes", default="4096x4096,11008x4096")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--isa", choices=ISAS, default="native")
    given = parser.parse_args()
    cases = [
        (int(bits), *map(int, shape.split("x")), int(threads))
        for bits in given.bits.split(",")
        for shape in given.shapes.split(",")
        for threads in given.threads.split(",")
    ]
    measured: dict[tuple[int, ...], list[dict[Variant, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        program = build(given.isa, folder)
        for _ in range(given.passes):
            for case in cases:
                measured[case].append(bandwidths(program, case, given.rounds))

    results = []
    for case, passes in measured.items():
        bits, n, k, threads = case
        read, share = shares(passes)
        print(f"\n{bits} bits, {n}x{k}, {threads} threads; best plain read {read:.1f} GB/s")
        print_sweep(share)
        results += [
            {"bits": bits, "n": n, "k": k, "threads": threads, "read_gb_s": round(read, 1)}
            | asdict(variant)
            | {"share": round(each, 3)}
            for variant, each in share.items()
        ]
    print(json.dumps({"isa": given.isa, "passes": given.passes, "results": results}))


if __name__ == "__main__":
    main()
