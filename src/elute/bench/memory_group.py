"""Where the commands of a memory sweep run: in a control group with a limit, or without one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from elute.errors import EluteError, UnsupportedError

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
SLACK = 1.05  # the limit, of the budget: the kernel counts pages of programs and libraries too


class MemoryGroup:
    """A memory control group (v1 or v2) that commands start in; a context manager.

    Raises UnsupportedError where none can be made.
    """

    def __init__(self, budget_bytes: int, *, v1: Path = V1, v2: Path = V2) -> None:
        old = (v1 / "memory.limit_in_bytes").exists()
        if not old and not _offers_memory(v2):
            raise _refusal(f"no memory controller is mounted that groups in {v2} may use")
        self.folder = (v1 if old else v2) / f"elute-memory-sweep-{os.getpid()}"
        limit = "memory.limit_in_bytes" if old else "memory.max"
        self._peak = self.folder / ("memory.max_usage_in_bytes" if old else "memory.peak")
        try:
            self.folder.mkdir(exist_ok=True)
            (self.folder / limit).write_text(str(int(SLACK * budget_bytes)))
            for name, value in (("memory.swappiness", "0"), ("memory.swap.max", "0")):
                if (self.folder / name).exists():
                    (self.folder / name).write_text(value)
        except OSError as error:
            raise _refusal(f"{self.folder} cannot be made ({error.strerror})") from None

    def run(self, command: Sequence[str]) -> str:
        """-> stdout. Raises EluteError when the command fails."""
        join = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return run_command(["sh", "-c", join, "sh", *command])

    @property
    def peak_bytes(self) -> int | None:
        try:
            return int(self._peak.read_text())
        except (OSError, ValueError):
            return None  # kernels before 5.19 keep none in v2

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.folder.rmdir()


class NoGroup:
    """The same without a limit: what a command holds is its own promise."""

    peak_bytes: int | None = None

    def run(self, command: Sequence[str]) -> str:
        return run_command(command)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def run_command(command: Sequence[str]) -> str:
    """-> stdout. Raises EluteError with the last line of stderr when the command fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise EluteError(
            f"memory-sweep: a run ended with exit code {done.returncode} ({lines[-1]}); give more "
            "memory, or run it by hand to see more"
        )
    return done.stdout


def _offers_memory(v2: Path) -> bool:
    try:
        return "memory" in (v2 / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


def _refusal(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"memory-sweep: found no control group to limit memory with: {reason}; run it as root, or "
        "with --no-limit, which leaves llama.cpp out"
    )
