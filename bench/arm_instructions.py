"""Instructions that the ARM kernels execute for a weight, counted under an emulator.

    python bench/arm_instructions.py

Needs g++-aarch64-linux-gnu, gcc, cmake, ninja and a qemu-aarch64 with plug-ins (Debian 12:
qemu-user). Each figure is the difference of two runs of tests/kernels/kernel_server, one with a
product more: all else cancels. Counts say nothing of caches and stalls; nothing here is a time.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))

from emulated import KernelServer, kernel_server, missing  # noqa: E402
from matrices import random_matrix  # noqa: E402

from elute.pack import quads  # noqa: E402
from elute.types import Affine  # noqa: E402

N, K, GROUP = 128, 1024, 64
FEW_ROWS, MANY_ROWS = 24, 48
BATCH_ROWS = 128  # that share a dequantization: kBatchRows of csrc/kernels/lut_gemm_neon.h
CPUS = {"neon": "cortex-a76", "neon_i8mm": "max"}
CLASSES = ("dot", "lookup", "vector", "load", "store", "scalar")
# What instructions take of a core, by the Software Optimization Guide of Arm's Neoverse N1, a
# Cortex-A76 for servers: 4 instructions a cycle, 2 pipes for loads and stores (L), 2 for vectors
# (V), of which only V0 converts and multiplies integers and only V1 shifts. The first match counts.
DECODED, L_PIPES, V_PIPES = 4, 2, 2
PIPES = {
    r"ldp\tq|ld2|ldp": {"L": 2},
    r"ld4": {"L": 4, "V": 4},
    r"ld1r|ld1\t\{.*\}\[": {"L": 1, "V": 1},
    r"ld|prfm": {"L": 1},
    r"st4": {"L": 6, "V": 6},
    r"stp\tq": {"L": 4, "V": 2},
    r"str\tq|stur\tq": {"L": 2, "V": 2},
    r"st1|st[rp]\t[sd]|stur\t[sd]": {"L": 1, "V": 1},
    r"st": {"L": 1},
    r"(dup|fmov|ins)\t[vsd][^,]*, [wx]": {},
    r"umov|fmov\t[wx]": {"V1": 1},
    r"[su]?shl|[us]?s[lr]i|[us]shr|[us]sra|sshll|ushll|sqxtn": {"V1": 1},
    r"[us]cvtf\tv|fcvt\w+\tv|mul\tv": {"V0": 2},
    r"[us]cvtf|fdiv|fsqrt": {"V0": 1},
}


def pipes_of(instruction: str) -> dict[str, int]:
    for pattern, pipes in PIPES.items():
        if re.match(pattern, instruction):
            return pipes
    return {"V": 1} if class_of(instruction) in ("dot", "lookup", "vector") else {}


def class_of(instruction: str) -> str:
    mnemonic, _, operands = instruction.partition("\t")
    if mnemonic.startswith(("ld", "prfm")):
        return "load"
    if mnemonic.startswith("st"):
        return "store"
    if re.match(r"[us]+dot|[us]+mmla", mnemonic):
        return "dot"
    if mnemonic == "tbl":
        return "lookup"
    return "vector" if re.search(r"\bv\d+\.|\b[qdsb]\d+\b", operands) else "scalar"


@dataclass(frozen=True)
class Counts:
    """Executed instructions by class and uses of pipes, for one unit of work."""

    by_name: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.by_name[name] for name in CLASSES)

    def scaled(self, factor: float) -> Counts:
        return Counts({name: count * factor for name, count in self.by_name.items()})

    def minus(self, other: Counts) -> Counts:
        names = {**self.by_name, **other.by_name}
        return Counts(
            {name: self.by_name.get(name, 0) - other.by_name.get(name, 0) for name in names}
        )

    def cycles(self) -> float:
        """The least that the widths of a Cortex-A76 allow: nothing ever waits for anything."""
        v0, v1, either, loads = (self.by_name.get(pipe, 0) for pipe in ("V0", "V1", "V", "L"))
        return max(self.total / DECODED, loads / L_PIPES, v0, v1, (v0 + v1 + either) / V_PIPES)


def disassembled(program: Path) -> dict[int, str]:
    """Address -> instruction, mnemonic and operands with a tab between."""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(program)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.finditer(r"^ *([0-9a-f]+):\t(.*)$", text, re.MULTILINE)
    return {int(line[1], 16): line[2] for line in lines}


class Counter:
    def __init__(self, folder: Path) -> None:
        self._plugin, self._out = folder / "arm_instructions.so", folder / "counts"
        source = ROOT / "bench" / "arm_instructions.c"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", self._plugin, source], check=True)
        self._instructions = disassembled(kernel_server())

    def _run(self, isa: str, x: np.ndarray, repeats: int, matrix: dict) -> Counts:
        options = ["-plugin", f"{self._plugin},out={self._out}"]
        server = KernelServer(CPUS[isa], options)
        server.matmul_seconds(isa, x, repeats=repeats, **matrix)
        server.close()
        counts: collections.Counter[str] = collections.Counter(dict.fromkeys(CLASSES, 0))
        for line in self._out.read_text().splitlines():
            address, count = line.split()
            instruction = self._instructions[int(address, 16)]
            counts[class_of(instruction)] += int(count)
            for pipe, uses in pipes_of(instruction).items():
                counts[pipe] += uses * int(count)
        return Counts(dict(counts))

    def product(self, isa: str, bits: int, rows: int) -> Counts:
        """Of one product [rows, K] x [K, N] in all."""
        matrix = random_matrix(
            N, K, bits=bits, group_size=GROUP, affine=Affine.SYMMETRIC, seed=bits
        )
        packed = quads.pack(matrix)
        arguments = {
            "planes": np.pad(packed.planes, (0, 64)), "scales": packed.scales, "offsets": None,
            "n": N, "bits": bits, "group_size": GROUP, "zero": packed.zero, "affine": "symmetric",
        }  # fmt: skip
        x = np.random.default_rng(bits).standard_normal((rows, K)).astype(np.float32)
        return self._run(isa, x, 3, arguments).minus(self._run(isa, x, 2, arguments))


def row(label: str, counts: Counts, work: str) -> str:
    shown = [counts.total, *(counts.by_name[name] for name in CLASSES), counts.cycles()]
    return f"| {label} | " + " | ".join(f"{count:.3f}" for count in shown) + f" | {work} |"


def main() -> None:
    if why := missing():
        sys.exit(f"arm_instructions: {why}")
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder))
        print(f"[{N}, {K}], groups of {GROUP}, symmetric\n")
        heads = ["instructions", *CLASSES, "A76 cycles, at least", "a cycle, at most"]
        print(f"| | {' | '.join(heads)} |")
        print("|---" * (len(heads) + 1) + "|")
        for bits in (1, 2, 3, 4, 8):
            counts = counter.product("neon", bits, 1).scaled(1 / (N * K))
            work = f"{bits / 8 / counts.cycles():.1f} bytes of planes"
            print(row(f"lut_matmul, {bits} bits, a weight", counts, work))
        for isa in CPUS:
            for bits in (2, 4, 8):
                few, many = (counter.product(isa, bits, rows) for rows in (FEW_ROWS, MANY_ROWS))
                a_row = many.minus(few).scaled(1 / (MANY_ROWS - FEW_ROWS))
                once = few.minus(a_row.scaled(FEW_ROWS)).scaled(1 / (N * K))
                if bits == 2:  # the multiply sees codes, not bits
                    each = a_row.scaled(1 / (N * K))
                    work = f"{1 / each.cycles():.1f} multiply-adds"
                    print(row(f"lut_gemm, {isa}, a multiply-add", each, work))
                share = f"{once.total / BATCH_ROWS / each.total:.1%} of a batch of {BATCH_ROWS}"
                print(row(f"lut_gemm, {isa}, {bits} bits, once a weight", once, share))


if __name__ == "__main__":
    main()
