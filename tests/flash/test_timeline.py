"""A token's time line, from events by hand and from a real stream."""

import numpy as np
import pytest

from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.flash.plan import least_window, solve
from elute.flash.timeline import READ, RELEASE, WAIT, token_timeline
from elute.flash.weights import FlashWeights, uses
from elute.model.families import op_list
from elute.runtime.executor import Executor

CONFIG = {
    **CONFIGS["llama-3.2-1b"],
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}


def test_events_become_spans_of_one_token():
    ms = 1_000_000
    events = np.array(
        [
            (READ, 0, 1 * ms, 3 * ms),
            (RELEASE, 1, 5 * ms, 5 * ms),
            (READ, 2, 4 * ms, 8 * ms),
            (READ, 3, 7 * ms, 9 * ms),
            (WAIT, 2, 6 * ms, 8 * ms),
            (WAIT, 2, 7 * ms, 8 * ms),  # another thread
            (RELEASE, 2, 10 * ms, 10 * ms),
            (RELEASE, 3, 15 * ms, 15 * ms),
        ],
        np.int64,
    )
    found = token_timeline(events, 2)
    assert found is not None
    assert found.seconds == pytest.approx(0.010)
    assert np.allclose(found.wait, [(0.001, 0.003)])
    assert np.allclose(found.compute, [(0, 0.001), (0.003, 0.010)])
    assert np.allclose(found.flash, [(0, 0.004)])


def test_without_a_whole_token_there_is_none():
    assert token_timeline(np.zeros((0, 4), np.int64), 3) is None
    assert token_timeline(np.array([(RELEASE, 2, 5, 5)], np.int64), 3) is None


def test_a_stream_notes_reads_waits_and_releases_in_order(tmp_path):
    packed = random_packed(CONFIG, random_recipe(bits=4, outer_bits=6), tmp_path / "model")
    ops = op_list(packed.config)
    order = uses(ops, packed)
    weights = FlashWeights(packed, ops, solve(least_window(order), {}, order))
    assert weights.events().shape == (0, 4)
    executor = Executor(ops, weights, n_threads=2)
    n_pieces, n_tokens = len(weights.plan.places), 6
    for i in range(n_tokens):
        executor.forward(np.array([i], np.int32), i)
    events = weights.events()
    reads = events[events[:, 0] == READ]
    assert np.array_equal(reads[:, 1], np.arange(len(reads)))
    assert len(reads) >= n_tokens * n_pieces
    assert (events[:, 3] >= events[:, 2]).all()
    releases = events[events[:, 0] == RELEASE]
    assert (np.diff(releases[:, 1]) > 0).all() or n_pieces > 0
    done = {int(sequence): int(end) for sequence, end in reads[:, [1, 3]]}
    for sequence, at in releases[:, [1, 2]]:  # nothing is used before it was read
        assert done[int(sequence)] <= at
    line = token_timeline(events, n_pieces)
    assert line is not None
    assert line.seconds > 0
    spans = sum(end - start for start, end in (*line.compute, *line.wait))
    assert spans == pytest.approx(line.seconds, abs=1e-6)
    for _ in range(3000 // n_pieces):  # the ring forgets the oldest
        executor.forward(np.array([1], np.int32), n_tokens)
    assert len(weights.events()) <= 8192
