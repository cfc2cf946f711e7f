"""Tasks on two threads: the same results in any order, and nobody left behind."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from elute.npu.policies import (
    CriticalPath,
    FeedNpu,
    InOrder,
    OutOfOrder,
    Pairs,
    RandomOrder,
    Staggered,
)
from elute.npu.run import run
from elute.npu.schedule import (
    Front,
    Graph,
    Kind,
    Policy,
    Stage,
    Task,
    Worker,
    simulate,
    tasks,
)

POLICIES: list[Policy] = [
    InOrder(),
    Pairs(),
    OutOfOrder(),
    CriticalPath(),
    FeedNpu(),
    Staggered(0.3),
    Staggered(0.3, npu_waits=True),
    *(RandomOrder(seed) for seed in range(5)),
]


def graph_of(n_layers: int, n_chunks: int, shadows: str, in_flight: int | None = None) -> Graph:
    plan = []
    for layer in range(n_layers):
        for i in range(4):
            shadow = shadows == "all" or (shadows == "some" and (4 * layer + i) % 3 == 0)
            plan += [Stage(Kind.FLOAT, attention=i == 1), Stage(Kind.PRODUCT, shadow=shadow)]
    return tasks([*plan, Stage(Kind.FLOAT)], n_chunks, in_flight=in_flight)


def alike(graph: Graph) -> dict[Task, float]:
    return dict.fromkeys(graph.tasks, 1.0)


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("elute-")]


class Arithmetic:
    """As a chunk's forward: float stages mix what product and shadow left, attention all of the
    cache so far. No two orders of operations give the same numbers by chance."""

    def __init__(self, graph: Graph, attention: set[int]) -> None:
        self.state = [c + 1 for c in range(graph.n_chunks)]
        self.halves: dict[tuple[int, Worker], int] = {}
        self.cache: dict[int, list[int]] = {}
        self.attention = attention

    def __call__(self, task: Task) -> None:
        x = self.state[task.chunk]
        if task.stage % 2:
            factor = 31 if task.worker == Worker.NPU else 57
            self.halves[task.chunk, task.worker] = x * factor + task.stage
            return
        npu = self.halves.pop((task.chunk, Worker.NPU), 0)
        shadow = self.halves.pop((task.chunk, Worker.CPU), 0)
        x = (x * 1_000_003 + npu * 7 + shadow) % (1 << 61)
        if task.stage in self.attention:
            cache = self.cache.setdefault(task.stage, [])
            assert len(cache) == task.chunk
            cache.append(x)
            for each in cache:
                x = (x * 131 + each) % (1 << 61)
        self.state[task.chunk] = x


@pytest.mark.parametrize("shadows", ["none", "some", "all"])
@pytest.mark.parametrize("n_chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("in_flight", [None, 1, 2])
def test_any_order_gives_the_same(shadows: str, n_chunks: int, in_flight: int | None) -> None:
    graph = graph_of(3, n_chunks, shadows, in_flight)
    attention = set(range(2, graph.n_stages, 8))
    wanted = Arithmetic(graph, attention)
    for task in graph.tasks:
        wanted(task)
    for policy in POLICIES:
        got = Arithmetic(graph, attention)
        schedule = run(graph, policy, alike(graph), got)
        assert schedule is not None
        assert (got.state, got.cache) == (wanted.state, wanted.cache), policy


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_measured_run_obeys_and_feeds_the_simulator(policy: Policy) -> None:
    graph = graph_of(2, 3, "some")
    seen: list[tuple[Task, str]] = []
    found = run(
        graph,
        policy,
        alike(graph),
        lambda task: seen.append((task, threading.current_thread().name)),
    )
    assert found is not None
    assert sorted(task for task, _ in seen) == sorted(graph.tasks)
    assert all(name == f"elute-{task.worker}" for task, name in seen)
    for index, later in enumerate(graph.successors):
        assert found.starts[index] <= found.ends[index]
        assert all(found.ends[index] <= found.starts[each] for each in later)
    for worker in Worker:
        own = [i for i, task in enumerate(graph.tasks) if task.worker == worker]
        spans = sorted((found.starts[i], found.ends[i]) for i in own)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    simulate(graph, found.times(), policy)


@pytest.mark.parametrize("worker", list(Worker))
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_failing_task_stops_both_workers(worker: Worker, kind: type[BaseException]) -> None:
    graph = graph_of(4, 3, "all")
    bad = [task for task in graph.tasks if task.worker == worker][7]
    ran: list[Task] = []

    def work(task: Task) -> None:
        ran.append(task)
        if task == bad:
            raise kind("the device is gone")

    with pytest.raises(kind, match="the device is gone"):
        run(graph, InOrder(), alike(graph), work)
    assert len(ran) < len(graph.tasks)
    other = Worker.CPU if worker == Worker.NPU else Worker.NPU
    after = ran[ran.index(bad) + 1 :]
    assert all(task.worker == other for task in after)
    # InOrder: beside it only the other half of its product, nothing behind it.
    assert len(after) <= 1


def test_first_of_two_errors_is_told() -> None:
    graph = graph_of(1, 1, "all")
    both = threading.Barrier(2, timeout=60)

    def work(task: Task) -> None:
        if task.stage == 1:
            both.wait()
            if task.worker == Worker.CPU:
                for thread in threading.enumerate():
                    if thread.name == "elute-npu":
                        thread.join(60)
            raise ValueError(f"of the {task.worker}")

    with pytest.raises(ValueError, match="of the npu"):
        run(graph, CriticalPath(), alike(graph), work)


def test_interrupted_caller_waits_for_tasks_under_way() -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    graph = graph_of(4, 3, "all")
    ran: list[Task] = []
    ended: list[Task] = []

    def work(task: Task) -> None:
        ran.append(task)
        if len(ran) == 5:
            for _ in range(3):  # an impatient user
                signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.02)
        ended.append(task)

    try:
        with pytest.raises(KeyboardInterrupt):
            run(graph, CriticalPath(), alike(graph), work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(ran) == sorted(ended)
    assert len(ran) < len(graph.tasks)


@pytest.mark.parametrize("after", [0, 1, 20])
def test_cancelled_run_returns_none(after: int) -> None:
    graph = graph_of(4, 3, "some")
    ran: list[Task] = []
    found = run(graph, OutOfOrder(), alike(graph), ran.append, cancelled=lambda: len(ran) >= after)
    assert found is None
    assert len(ran) <= after + 1


def test_cancelling_after_the_last_task_changes_nothing() -> None:
    graph = graph_of(1, 2, "some")
    ran: list[Task] = []
    n = len(graph.tasks)
    found = run(graph, OutOfOrder(), alike(graph), ran.append, cancelled=lambda: len(ran) == n)
    assert found is not None


def test_error_in_asking_for_cancellation_is_raised() -> None:
    graph = graph_of(1, 2, "some")

    def cancelled() -> bool:
        raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        run(graph, OutOfOrder(), alike(graph), lambda _: None, cancelled=cancelled)


def test_policy_that_fails_stops_the_run() -> None:
    class Broken:
        def begin(self, graph: Graph, seconds: Sequence[float]) -> Broken:
            return self

        def __call__(self, ready: Sequence[int], worker: Worker, front: Front) -> int:
            raise ZeroDivisionError

    graph = graph_of(1, 2, "some")
    with pytest.raises(ZeroDivisionError):
        run(graph, Broken(), alike(graph), lambda _: None)


def test_policy_that_waits_for_nothing_is_found_out() -> None:
    class Lazy:
        def begin(self, graph: Graph, seconds: Sequence[float]) -> Lazy:
            return self

        def __call__(self, ready: Sequence[int], worker: Worker, front: Front) -> None:
            return None

    graph = graph_of(1, 2, "some")
    with pytest.raises(AssertionError, match="waits for nothing"):
        run(graph, Lazy(), alike(graph), lambda _: None)
    with pytest.raises(AssertionError, match="waits for nothing"):
        simulate(graph, alike(graph), Lazy())


def test_threads_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "elute-npu":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    graph = graph_of(1, 2, "some")
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run(graph, OutOfOrder(), alike(graph), lambda _: None)
