"""The choice of a thread count, on trees made like /sys and /proc of real machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from elute.runtime.threads import choose_on_linux, default_threads, thread_choice

CPU = "sys/devices/system/cpu"
Files = dict[str, str]


def machine(n_cpus: int, each: Callable[[int], Mapping[str, object]]) -> Files:
    """The files of a machine; `each` gives those of one CPU's folder."""
    files = {f"{CPU}/online": f"0-{n_cpus - 1}" if n_cpus > 1 else "0"}
    for cpu in range(n_cpus):
        files |= {f"{CPU}/cpu{cpu}/{name}": str(value) for name, value in each(cpu).items()}
    return files


def plain(n_cpus: int) -> Files:
    return machine(n_cpus, lambda cpu: {"topology/core_cpus_list": cpu})


def choose(root: Path, files: Files, affinity: set[int] | None = None, n_cpus: int = 64) -> str:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return str(choose_on_linux(root, set(range(n_cpus)) if affinity is None else affinity))


def test_the_default_is_a_count_that_this_process_can_run() -> None:
    choice = thread_choice()
    assert default_threads() == choice.count
    assert 1 <= choice.count <= choice.n_cpus
    if hasattr(os, "sched_getaffinity"):
        assert choice.count <= len(os.sched_getaffinity(0))


def test_cores_without_siblings_all_count(tmp_path: Path) -> None:
    assert choose(tmp_path, plain(4)) == "4 of 4: each is a core of its own"


SIBLINGS: dict[str, Callable[[int], Mapping[str, object]]] = {
    "adjacent": lambda cpu: {"topology/core_cpus_list": f"{cpu & ~1}-{cpu | 1}"},
    "apart": lambda cpu: {"topology/core_cpus_list": f"{cpu % 4},{cpu % 4 + 4}"},
    "Linux before 5.3": lambda cpu: {"topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}"},
    "no lists": lambda cpu: {
        "topology/core_id": cpu // 2 % 2,  # counted anew in every package
        "topology/physical_package_id": cpu // 4,
    },
}


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_siblings_count_once(siblings: str, tmp_path: Path) -> None:
    got = choose(tmp_path, machine(8, SIBLINGS[siblings]))
    assert got == "4 of 8: SMT siblings share cores"


def test_a_sibling_whose_partner_is_out_of_reach_is_a_core(tmp_path: Path) -> None:
    files = machine(8, SIBLINGS["apart"])
    assert choose(tmp_path, files, {0, 1, 5}) == (
        "2 of 8: the affinity mask allows 3, SMT siblings share cores"
    )
    assert choose(tmp_path, files, {4, 5}) == "2 of 8: the affinity mask allows 2"


def test_only_big_cores_count(tmp_path: Path) -> None:
    def two_little_five_middle_one_big(cpu: int) -> Mapping[str, object]:
        capacity = 325 if cpu < 2 else 850 if cpu < 7 else 1024
        return {"topology/core_cpus_list": cpu, "cpu_capacity": capacity}

    files = machine(8, two_little_five_middle_one_big)
    assert choose(tmp_path, files) == "6 of 8: 2 are of a slower kind"
    # little cores alone are the biggest that there are
    assert choose(tmp_path, files, {0, 1}) == "2 of 8: the affinity mask allows 2"


def test_only_performance_cores_of_a_hybrid_count(tmp_path: Path) -> None:
    def six_fast_of_two_threads_and_four_slow(cpu: int) -> Mapping[str, object]:
        siblings = f"{cpu & ~1}-{cpu | 1}" if cpu < 12 else str(cpu)
        clock = 4_900_000 if cpu < 12 else 3_600_000
        return {"topology/core_cpus_list": siblings, "cpufreq/cpuinfo_max_freq": clock}

    files = machine(16, six_fast_of_two_threads_and_four_slow)
    kinds = {"sys/devices/cpu_core/cpus": "0-11", "sys/devices/cpu_atom/cpus": "12-15"}
    want = "6 of 16: 4 are of a slower kind, SMT siblings share cores"
    assert choose(tmp_path / "by clock", files) == want
    assert choose(tmp_path / "by kind", files | kinds) == want
    got = choose(tmp_path / "by kind", {}, {12, 13})
    assert got == "2 of 16: the affinity mask allows 2"


def test_favoured_cores_are_no_kind_of_their_own(tmp_path: Path) -> None:
    files = machine(4, lambda cpu: {"cpufreq/cpuinfo_max_freq": 5_300_000 + cpu * 100_000})
    assert choose(tmp_path, files) == "4 of 4: each is a core of its own"


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


def v1(path: str, quota: int) -> Files:
    return {f"{path}/cpu.cfs_quota_us": str(quota), f"{path}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "want"),
    [
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "250000 100000"}, (2, "2.5")),
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "50000 100000"}, (1, "0.5")),
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "900000 100000"}, None),
        # the least of a group and all above it
        ({"proc/self/cgroup": "0::/a/b", f"{V2}/a/cpu.max": "300000 100000"}, (3, "3")),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                f"{V2}/a/b/cpu.max": "max 100000",
                f"{V2}/a/cpu.max": "200000 50000",
                f"{V2}/cpu.max": "500000 100000",
            },
            (4, "4"),
        ),
        # a path of the host, of whose tree only the container's own group is mounted
        ({"proc/self/cgroup": "0::/system/docker-1", f"{V2}/cpu.max": "200000 100000"}, (2, "2")),
        # version 1, with version 2 beside it, and another controller's line that says nothing
        ({"proc/self/cgroup": "4:cpu:/", **v1(V1, -1)}, None),
        (
            {"proc/self/cgroup": "9:cpuset:/x\n4:cpu:/x/y\n0::/", **v1(f"{V1}/x", 150_000)},
            (1, "1.5"),
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/y",
                **v1("sys/fs/cgroup/cpu,cpuacct/y", 400_000),
            },
            (4, "4"),
        ),
        ({"proc/self/cgroup": "3:memory:/y", **v1(f"{V1}/y", 100_000)}, None),
        ({f"{V2}/cpu.max": "100000 100000"}, None),  # in no group that it could be the limit of
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "100000 0"}, None),
    ],
)
def test_the_quota_of_control_groups_limits(
    groups: Files, want: tuple[int, str] | None, tmp_path: Path
) -> None:
    got = choose(tmp_path, plain(8) | groups)
    if want is None:
        assert got == "8 of 8: each is a core of its own"
    else:
        assert got == f"{want[0]} of 8: the control group allows {want[1]} CPUs"


def test_a_bare_tree_limits_nothing(tmp_path: Path) -> None:
    assert choose(tmp_path, {}, {0, 2, 3}) == "3 of 3: each is a core of its own"
