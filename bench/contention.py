"""What threads are worth beside a program that keeps one core busy.

    python bench/contention.py [MODEL] [--threads 1,2] [--prompt 256] [--generate 64] [--rounds 8]

Each round runs every test with every thread count, one after the other, in three settings:
    quiet    nothing else runs
    pinned   a busy loop stays on the last core; one thread alone is put on the first one
    loose    a busy loop is wherever the system puts it, and so are the threads
Prints tokens a second and the median, over rounds, of the speed over that of the first thread count
in the same round. The last line is one JSON object. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

from elute.model.families import op_list
from elute.runtime.executor import Executor
from elute.runtime.store import open_packed

SETTINGS = ("quiet", "pinned", "loose")
SETTLE_S = 0.2  # for the system to spread what runs


@contextlib.contextmanager
def busy_loop(setting: str) -> Iterator[None]:
    if setting == "quiet":
        yield
        return
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        if setting == "pinned":
            os.sched_setaffinity(loop.pid, {max(os.sched_getaffinity(0))})
        time.sleep(SETTLE_S)
        yield
    finally:
        loop.kill()
        loop.wait()


@contextlib.contextmanager
def free_core(wanted: bool) -> Iterator[None]:
    """This thread, none of an executor's others, on the first core."""
    allowed = os.sched_getaffinity(0)
    if wanted:
        os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def seconds(executor: Executor, test: str, n: int) -> float:
    tokens = np.arange(n, dtype=np.int32) % executor.vocabulary
    started = time.perf_counter()
    if test == "pp":
        executor.forward(tokens, 0)
    else:
        for position in range(n):
            executor.forward(tokens[position : position + 1], position)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    tests = {"tg": given.generate, "pp": given.prompt}
    counts = [int(count) for count in given.threads.split(",")]
    packed = open_packed(given.model)
    ops, context = op_list(packed.config), max(tests.values())
    executors = {n: Executor(ops, packed, context=context, n_threads=n) for n in counts}
    for executor in executors.values():
        for test, n in tests.items():
            seconds(executor, test, n)

    rates: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(given.rounds):
        for setting in SETTINGS:
            with busy_loop(setting):
                for test, n in tests.items():
                    for count, executor in executors.items():
                        with free_core(setting == "pinned" and count == 1):
                            rate = n / seconds(executor, test, n)
                        rates.setdefault((setting, test, count), []).append(rate)

    results = []
    print(f"{'setting':<9}{'test':<7}{'threads':>7}{'tok/s':>9}{'best':>9}{'worst':>9}{'ratio':>8}")
    for (setting, test, count), each in rates.items():
        first = rates[setting, test, counts[0]]
        ratio = statistics.median(mine / its for mine, its in zip(each, first, strict=True))
        name, median = f"{test}{tests[test]}", statistics.median(each)
        print(
            f"{setting:<9}{name:<7}{count:>7}{median:>9.1f}{max(each):>9.1f}{min(each):>9.1f}"
            f"{ratio:>8.2f}"
        )
        results.append(
            {
                "setting": setting,
                "test": name,
                "threads": count,
                "median_tok_s": round(median, 1),
                f"over_{counts[0]}": round(ratio, 3),
            }
        )
    print(json.dumps({"model": given.model, "rounds": given.rounds, "results": results}))


if __name__ == "__main__":
    main()
