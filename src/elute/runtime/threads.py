"""How many threads to start: one for each fast physical core that this process may use.

A second thread on a core shares its execution units, and a thread on a slow core makes the others
wait at the end of every matrix, so neither is counted. Linux only knows the details; elsewhere
psutil's count of physical cores decides.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

# Share of the best core's figure from which a core counts as big. Capacity is work a second: a
# little core does less than half of what a big one does, a middle one more. A clock tells less: the
# little cores of an RK3399 have 1.4 of 1.8 GHz, cores that differ only in their turbo 0.9 and more.
BIG_BY_CAPACITY = 0.5
BIG_BY_CLOCK = 0.85


@dataclass(frozen=True)
class ThreadChoice:
    """`count` threads on a machine of `n_cpus` logical CPUs; `reason` is made for users."""

    count: int
    n_cpus: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} of {self.n_cpus}: {self.reason}"


def default_threads() -> int:
    """Threads that Executor starts when it is not told."""
    return thread_choice().count


def thread_choice() -> ThreadChoice:
    """The choice for this process, as things are now."""
    if hasattr(os, "sched_getaffinity"):
        return choose_on_linux(Path("/"), os.sched_getaffinity(0))
    import psutil

    n_cpus = os.cpu_count() or 1
    return ThreadChoice(psutil.cpu_count(logical=False) or n_cpus, n_cpus, "physical cores")


def choose_on_linux(root: Path, affinity: Set[int]) -> ThreadChoice:
    """What /sys and /proc under `root` say for a process that may run on the CPUs of `affinity`.

    Reads nothing outside `root`; what is missing there limits nothing.
    """
    devices = root / "sys/devices"
    online = _cpu_list(devices / "system/cpu/online") or set(affinity)
    usable = online & affinity or set(affinity)
    reasons = []
    if usable < online:
        reasons.append(f"the affinity mask allows {len(usable)}")
    big = _big(devices, usable)
    if big < usable:
        reasons.append(f"{len(usable) - len(big)} are of a slower kind")
    cores = len({_core(devices, cpu) for cpu in big})
    if cores < len(big):
        reasons.append("SMT siblings share cores")
    quota = _cpu_quota(root)
    if quota is not None and quota < cores:
        reasons.append(f"the control group allows {quota:g} CPUs")
        cores = max(1, int(quota))
    return ThreadChoice(cores, len(online), ", ".join(reasons) or "each is a core of its own")


def _core(devices: Path, cpu: int) -> str:
    """A name that hardware threads of one core share."""
    topology = devices / f"system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second before Linux 5.3
        if siblings := _text(topology / name):
            return siblings
    core, package = _text(topology / "core_id"), _text(topology / "physical_package_id")
    return f"core {core} of {package}" if core else f"cpu {cpu}"


def _big(devices: Path, cpus: Set[int]) -> set[int]:
    """Those of `cpus` that are as fast as the fastest of them, roughly."""
    performance = _cpu_list(devices / "cpu_core/cpus")  # a hybrid x86's two performance monitors
    if performance and _cpu_list(devices / "cpu_atom/cpus"):
        return set(cpus & performance or cpus)
    capacities = _numbers(devices, cpus, "cpu_capacity")
    if capacities:
        return _near_the_best(capacities, BIG_BY_CAPACITY)
    return _near_the_best(_numbers(devices, cpus, "cpufreq/cpuinfo_max_freq"), BIG_BY_CLOCK) or set(
        cpus
    )


def _numbers(devices: Path, cpus: Iterable[int], name: str) -> dict[int, int]:
    """By CPU; empty unless every one has it."""
    texts = {cpu: _text(devices / f"system/cpu/cpu{cpu}/{name}") for cpu in cpus}
    return (
        {cpu: int(t) for cpu, t in texts.items()} if all(map(str.isdigit, texts.values())) else {}
    )


def _near_the_best(values: Mapping[int, int], share: float) -> set[int]:
    return {cpu for cpu, value in values.items() if value >= share * max(values.values())}


def _cpu_quota(root: Path) -> float | None:
    """CPUs that the control groups of this process grant together: the least of it and all above.

    Both versions may be in use at once. A container often sees its group's path on the host but
    only its own part of the tree: what does not exist is skipped, the mounted root is always read.
    """
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mounts = root / "sys/fs/cgroup"
        if controllers == "":
            trees = [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            trees = [mounts / controllers, mounts / "cpu"]
        else:
            continue
        inside = Path(path.lstrip("/"))
        for tree in trees:
            quotas += [_quota_of(tree / group) for group in (inside, *inside.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    """CPUs of one control group: cpu.max (version 2: "max 100000") or the pair of version 1."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _cpu_list(file: Path) -> set[int]:
    """The set that "0-3,8" means; empty when there is no such file."""
    cpus: set[int] = set()
    for part in filter(None, _text(file).split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _text(file: Path) -> str:
    """Stripped; empty when it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
