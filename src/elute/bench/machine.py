"""This machine, and this build on it: their names as results carry them, and memory to be had."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

GIT_TIMEOUT_S = 10
SLUG_LENGTH = 64
BUILT_FROM = ("src", "csrc", "CMakeLists.txt")  # a change elsewhere is not one of the program

# Where a container finds its limit: cgroup v2, then v1, which says "none" with a huge number.
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
NO_LIMIT_BYTES = 1 << 60


@cache
def cpu_name() -> str:
    """The CPU's model name, as /proc/cpuinfo or else Python gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def machine_slug() -> str:
    """A file name for this machine: model and physical cores, such as amd-ryzen-9-7950x-16-cores.

    A hypervisor may hide the model's number; then CPU family and model stand in for it.
    """
    import psutil

    name = re.sub(r"\((R|TM|C)\)|\bCPU\b|\bProcessor\b|@.*", " ", cpu_name(), flags=re.IGNORECASE)
    if not re.search(r"\d", name):
        name += f" family {_cpuinfo('cpu family') or 0} model {_cpuinfo('model') or 0}"
    cores = psutil.cpu_count(logical=False) or 1
    words = re.findall(r"[a-z0-9]+", f"{name[:SLUG_LENGTH]} {cores} cores".lower())
    return "-".join(words)


def memory_limit_bytes(files: tuple[Path, ...] = CGROUP_LIMITS) -> int | None:
    """What the control group allows; None without a limit."""
    for file in files:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < NO_LIMIT_BYTES:
            return int(text)
    return None


def available_bytes() -> int:
    """Memory that this process can still take: what is free, or what its control group leaves."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit = memory_limit_bytes()
    if limit is None:
        return available
    return max(0, min(available, limit - int(psutil.Process().memory_info().rss)))


def peak_memory_bytes() -> int:
    """Largest resident size of this program so far."""
    try:
        # getrusage would also count what the parent held when it started this program.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass  # not Linux
    try:
        import resource
    except ImportError:  # Windows has no such module; psutil knows its peak
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def elute_build() -> str:
    """Commit of the checkout that this code runs from, with -dirty; else the installed version."""
    import elute

    package = Path(elute.__file__).parent
    root = package.parent.parent
    if _git(package, "rev-parse", "--show-toplevel") == str(root):
        commit = _git(root, "rev-parse", "--short=9", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", *BUILT_FROM)
        if commit:
            return f"{commit}-dirty" if changed else commit
    from importlib.metadata import version

    return version("elute")


def _git(folder: Path, *arguments: str) -> str | None:
    """The answer of git, None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpuinfo(key: str) -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return None
