"""Tasks of a prompt, what they wait for, and the rules that choose among them, simulated."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elute.bench.shapes import CONFIGS
from elute.errors import ShapeError
from elute.model.families import op_list
from elute.model.ops import Attention, Linear
from elute.npu.policies import (
    NEAR,
    Alone,
    CriticalPath,
    FeedNpu,
    InOrder,
    OutOfOrder,
    Pairs,
    RandomOrder,
    Staggered,
    quickest,
)
from elute.npu.schedule import (
    Graph,
    Kind,
    Policy,
    Stage,
    Task,
    Worker,
    describe,
    simulate,
    stages,
    task_times,
    tasks,
)

POLICIES: list[Policy] = [
    Alone(),
    InOrder(),
    Pairs(),
    Pairs(skew=4),
    OutOfOrder(),
    CriticalPath(),
    FeedNpu(),
    Staggered(0.0),
    Staggered(0.3),
    Staggered(0.3, npu_waits=True),
    Staggered(5.0, npu_waits=True),
    RandomOrder(0),
    RandomOrder(1),
]
MS = 1e-3


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Stage], Graph, dict[Task, float]]:
    plan = []
    for _ in range(draw(st.integers(0, 6))):
        plan.append(Stage(Kind.FLOAT, attention=draw(st.booleans())))
        plan.append(Stage(Kind.PRODUCT, shadow=draw(st.booleans())))
    plan.append(Stage(Kind.FLOAT, attention=draw(st.booleans())))
    n_chunks = draw(st.integers(1, 5))
    limit = draw(st.none() | st.integers(1, 6))
    graph = tasks(plan, n_chunks, in_flight=limit)
    seconds = st.integers(0, 20).map(lambda n: n / 1024)  # sums are exact; some take no time
    return plan, graph, {task: draw(seconds) for task in graph.tasks}


@given(graphs(), st.sampled_from(POLICIES), st.sampled_from([0.0, 1 / 2048]))
def test_any_policy_runs_all_tasks_once_and_in_their_order(
    case: tuple[list[Stage], Graph, dict[Task, float]], policy: Policy, crossing_s: float
) -> None:
    plan, graph, times = case
    found = simulate(graph, times, policy, crossing_s=crossing_s)
    start = dict(zip(graph.tasks, found.starts, strict=True))
    end = dict(zip(graph.tasks, found.ends, strict=True))
    assert len(start) == len(graph.tasks)
    for task, seconds in times.items():
        crossing = crossing_s if task.worker == Worker.NPU else 0.0
        assert end[task] == start[task] + seconds + crossing
        before = [t for t in graph.tasks if (t.chunk, t.stage) == (task.chunk, task.stage - 1)]
        if plan[task.stage].attention:
            same = (t for t in graph.tasks if t.stage == task.stage)
            before += [t for t in same if t.chunk < task.chunk]
        assert all(end[t] <= start[task] for t in before)
    for worker in Worker:
        spans = sorted((start[t], end[t]) for t in graph.tasks if t.worker == worker)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    begun = [min(start[t] for t in graph.tasks if t.chunk == c) for c in range(graph.n_chunks)]
    ended = [max(end[t] for t in graph.tasks if t.chunk == c) for c in range(graph.n_chunks)]
    for at in begun:
        n = sum(b <= at < e for b, e in zip(begun, ended, strict=True))
        assert n <= graph.in_flight
    assert found.bound_s <= found.makespan_s
    assert found == simulate(graph, times, policy, crossing_s=crossing_s)
    assert 0.0 <= found.bubbles <= 1.0
    assert simulate(graph, found.times(), policy, crossing_s=crossing_s) == found


@given(graphs())
def test_graph_has_a_task_for_each_stage_and_one_more_for_each_shadow(
    case: tuple[list[Stage], Graph, dict[Task, float]],
) -> None:
    plan, graph, _ = case
    n = len(plan) + sum(stage.shadow for stage in plan)
    assert len(graph.tasks) == len(set(graph.tasks)) == n * graph.n_chunks
    assert sum(graph.n_predecessors) == sum(len(each) for each in graph.successors)
    assert all(later > i for i, each in enumerate(graph.successors) for later in each)


def test_float_stage_waits_for_product_and_shadow() -> None:
    plan = [Stage(Kind.FLOAT), Stage(Kind.PRODUCT, shadow=True), Stage(Kind.FLOAT, attention=True)]
    graph = tasks(plan, 2)
    number = {task: i for i, task in enumerate(graph.tasks)}

    def after(chunk: int, stage: int, worker: Worker) -> list[Task]:
        found = graph.successors[number[Task(chunk, stage, worker)]]
        return [graph.tasks[i] for i in found]

    product, shadow = Task(0, 1, Worker.NPU), Task(0, 1, Worker.CPU)
    assert after(0, 0, Worker.CPU) == [product, shadow]
    assert after(*product) == after(*shadow) == [Task(0, 2, Worker.CPU)]
    assert after(0, 2, Worker.CPU) == [Task(1, 2, Worker.CPU)]  # the cache, in order
    assert graph.n_predecessors[number[Task(1, 2, Worker.CPU)]] == 3


def test_stages_of_a_model_cover_its_ops() -> None:
    ops = op_list(CONFIGS["llama-3.2-1b"]).ops
    found = stages(ops, lambda linear: len(linear.weights) == 3)
    tasks(found, 3)  # they alternate
    assert [i for stage in found for i in range(stage.begin, stage.end)] == list(range(len(ops)))
    linears = [op for op in ops if isinstance(op, Linear)]
    assert sum(stage.kind == Kind.PRODUCT for stage in found) == len(linears)
    assert sum(s.attention for s in found) == sum(isinstance(op, Attention) for op in ops)
    assert sum(s.shadow for s in found) == sum(len(op.weights) == 3 for op in linears)


@pytest.mark.parametrize(
    ("plan", "n_chunks", "in_flight"),
    [
        ([], 1, None),
        ([Stage(Kind.PRODUCT)], 1, None),
        ([Stage(Kind.FLOAT), Stage(Kind.PRODUCT)], 1, None),
        ([Stage(Kind.FLOAT), Stage(Kind.FLOAT), Stage(Kind.FLOAT)], 1, None),
        ([Stage(Kind.FLOAT)], 0, None),
        ([Stage(Kind.FLOAT)], 1, 0),
    ],
)
def test_plan_that_no_run_could_follow_is_refused(
    plan: list[Stage], n_chunks: int, in_flight: int | None
) -> None:
    with pytest.raises(ShapeError):
        tasks(plan, n_chunks, in_flight=in_flight)


def layers(
    n_layers: int, n_chunks: int, *, npu_s: float, cpu_s: float, shadows: bool
) -> tuple[Graph, dict[Task, float]]:
    """A layer of a chunk takes npu_s in products, cpu_s in float work, on average over the chunks:
    half of it attention, which grows with the chunk. Shadows take a tenth of a product."""
    plan = []
    seconds: dict[tuple[int, Worker], float | list[float]] = {}
    products = npu_s * 0.156, npu_s * 0.094, npu_s * 0.5, npu_s * 0.25  # qkv, o, gate and up, down
    floats = cpu_s * 0.1, cpu_s * 0.1, cpu_s * 0.1, cpu_s * 0.2
    for _ in range(n_layers):
        for i in range(4):
            stage = len(plan)
            plan += [Stage(Kind.FLOAT, attention=i == 1), Stage(Kind.PRODUCT, shadow=shadows)]
            grown = [cpu_s * (c + 0.5) / n_chunks * (i == 1) for c in range(n_chunks)]
            seconds[stage, Worker.CPU] = [floats[i] + each for each in grown]
            seconds[stage + 1, Worker.NPU] = products[i]
            seconds[stage + 1, Worker.CPU] = products[i] / 10
    seconds[len(plan), Worker.CPU] = floats[0]
    graph = tasks([*plan, Stage(Kind.FLOAT)], n_chunks)
    return graph, task_times(graph, seconds)


@pytest.mark.parametrize("shadows", [False, True])
def test_npu_that_dominates_hardly_waits_out_of_order(shadows: bool) -> None:
    cpu_s = 4 * MS if shadows else 5 * MS
    graph, times = layers(30, 4, npu_s=10 * MS, cpu_s=cpu_s, shadows=shadows)
    bubbles = {
        policy: simulate(graph, times, policy).bubbles
        for policy in (InOrder(), Pairs(), OutOfOrder(), CriticalPath(), FeedNpu())
    }
    assert bubbles[CriticalPath()] <= 0.02
    assert bubbles[FeedNpu()] <= 0.02
    assert bubbles[InOrder()] >= 0.25
    assert bubbles[Pairs()] >= 0.1
    assert bubbles[OutOfOrder()] < bubbles[Pairs()]


@pytest.mark.parametrize("n_chunks", [3, 4, 5, 8])
@pytest.mark.parametrize("shadows", [False, True])
def test_quickest_rule_leaves_npu_that_dominates_hardly_a_bubble(
    shadows: bool, n_chunks: int
) -> None:
    cpu_s = 4 * MS if shadows else 5 * MS
    graph, times = layers(30, n_chunks, npu_s=10 * MS, cpu_s=cpu_s, shadows=shadows)
    found = simulate(graph, times, quickest(graph, times))
    assert found.bubbles <= 0.005
    assert found.makespan_s <= 1.005 * found.bound_s


def test_npu_that_waits_for_its_turn_is_quicker_with_two_chunks() -> None:
    graph, times = layers(30, 2, npu_s=10 * MS, cpu_s=5 * MS, shadows=False)
    greedy = simulate(graph, times, CriticalPath())
    found = simulate(graph, times, quickest(graph, times))
    assert greedy.bubbles > 0.1
    assert found.bubbles < 0.06


def test_processor_that_dominates_hardly_waits() -> None:
    graph, times = layers(30, 4, npu_s=10 * MS, cpu_s=20 * MS, shadows=True)
    found = simulate(graph, times, CriticalPath())
    assert found.makespan_s <= 1.001 * found.bound_s
    assert found.idle_s(Worker.CPU) <= 0.001 * found.makespan_s
    assert found.bubbles >= 0.4  # no rule can: there is not enough to do for it


@given(graphs())
def test_quickest_rule_is_no_slower_than_those_it_chose_from(
    case: tuple[list[Stage], Graph, dict[Task, float]],
) -> None:
    _, graph, times = case
    found = simulate(graph, times, quickest(graph, times, POLICIES))
    least_s = min(simulate(graph, times, policy).makespan_s for policy in POLICIES)
    assert found.makespan_s <= max(least_s, NEAR * found.bound_s)


@pytest.mark.parametrize("policy", [InOrder(), Pairs(), OutOfOrder(), CriticalPath(), FeedNpu()])
def test_one_chunk_leaves_only_shadows_to_overlap(policy: Policy) -> None:
    graph, times = layers(3, 1, npu_s=10 * MS, cpu_s=5 * MS, shadows=False)
    assert simulate(graph, times, policy).makespan_s == pytest.approx(sum(times.values()))


def test_pairs_leave_no_odd_chunk_out() -> None:
    graph = tasks([Stage(Kind.FLOAT), Stage(Kind.PRODUCT), Stage(Kind.FLOAT)], 3)
    found = simulate(graph, dict.fromkeys(graph.tasks, 1.0), Pairs(skew=1))
    # chunk 0: 0 1 2, chunk 1: 1 2 3, chunk 2: 4 5 6
    assert found.starts == (0.0, 1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)


def test_bubbles_are_what_npu_waits_between_its_first_and_last_task() -> None:
    plan = [Stage(Kind.FLOAT), Stage(Kind.PRODUCT), Stage(Kind.FLOAT), Stage(Kind.PRODUCT)]
    graph = tasks([*plan, Stage(Kind.FLOAT)], 1)
    found = simulate(graph, dict.fromkeys(graph.tasks, 1.0), InOrder(), crossing_s=1.0)
    assert found.makespan_s == found.bound_s == 7.0
    assert found.busy_s(Worker.NPU) == 4.0  # two products, two crossings
    assert found.idle_s(Worker.CPU) == 4.0
    assert found.bubbles == pytest.approx(1 / 5)  # 1 .. 3 and 4 .. 6, of 1 .. 6
    assert found.npu_share == pytest.approx(4 / 7)


def test_no_product_means_no_bubbles() -> None:
    graph = tasks([Stage(Kind.FLOAT)], 2)
    found = simulate(graph, dict.fromkeys(graph.tasks, 0.0), CriticalPath())
    assert found.bubbles == found.npu_share == found.makespan_s == 0.0
    assert "0.0 ms" in describe(found)


def test_time_line_shows_chunks_and_idle_time() -> None:
    graph = tasks([Stage(Kind.FLOAT), Stage(Kind.PRODUCT, shadow=True), Stage(Kind.FLOAT)], 1)
    times = dict(zip(graph.tasks, (1.0, 2.0, 1.0, 1.0), strict=True))
    found = simulate(graph, times, CriticalPath())
    assert describe(found, width=8).splitlines() == [
        "cpu |0000  00| 3000.0 ms busy, 1000.0 idle",
        "npu |  0000  | 2000.0 ms busy, 2000.0 idle",
        "4000.0 ms, at least 4000.0; NPU busy 50.0%, bubbles 0.00%",
    ]


@given(graphs())
def test_alone_nothing_runs_beside_anything(
    case: tuple[list[Stage], Graph, dict[Task, float]],
) -> None:
    _, graph, times = case
    assert simulate(graph, times, Alone()).makespan_s == sum(times.values())
