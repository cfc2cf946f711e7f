"""Rules that choose which task a worker begins. All are deterministic.

Ties go to the lower chunk, which ends sooner and gives its registers back, then to the longest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    graphs). An odd last chunk is alone, and each where only one may be in flight.
    """

    skew: int = 1

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        skew = self.skew if graph.in_flight > 1 else graph.n_stages
        width = graph.n_stages + skew
        steps = [t.chunk // 2 * width + t.chunk % 2 * skew + t.stage for t in graph.tasks]
        return _Steps(graph, steps)


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
    """The paper's rule for the processor, of which only NPU work counts that becomes ready, and
    CriticalPath between equals and for the NPU. The paper's rule for the NPU puts off the products
    before the longest float work until nothing else is left.
    """

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        successors = graph.successors
        keys = _critical(graph, seconds)
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
class Staggered:
    """Each chunk keeps `lead` layers ahead of the next: where all are in step, they want the same
    worker at the same time.

    lead       at least 0
    npu_waits  the NPU takes its products strictly in that order, and waits for one that is not
               ready. With two chunks this beats every rule here that never waits: a long
               product that is begun for want of another keeps a short one up, and the processor
               behind it.
    """

    lead: float
    npu_waits: bool = False

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        tasks = graph.tasks
        reached = _reached(graph, seconds)
        lead_s = self.lead * reached[-1] / max(1, graph.n_layers)
        keys = [(reached[t.stage] + lead_s * t.chunk, index) for index, t in enumerate(tasks)]
        products: list[list[int]] = [[] for _ in range(graph.n_chunks)]
        for index in reversed(range(len(tasks))):
            if tasks[index].worker == Worker.NPU:
                products[tasks[index].chunk].append(index)

        def choose(ready: Sequence[int], worker: Worker, front: Front) -> int | None:
            if worker == Worker.CPU or not self.npu_waits:
                return min(ready, key=keys.__getitem__)
            # Of chunks that have begun: others may have to wait until one of these has ended.
            begun = [left for left in products[: front.n_begun] if left]
            first = min(begun, key=lambda left: keys[left[-1]])
            return first.pop() if first[-1] in ready else None

        return choose


@dataclass(frozen=True)
class Alone:
    """One task at a time, of whichever worker: what each takes with the machine to itself."""

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        def choose(ready: Sequence[int], worker: Worker, front: Front) -> int | None:
            return None if front.running else min(ready)

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


def _critical(graph: Graph, seconds: Sequence[float]) -> list[_Key]:
    """The lowest key first."""
    after = remaining(graph, seconds)
    return [
        (-after[index], task.chunk, -seconds[index], index)
        for index, task in enumerate(graph.tasks)
    ]


def _reached(graph: Graph, seconds: Sequence[float]) -> list[float]:
    """How much of a chunk's work, alone and on average over the chunks, lies before each stage;
    last, all of it. A shadow runs beside its product: the longer one counts."""
    longest: dict[tuple[int, int], float] = {}
    for task, taken in zip(graph.tasks, seconds, strict=True):
        place = task.stage, task.chunk
        longest[place] = max(taken, longest.get(place, 0.0))
    reached = [0.0] * (graph.n_stages + 1)
    for (stage, _), taken in longest.items():
        reached[stage + 1] += taken / graph.n_chunks
    return list(accumulate(reached))


# In steps of a twentieth of a layer: bubbles change by percents from one to the next. Leads of more
# than half a layer were never the best of 2 to 8 chunks, a processor with half to twice the work.
RULES: tuple[Policy, ...] = (
    CriticalPath(),
    FeedNpu(),
    *(
        Staggered(twentieths / 20, npu_waits)
        for npu_waits in (False, True)
        for twentieths in (4, 6, 2, 8, 3, 5, 7)
    ),
)
NEAR = 1.001  # times the bound


def quickest(
    graph: Graph,
    times: Times,
    policies: Sequence[Policy] = RULES,
    *,
    crossing_s: float = 0.0,
    near: float = NEAR,
) -> Policy:
    """The rule that ends first in simulation; the first within `near` times the bound, where one
    is. None wins everywhere, and simulating one takes some 5 us a task: find it once for a number
    of chunks.
    """
    best, least_s = policies[0], float("inf")
    for policy in policies:
        found = simulate(graph, times, policy, crossing_s=crossing_s)
        if found.makespan_s < least_s:
            best, least_s = policy, found.makespan_s
        if least_s <= near * found.bound_s:
            break
    return best
