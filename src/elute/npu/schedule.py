"""When a prompt's work runs on the processor and when on the NPU: tasks, and what each waits for.

A prompt is cut in chunks, a forward in stages: float work (FLOAT) and the products between it
(PRODUCT), each beside the product of its outliers where it has a shadow. Pure; knows no thread, no
device and no weights. Source: llm.npu (arXiv 2407.05858) section 3.4. Rules of choice: policies.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from elute.errors import ShapeError
from elute.model.ops import Attention, Linear, Op


class Worker(StrEnum):
    CPU = "cpu"
    NPU = "npu"


class Kind(StrEnum):
    FLOAT = "float"  # what lies between two products; the quantization of the next one's input too
    PRODUCT = "product"  # one Linear


@dataclass(frozen=True)
class Stage:
    """A part of the op list, ops[begin:end].

    attention  of a FLOAT: it appends to the cache, so chunks pass it in order
    shadow     of a PRODUCT: the processor multiplies its outliers meanwhile
    """

    kind: Kind
    attention: bool = False
    shadow: bool = False
    begin: int = 0
    end: int = 0


class Task(NamedTuple):
    """A stage of a chunk. The CPU's task of a PRODUCT is its shadow."""

    chunk: int
    stage: int
    worker: Worker


Times = Mapping[Task, float]  # seconds


@dataclass(frozen=True)
class Graph:
    """Tasks in an order in which they could run one by one; they are named by their index.

    n_layers   stages with attention
    in_flight  no more chunks than this may be begun and not ended; begun in ascending order
    """

    tasks: tuple[Task, ...]
    successors: tuple[tuple[int, ...], ...]
    n_predecessors: tuple[int, ...]
    n_chunks: int
    n_stages: int
    n_layers: int
    in_flight: int


def stages(ops: Sequence[Op], shadowed: Callable[[Linear], bool]) -> list[Stage]:
    """Of an op list: each Linear is a PRODUCT, what lies before, between and after is FLOAT.

    Where two Linear ops follow one another there is a FLOAT of no ops: it quantizes.
    """
    found, begin = [], 0

    def float_stage(end: int) -> Stage:
        attention = any(isinstance(op, Attention) for op in ops[begin:end])
        return Stage(Kind.FLOAT, attention=attention, begin=begin, end=end)

    for i, op in enumerate(ops):
        if isinstance(op, Linear):
            product = Stage(Kind.PRODUCT, shadow=shadowed(op), begin=i, end=i + 1)
            found += [float_stage(i), product]
            begin = i + 1
    return [*found, float_stage(len(ops))]


def tasks(stages: Sequence[Stage], n_chunks: int, *, in_flight: int | None = None) -> Graph:
    """A task waits for those of its chunk's stage before it, and where it appends to the cache for
    the same stage of the chunk before it.

    Raises ShapeError unless stages alternate, FLOAT first and last, and counts are at least 1.
    """
    for i, stage in enumerate(stages):
        wanted = Kind.PRODUCT if i % 2 else Kind.FLOAT
        if stage.kind != wanted:
            raise ShapeError(f"stage {i} of {len(stages)} is a {stage.kind}; wanted a {wanted}")
    if len(stages) % 2 == 0:
        raise ShapeError(f"{len(stages)} stages end with a product; end with a float stage")
    limit = n_chunks if in_flight is None else in_flight
    if n_chunks < 1 or limit < 1:
        raise ShapeError(f"{n_chunks} chunks, {limit} in flight; use at least 1")
    named: list[Task] = []
    for chunk in range(n_chunks):
        for i, stage in enumerate(stages):
            if stage.kind == Kind.PRODUCT:
                named.append(Task(chunk, i, Worker.NPU))
            if stage.kind == Kind.FLOAT or stage.shadow:
                named.append(Task(chunk, i, Worker.CPU))
    of_stage: dict[tuple[int, int], list[int]] = {}
    for index, task in enumerate(named):
        of_stage.setdefault((task.chunk, task.stage), []).append(index)
    successors: list[list[int]] = [[] for _ in named]
    counts = [0] * len(named)
    for index, task in enumerate(named):
        before = list(of_stage.get((task.chunk, task.stage - 1), []))
        if stages[task.stage].attention and task.chunk:
            before += of_stage[task.chunk - 1, task.stage]
        counts[index] = len(before)
        for earlier in before:
            successors[earlier].append(index)
    after = tuple(tuple(each) for each in successors)
    n_layers = sum(stage.attention for stage in stages)
    return Graph(tuple(named), after, tuple(counts), n_chunks, len(stages), n_layers, limit)


def task_times(
    graph: Graph, seconds: Mapping[tuple[int, Worker], float | Sequence[float]]
) -> dict[Task, float]:
    """seconds  of (stage, worker): for any chunk, or a sequence with one for each chunk"""

    def of(task: Task) -> float:
        found = seconds[task.stage, task.worker]
        return found if isinstance(found, int | float) else found[task.chunk]

    return {task: of(task) for task in graph.tasks}


class Choose(Protocol):
    """Which of `ready`, never empty, in no order, the worker takes; None: it waits until another
    task ends. Called in the order of a run's choices, with what the run stands at."""

    def __call__(self, ready: Sequence[int], worker: Worker, front: Front) -> int | None: ...


class Policy(Protocol):
    """A rule of choice. It changes when a task runs, never what it finds."""

    def begin(self, graph: Graph, seconds: Sequence[float]) -> Choose:
        """For one run. seconds: of each task of the graph, the NPU's with the crossing."""


class Front:
    """Where one run stands: what is ready. Not for two threads at once.

    missing  of each task: how many it still waits for
    n_begun  no chunk from this one on has begun
    """

    def __init__(self, graph: Graph, seconds: Sequence[float], policy: Policy) -> None:
        self.graph = graph
        self.seconds = seconds
        self.missing = list(graph.n_predecessors)
        self.n_left = len(graph.tasks)
        self.running: dict[Worker, int] = {}
        self.ready: dict[Worker, list[int]] = {worker: [] for worker in Worker}
        self._left_of_chunk = [0] * graph.n_chunks
        for index, task in enumerate(graph.tasks):
            self._left_of_chunk[task.chunk] += 1
            if not self.missing[index]:
                self.ready[task.worker].append(index)
        self.n_begun = self._n_ended = 0
        self._limited = graph.in_flight < graph.n_chunks
        self._choose = policy.begin(graph, seconds)

    def take(self, worker: Worker) -> int | None:
        """The task that the worker, idle until now, begins; None: it waits until one ends."""
        ready = self.ready[worker]
        allowed = [i for i in ready if self._may_begin(i)] if self._limited else ready
        taken = self._choose(allowed, worker, self) if allowed else None
        if taken is not None:
            ready.remove(taken)
            self.running[worker] = taken
            self.n_begun = max(self.n_begun, self.graph.tasks[taken].chunk + 1)
        return taken

    def finish(self, worker: Worker) -> None:
        """The worker's task has ended."""
        index = self.running.pop(worker)
        tasks, missing = self.graph.tasks, self.missing
        for later in self.graph.successors[index]:
            missing[later] -= 1
            if not missing[later]:
                self.ready[tasks[later].worker].append(later)
        self.n_left -= 1
        chunk = tasks[index].chunk
        self._left_of_chunk[chunk] -= 1
        self._n_ended += not self._left_of_chunk[chunk]

    def _may_begin(self, index: int) -> bool:
        chunk = self.graph.tasks[index].chunk
        if chunk < self.n_begun:
            return True
        # In order: a later chunk would wait in its attention for one that never may begin.
        return chunk == self.n_begun and self.n_begun - self._n_ended < self.graph.in_flight


@dataclass(frozen=True)
class Schedule:
    """When each task of a graph ran, in seconds from the beginning.

    crossing_s   part of each of the NPU's tasks: handing it over
    bound_s      no schedule of these times is shorter
    """

    graph: Graph
    starts: tuple[float, ...]
    ends: tuple[float, ...]
    crossing_s: float
    bound_s: float

    @property
    def makespan_s(self) -> float:
        return max(self.ends)

    def busy_s(self, worker: Worker) -> float:
        """How long it had a task, crossings counted."""
        spans = zip(self.graph.tasks, self.starts, self.ends, strict=True)
        return sum(end - start for task, start, end in spans if task.worker == worker)

    def idle_s(self, worker: Worker) -> float:
        return self.makespan_s - self.busy_s(worker)

    @property
    def npu_share(self) -> float:
        return self.busy_s(Worker.NPU) / self.makespan_s if self.makespan_s else 0.0

    @property
    def bubbles(self) -> float:
        """1 - busy(NPU) / (its last end - its first start): the share of its time in which it waits
        for the processor. Crossings count as busy: no order of tasks spares one."""
        npu = [i for i, task in enumerate(self.graph.tasks) if task.worker == Worker.NPU]
        if not npu:
            return 0.0
        span = max(self.ends[i] for i in npu) - min(self.starts[i] for i in npu)
        return max(0.0, 1 - self.busy_s(Worker.NPU) / span) if span else 0.0

    def times(self) -> dict[Task, float]:
        """What each took, without the crossing: for simulate()."""
        spans = zip(self.graph.tasks, self.starts, self.ends, strict=True)
        return {
            task: max(0.0, end - start - self.crossing_s * (task.worker == Worker.NPU))
            for task, start, end in spans
        }


def task_seconds(graph: Graph, times: Times, crossing_s: float = 0.0) -> list[float]:
    """Of each task, the crossing added to the NPU's."""
    return [times[task] + crossing_s * (task.worker == Worker.NPU) for task in graph.tasks]


def remaining(graph: Graph, seconds: Sequence[float]) -> list[float]:
    """Of each task: the longest path from its start to the end of all."""
    found = list(seconds)
    for index in reversed(range(len(found))):
        found[index] += max((found[later] for later in graph.successors[index]), default=0.0)
    return found


def lower_bound(graph: Graph, seconds: Sequence[float]) -> float:
    """The longest path, or a worker's work from its earliest start to the shortest way out after
    it, whichever is longer."""
    after = remaining(graph, seconds)
    before = [0.0] * len(seconds)  # the longest path to each task's start
    for index, later in enumerate(graph.successors):
        for each in later:
            before[each] = max(before[each], before[index] + seconds[index])
    longest = max(after)
    for worker in Worker:
        own = [i for i, task in enumerate(graph.tasks) if task.worker == worker]
        if own:
            head = min(before[i] for i in own)
            tail = min(after[i] - seconds[i] for i in own)
            longest = max(longest, head + sum(seconds[i] for i in own) + tail)
    return longest


def simulate(graph: Graph, times: Times, policy: Policy, *, crossing_s: float = 0.0) -> Schedule:
    """One task a worker at a time; both choose when they are idle, after all that ended at that
    moment. crossing_s is added to each of the NPU's tasks.
    """
    seconds = task_seconds(graph, times, crossing_s)
    front = Front(graph, seconds, policy)
    starts, ends = [0.0] * len(seconds), [0.0] * len(seconds)
    now = 0.0
    while front.n_left:
        for worker in (Worker.NPU, Worker.CPU):
            if worker not in front.running and (taken := front.take(worker)) is not None:
                starts[taken], ends[taken] = now, now + seconds[taken]
        assert front.running, "a policy waits for nothing"
        now = min(ends[index] for index in front.running.values())
        for worker, index in list(front.running.items()):
            if ends[index] <= now:
                front.finish(worker)
    bound_s = lower_bound(graph, seconds)
    return Schedule(graph, tuple(starts), tuple(ends), crossing_s, bound_s)


def describe(schedule: Schedule, width: int = 100) -> str:
    """Figures and a time line: a row for each worker, a column for each makespan / width seconds:
    the last digit of the chunk that has most of it, a blank where the worker mostly idles.
    """
    column_s = schedule.makespan_s / width
    rows = []
    for worker in Worker:
        shares: list[dict[int, float]] = [{} for _ in range(width)]
        spans = zip(schedule.graph.tasks, schedule.starts, schedule.ends, strict=True)
        for task, start, end in spans:
            if task.worker != worker or end == start:
                continue
            first = min(width - 1, int(start / column_s))
            for column in range(first, min(width, int(end / column_s) + 1)):
                inside = min(end, (column + 1) * column_s) - max(start, column * column_s)
                shares[column][task.chunk] = shares[column].get(task.chunk, 0.0) + inside
        line = ""
        for of_chunk in shares:
            idle = not of_chunk or sum(of_chunk.values()) < column_s / 2
            line += " " if idle else str(max(of_chunk, key=of_chunk.__getitem__) % 10)
        busy_ms, idle_ms = schedule.busy_s(worker) * 1e3, schedule.idle_s(worker) * 1e3
        rows.append(f"{worker} |{line}| {busy_ms:.1f} ms busy, {idle_ms:.1f} idle")
    summary = (
        f"{schedule.makespan_s * 1e3:.1f} ms, at least {schedule.bound_s * 1e3:.1f}; "
        f"NPU busy {schedule.npu_share:.1%}, bubbles {schedule.bubbles:.2%}"
    )
    return "\n".join([*rows, summary])
