"""One build for every CPU: the whole program on an emulated CPU without AVX, or AVX-512.

An instruction that leaked out of its ISA's files, by an inline function that the linker merged,
dies here of SIGILL.
"""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("cpu", "isas"), [("Nehalem", ["scalar"]), ("Haswell", ["scalar", "avx2"])]
)
def test_the_same_build_runs_on(cpu: str, isas: list[str]) -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or platform.machine() != "x86_64":
        pytest.skip("needs qemu-x86_64 (Debian: qemu-user) on an x86-64 machine")
    # What a machine tells OpenBLAS to take its CPU for would kill numpy on another one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    command = [emulator, "-cpu", cpu, sys.executable, "-m", "elute", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [isa for isa in found["isas"] if isa != "avx512"] == isas
    assert all(found["kernel_test"][isa] for isa in isas)
