"""Rules that choose which task a worker begins. All deterministic, none knows the future.

Ties go to the lower chunk, which ends sooner and gives its registers back, then to the longest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from elute.npu.schedule import (
    Choose,
    Front,
    Graph,
    Policy,
    Times,
    Worker,
    remaining,
    simulate,
)


@dataclass(frozen=True)
class InOrder:
    """Chunk by chunk: the NPU works beside a shadow, and waits for all other float work."""

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        return _Steps(graph, [task.chunk * graph.n_stages + task.stage for task in graph.tasks])


@dataclass(frozen=True)
class Pairs:
    """Two chunks at a time, the second `skew` stages behind the first, and nobody goes on until
    both are done with a stage: the naive overlap, as in llm.npu's released code (its skew is 4
    graphs). An odd last chunk is alone.
    """

    skew: int = 1

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        width = graph.n_stages + self.skew
        return _Steps(
            graph,
            [
                task.chunk // 2 * width + task.chunk % 2 * self.skew + task.stage
                for task in graph.tasks
            ],
        )


class _Steps:
    """A task begins when all of lower steps have ended."""

    def __init__(self, graph: Graph, steps: Sequence[int]) -> None:
        self._steps = steps
        self._left = [0] * (max(steps) + 1)
        for step in steps:
            self._left[step] += 1
        self._now = 0
        self._taken = [0] * len(self._left)

    def __call__(self, ready: Sequence[int], worker: Worker, front: Front) -> int | None:
        running = [self._steps[index] for index in front.running.values()]
        # A step is over when all its tasks were taken and none of them is running.
        while self._now < len(self._left) and self._taken[self._now] == self._left[self._now]:
            if self._now in running:
                return None
            self._now += 1
        allowed = [index for index in ready if self._steps[index] == self._now]
        if not allowed:
            return None
        self._taken[self._now] += 1
        return min(allowed)


@dataclass(frozen=True)
class OutOfOrder:
    """The paper's: of the processor's tasks that which makes most NPU work ready when it ends, of
    the NPU's that which makes least of the processor's ready.

    C(g) = sum of the times of what g makes ready, negative for the NPU's g. As printed, all that g
    makes ready counts, whoever will run it.
    """

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        tasks, successors = graph.tasks, graph.successors

        def choose(ready: Sequence[int], worker: Worker, front: Front) -> int:
            missing, sign = front.missing, 1 if worker == Worker.CPU else -1

            def key(index: int) -> tuple[float, int, float, int]:
                made = sum(seconds[each] for each in successors[index] if missing[each] == 1)
                return -sign * made, tasks[index].chunk, -seconds[index], index

            return min(ready, key=key)

        return choose


@dataclass(frozen=True)
class CriticalPath:
    """That from which the longest path to the end of all leads.

    lead  each chunk is to be ahead of the next by this share of the longest path. Where all are in
          step, they want the same worker at the same time.
    """

    lead: float = 0.0

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        keys = _critical(graph, seconds, self.lead)

        def choose(ready: Sequence[int], worker: Worker, front: Front) -> int:
            return min(ready, key=keys.__getitem__)

        return choose


@dataclass(frozen=True)
class FeedNpu:
    """The paper's rule for the processor, of which only NPU work counts that becomes ready, and
    CriticalPath between equals and for the NPU. The paper's rule for the NPU puts off the products
    before the longest float work until nothing else is left.
    """

    lead: float = 0.0

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        successors = graph.successors
        keys = _critical(graph, seconds, self.lead)
        npu_s = [
            taken if task.worker == Worker.NPU else 0.0
            for task, taken in zip(graph.tasks, seconds, strict=True)
        ]

        def choose(ready: Sequence[int], worker: Worker, front: Front) -> int:
            if worker == Worker.NPU:
                return min(ready, key=keys.__getitem__)
            missing = front.missing

            def key(index: int) -> tuple[float, _Key]:
                made = sum(npu_s[each] for each in successors[index] if missing[each] == 1)
                return -made, keys[index]

            return min(ready, key=key)

        return choose


@dataclass(frozen=True)
class RandomOrder:
    """Any order at all: what tests compare the others with."""

    seed: int

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        source = random.Random(self.seed)

        def choose(ready: Sequence[int], worker: Worker, front: Front) -> int:
            return source.choice(sorted(ready))

        return choose


_Key = tuple[float, int, float, int]


def _critical(graph: Graph, seconds: Sequence[float], lead: float) -> list[_Key]:
    """The lowest key first."""
    after = remaining(graph, seconds)
    lead_s = lead * max(after)
    return [
        (lead_s * task.chunk - after[index], task.chunk, -seconds[index], index)
        for index, task in enumerate(graph.tasks)
    ]


# From 0.02 to 0.1 a lead was worse than none nearly wherever it was tried: 2 to 8 chunks, a
# processor with half to twice the work of the NPU.
RULES: tuple[Policy, ...] = tuple(
    rule(thousandths / 1000)
    for thousandths in (0, 3, 6, 1, 2, 4, 5, 8, 10)
    for rule in (CriticalPath, FeedNpu)
)
NEAR = 1.001  # times the bound


def quickest(
    graph: Graph, times: Times, policies: Sequence[Policy] = RULES, *, crossing_s: float = 0.0
) -> Policy:
    """The rule that ends first in simulation; the first that is NEAR the bound, where one is. None
    wins everywhere, and simulating one takes some 5 us a task: find it once for a number of chunks.
    """
    best, least_s = policies[0], float("inf")
    for policy in policies:
        found = simulate(graph, times, policy, crossing_s=crossing_s)
        if found.makespan_s < least_s:
            best, least_s = policy, found.makespan_s
        if least_s <= NEAR * found.bound_s:
            break
    return best
