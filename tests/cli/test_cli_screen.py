"""Figures that the command line takes from the operating system."""

import subprocess
import sys
import time


def test_seconds_since_start_are_those_that_a_user_waits() -> None:
    """Ten milliseconds are the kernel's grain; a whole-second boot time would be off by up to 1."""
    code = (
        "import time; time.sleep(0.3); from elute.cli.screen import seconds_since_start as s; "
        "print(s())"
    )
    for _ in range(3):
        before = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        waited = time.perf_counter() - before
        assert 0.29 <= float(done.stdout) <= waited + 0.02
        time.sleep(0.37)
