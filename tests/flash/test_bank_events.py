"""What a cache of banks notes of its work: waits lie within reads and tokens, in order."""

import numpy as np
from test_banks import folders, panels, plan_of  # noqa: F401

from elute.flash.timeline import READ, RELEASE, WAIT, token_timeline
from elute.flash.weights import FlashWeights
from elute.model.families import op_list
from elute.runtime.executor import Executor


def test_a_token_has_its_time_line(folders):  # noqa: F811
    packed = folders[1]
    ops = op_list(packed.config)
    weights = FlashWeights(packed, ops, plan_of(packed, 0.1))
    executor = Executor(ops, weights)
    for i in range(8):
        executor.forward(np.array([i], np.int32), i)
    events = weights.events()
    assert weights.pieces == 20
    waits = events[events[:, 0] == WAIT]
    assert waits[:, 1].tolist() == list(range(8 * 20))
    assert (waits[:, 2] <= waits[:, 3]).all()
    assert (waits[1:, 2] >= waits[:-1, 3]).all()
    assert len(events[events[:, 0] == RELEASE]) == 8 * 20 - 1
    assert (events[events[:, 0] == READ][:, 2] <= events[events[:, 0] == READ][:, 3]).all()
    line = token_timeline(events, weights.pieces)
    assert line is not None
    assert line.flash
    assert line.wait
    assert 0 < sum(end - start for start, end in line.compute) < line.seconds


def test_where_all_fit_there_is_none(folders):  # noqa: F811
    packed = folders[1]
    weights = FlashWeights(packed, op_list(packed.config), plan_of(packed, 2))
    Executor(op_list(packed.config), weights).forward(np.array([1], np.int32), 0)
    assert weights.pieces == 0
    assert weights.events().shape == (0, 4)
