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
    """That from which the longest path to the end of all leads."""

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        keys = _critical(graph, seconds)

        def choose(ready: Sequence[int], worker: Worker, front: Front) -> int:
            return min(ready, key=keys.__getitem__)

        return choose


@dataclass(frozen=True)
class FeedNpu:
    """CriticalPath, but where the NPU's ready tasks take less time than the processor's would, the
    processor takes one that makes NPU work ready, of these one that ends before the NPU runs dry,
    else the one that ends soonest.
    """

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        tasks, successors = graph.tasks, graph.successors
        keys = _critical(graph, seconds)

        def choose(ready: Sequence[int], worker: Worker, front: Front) -> int:
            best = min(ready, key=keys.__getitem__)
            if worker == Worker.NPU or len(ready) == 1:
                return best
            # What the NPU's running task has left is not known: these are counted as all there is.
            queued_s = sum(seconds[index] for index in front.ready[Worker.NPU])
            if queued_s >= seconds[best]:
                return best
            missing = front.missing

            def feeds(index: int) -> bool:
                return any(
                    missing[later] == 1 and tasks[later].worker == Worker.NPU
                    for later in successors[index]
                )

            feeding = [index for index in ready if feeds(index)]
            if not feeding:
                return best
            return min(feeding, key=lambda index: (max(0, seconds[index] - queued_s), keys[index]))

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


def _critical(graph: Graph, seconds: Sequence[float]) -> list[tuple[float, int, float, int]]:
    """The lowest key first."""
    after = remaining(graph, seconds)
    return [
        (-after[index], task.chunk, -seconds[index], index)
        for index, task in enumerate(graph.tasks)
    ]


def quickest(
    graph: Graph,
    times: Times,
    policies: Sequence[Policy] = (CriticalPath(), FeedNpu(), OutOfOrder()),
    *,
    crossing_s: float = 0.0,
) -> Policy:
    """The rule that ends first in simulation; of equal ones the first. No rule wins everywhere, and
    simulating one takes some 5 us a task: find it once for a number of chunks.
    """

    def makespan_s(policy: Policy) -> float:
        return simulate(graph, times, policy, crossing_s=crossing_s).makespan_s

    return min(policies, key=makespan_s)
