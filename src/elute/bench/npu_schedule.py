"""How long the parts of a prompt take here, each alone, and what each rule would make of them.

The NPU may be imagined: its products then take what this CPU's int8 kernels take, over a factor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from elute.errors import ShapeError
from elute.npu.policies import (
    RULES,
    Alone,
    CriticalPath,
    FeedNpu,
    InOrder,
    OutOfOrder,
    Pairs,
    Staggered,
    quickest,
)
from elute.npu.prompts import PromptExecutor
from elute.npu.schedule import Graph, Policy, Schedule, Task, Worker, simulate
from elute.npu.sites import Host, Site
from elute.types import I32

Progress = Callable[[int, int], None]

REPEATS = 5
# In the order in which they are shown; those with a parameter by the best one.
NAMED: tuple[tuple[str, tuple[Policy, ...]], ...] = (
    ("in order", (InOrder(),)),
    ("pairs, naive overlap", (Pairs(1), Pairs(4))),
    ("out of order, as llm.npu", (OutOfOrder(),)),
    ("critical path", (CriticalPath(),)),
    ("feed the NPU", (FeedNpu(),)),
    ("staggered", tuple(r for r in RULES if isinstance(r, Staggered) and not r.npu_waits)),
    ("staggered, NPU waits", tuple(r for r in RULES if isinstance(r, Staggered) and r.npu_waits)),
    ("quickest", RULES),
)


@dataclass(frozen=True)
class Measured:
    """Seconds, each the least of several with nothing else of ours running: what other programs do
    only adds to it.

    times    of each task of the graph, the NPU's as the device took
    kernels  of each product of a chunk by this CPU's int8 kernels, in the order of stages
    """

    graph: Graph
    times: dict[Task, float]
    kernels: tuple[float, ...]

    def imagined(self, speed: float) -> dict[Task, float]:
        """The times beside an NPU so many times as fast as this CPU's int8 kernels."""
        return {
            task: self.kernels[task.stage // 2] / speed if task.worker is Worker.NPU else taken
            for task, taken in self.times.items()
        }

    def a_chunk(self, times: dict[Task, float]) -> dict[str, float]:
        """Of float work, shadows and products: seconds a chunk, on average."""
        totals = {"float": 0.0, "shadow": 0.0, "product": 0.0}
        for task, taken in times.items():
            shadow = "shadow" if task.stage % 2 else "float"
            totals["product" if task.worker is Worker.NPU else shadow] += taken
        return {name: total / self.graph.n_chunks for name, total in totals.items()}


@dataclass(frozen=True)
class Outcome:
    """rule: which of `name` it was, where it has a parameter."""

    name: str
    rule: Policy
    schedule: Schedule


def measure(
    prompts: PromptExecutor,
    tokens: I32,
    *,
    repeats: int = REPEATS,
    progress: Progress | None = None,
) -> Measured:
    """Leaves the cache empty. Raises ShapeError for a prompt that no graph is needed for."""
    if not tokens.size:
        raise ShapeError("schedule: found no tokens, wanted 1 or more")
    seen: dict[Task, list[float]] = {}
    with prompts.scheduled(Alone()):
        for i in range(repeats + 1):
            if progress is not None:
                progress(i, repeats + 1)
            prompts.prompt(tokens, 0)
            assert prompts.last is not None
            if i:  # the first one maps weights and takes memory
                for task, taken in prompts.last.times().items():
                    seen.setdefault(task, []).append(taken)
    sites = [linear.site for linear in prompts.linears]
    kernels = kernel_seconds(prompts.host, sites, tokens[: prompts.chunk], repeats=repeats)
    shapes = [tuple(p.shape for p in linear.graph.products) for linear in prompts.linears]
    if progress is not None:
        progress(repeats + 1, repeats + 1)
    assert prompts.last is not None
    return Measured(
        prompts.last.graph,
        {task: min(all_) for task, all_ in seen.items()},
        typical(kernels, shapes),
    )


def kernel_seconds(
    host: Host, sites: Sequence[Site], tokens: I32, *, repeats: int = REPEATS
) -> list[float]:
    """Of the products of each site by the host's own kernels: with them less without."""
    whole: list[list[float]] = [[] for _ in sites]
    without: list[list[float]] = [[] for _ in sites]
    with host.cut(sites) as segments:
        for _ in range(repeats + 1):
            for product, seen in ((True, whole), (False, without)):
                for i in range(len(sites)):
                    began = time.perf_counter()
                    segments.run(i, tokens, 0, whole=product)
                    seen[i].append(time.perf_counter() - began)
        segments.cached(0)
    return [max(min(a[1:]) - min(b[1:]), 0.0) for a, b in zip(whole, without, strict=True)]


def typical(seconds: Sequence[float], kinds: Sequence[Hashable]) -> tuple[float, ...]:
    """Each replaced by the median of its kind: differences of short times are noisy."""
    of_kind: dict[Hashable, list[float]] = {}
    for taken, kind in zip(seconds, kinds, strict=True):
        of_kind.setdefault(kind, []).append(taken)
    return tuple(statistics.median(of_kind[kind]) for kind in kinds)


def outcomes(graph: Graph, times: dict[Task, float], *, crossing_s: float) -> list[Outcome]:
    """Of each of NAMED."""
    found = []
    for name, rules in NAMED:
        rule = quickest(graph, times, rules, crossing_s=crossing_s)
        found.append(Outcome(name, rule, simulate(graph, times, rule, crossing_s=crossing_s)))
    return found


def repeated(tokens: Sequence[int], n: int) -> I32:
    """So many tokens of a text, from its beginning again where it ends."""
    return np.resize(np.asarray(tokens, np.int32), n)
