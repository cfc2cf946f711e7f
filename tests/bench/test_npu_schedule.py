"""What is made of measured times; measuring itself is in tests/cli/test_cli_npu.py."""

import numpy as np
import pytest

from elute.bench.npu_schedule import NAMED, Measured, outcomes, repeated, typical
from elute.npu.schedule import Kind, Stage, Worker, tasks

STAGES = [
    Stage(Kind.FLOAT),
    Stage(Kind.PRODUCT, shadow=True),
    Stage(Kind.FLOAT, attention=True),
    Stage(Kind.PRODUCT),
    Stage(Kind.FLOAT),
]


def measured(n_chunks: int) -> Measured:
    """Float work takes 1 ms, a shadow 0.5, a product 8 by the device, 2 and 4 by the CPU."""
    graph = tasks(STAGES, n_chunks)
    times = {}
    for task in graph.tasks:
        shadow = task.stage % 2
        times[task] = 8e-3 if task.worker is Worker.NPU else 0.5e-3 if shadow else 1e-3
    return Measured(graph, times, (2e-3, 4e-3))


def test_an_imagined_npu_is_so_many_times_as_fast_as_the_kernels() -> None:
    found = measured(3)
    assert found.a_chunk(found.times) == pytest.approx(
        {"float": 3e-3, "shadow": 0.5e-3, "product": 16e-3}
    )
    times = found.imagined(2)
    assert found.a_chunk(times) == pytest.approx({"float": 3e-3, "shadow": 0.5e-3, "product": 3e-3})
    of_npu = {task.stage: times[task] for task in times if task.worker is Worker.NPU}
    assert of_npu == {1: 1e-3, 3: 2e-3}


def test_every_rule_is_shown_with_the_quickest_last() -> None:
    found = measured(4)
    results = outcomes(found.graph, found.imagined(2), crossing_s=1e-4)
    assert [each.name for each in results] == [name for name, _ in NAMED]
    assert all(each.rule in rules for each, (_, rules) in zip(results, NAMED, strict=True))
    seconds = [each.schedule.makespan_s for each in results]
    assert seconds[-1] <= 1.001 * min(seconds[3:])
    assert seconds[0] == max(seconds)


def test_a_text_is_repeated_to_a_number_of_tokens() -> None:
    assert repeated([3, 1, 4], 5).tolist() == [3, 1, 4, 3, 1]
    assert repeated([3, 1, 4], 2).tolist() == [3, 1]
    assert repeated([3, 1, 4], 2).dtype == np.int32


def test_products_of_one_shape_take_what_is_typical_of_it() -> None:
    assert typical([1.0, 9.0, 3.0, 5.0, 2.0], "abaab") == (3.0, 5.5, 3.0, 3.0, 5.5)
