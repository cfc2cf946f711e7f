"""The thread pool by itself, under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STRESS = Path(__file__).with_name("thread_pool_stress.cpp")


def test_threads_that_are_held_back_change_nothing(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "stress"
    build = [compiler, "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread"]
    build += [f"-I{REPOSITORY / 'csrc'}", str(REPOSITORY / "csrc/thread_pool.cpp"), str(STRESS)]
    built = subprocess.run([*build, "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
