"""The choice of marginal channels by what is in memory: the rule in numpy, the executor's the same,
deterministic given what is in memory, nothing of it where it is off or all is in memory.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_banks import PROMPT, folders, panels, plan_of, thresholds, wanted  # noqa: F401

import elute
from elute.errors import ShapeError, UnsupportedError
from elute.flash.banks import Predictor, bank_uses, present_rows
from elute.flash.sparsity import Threshold
from elute.flash.weights import FlashWeights
from elute.model.families import op_list
from elute.model.ops import Linear
from elute.runtime.executor import Executor

VALUE = 0.84


def rule(x, value, present, share):
    """Threshold.active, channel by channel."""
    counts, there = [], sum(present)
    rest = min(np.float32(1), np.float32(len(x) - there) / np.float32(max(there, 1)))
    sooner = np.float32(1 - share / 2 * float(rest))
    for score, there in zip(np.abs(x), present, strict=True):
        least = np.float32(value) * (sooner if there else np.float32(1 + share))
        counts.append(not score < least)
    return np.array(counts)


@given(
    st.lists(st.tuples(st.floats(-4, 4, width=32), st.booleans()), min_size=1, max_size=40),
    st.floats(0, 4, width=16),
    st.sampled_from([0, 0.25, 0.5, 1]),
)
@settings(max_examples=200, deadline=None)
def test_channels_in_memory_count_sooner_and_others_later(channels, value, share):
    x = np.array([score for score, _ in channels], np.float32)
    present = np.array([there for _, there in channels])
    threshold = Threshold(np.ones(x.size, np.float32), value)
    found = threshold.active(x, present, cache_aware=share)
    assert np.array_equal(found, rule(x, value, present, share))
    plain = threshold.active(x)
    assert np.array_equal(plain, ~(np.abs(x) < np.float32(value)))
    assert not (plain & ~found & present).any()
    assert not (found & ~plain & ~present).any()
    if share == 0 or present.all():
        assert np.array_equal(found, plain)


def test_nan_and_infinity_always_count():
    x = np.array([np.nan, np.inf, -np.inf, 0], np.float32)
    threshold = Threshold(np.ones(4, np.float32), 1.0)
    found = threshold.active(x, np.zeros(4, bool), cache_aware=1.0)
    assert found.tolist() == [True, True, True, False]


@pytest.mark.parametrize("share", [0.25, 0.5, 1])
@pytest.mark.parametrize("in_memory", [0.1, 0.4, 0.6, 0.95])
def test_no_more_channels_count_than_without(share, in_memory):
    rng = np.random.default_rng(5)
    x = rng.normal(size=200_000).astype(np.float32)
    threshold = Threshold(np.ones(x.size, np.float32), 0.6745)  # of half of them
    present = rng.random(x.size) < in_memory
    found = threshold.active(x, present, cache_aware=share)
    assert found.mean() < threshold.active(x).mean()


def weights_of(packed, share, **options):
    return FlashWeights(packed, op_list(packed.config), plan_of(packed, share), **options)


@pytest.mark.parametrize("predictor", Predictor)
@pytest.mark.parametrize("share", [0, 0.4])
@pytest.mark.parametrize("group", [1, 3])
def test_each_token_is_that_of_the_rule_given_what_is_in_memory(
    panels,  # noqa: F811
    folders,  # noqa: F811
    predictor,
    share,
    group,
):
    """The path in panel order gives the same bits with importances moved instead of thresholds (no
    score here lies between the two but for rounding). Each token is the first of its context, so
    that nothing else is remembered but what is in memory.
    """
    packed = folders[group]
    ops = op_list(packed.config)
    weights = weights_of(packed, share, predictor=predictor)
    aware = Executor(ops, weights, n_threads=2)
    aware.sparsify(thresholds(packed, VALUE), cache_aware=1.0)
    plain, resident = thresholds(packed, VALUE), Executor(ops, panels, n_threads=2)
    names = [op.weights[0] for op in ops.ops if isinstance(op, Linear)]
    assert len(bank_uses(ops, packed.records)) == len(names)
    differ, some = 0, 0
    for token in PROMPT[:24]:
        first = present_rows(weights.banks, 0, plain[names[0]].importance.size)
        found = aware.forward(np.array([token], np.int32), 0)
        moved = {}
        for use, name in enumerate(names):
            importance = plain[name].importance
            present = present_rows(weights.banks, use, importance.size) if use else first
            some += present.any() and not present.all()
            value = plain[name].value
            moved[name] = Threshold(importance * value / plain[name].least(present, 1.0), value)
        resident.sparsify(moved)
        assert np.array_equal(found, resident.forward(np.array([token], np.int32), 0))
        resident.sparsify(plain)
        differ += not np.array_equal(found, resident.forward(np.array([token], np.int32), 0))
    assert differ > 12
    if share:
        assert some > 100


def decoded(packed, share, cache_aware, *, n_threads=2, **options):
    weights = weights_of(packed, share, **options)
    executor = Executor(op_list(packed.config), weights, n_threads=n_threads)
    executor.sparsify(thresholds(packed, VALUE), cache_aware=cache_aware)
    rows = [executor.forward(PROMPT[:40], 0)]
    rows += [executor.forward(PROMPT[i : i + 1], i) for i in range(40, 60)]
    return np.concatenate(rows), weights.banks


def test_the_same_tokens_in_the_same_memory_give_the_same_bits(folders):  # noqa: F811
    packed = folders[1]
    once, _ = decoded(packed, 0.4, 0.5)
    for n_threads in (1, 3):
        again, _ = decoded(packed, 0.4, 0.5, n_threads=n_threads, reader="pread")
        assert np.array_equal(once, again)
    other, _ = decoded(packed, 0.1, 0.5)
    assert not np.array_equal(once, other)


def test_a_larger_margin_reads_less(folders):  # noqa: F811
    packed = folders[1]
    wanted_bytes = []
    for margin in (0, 0.25, 0.5, 1):
        _, cache = decoded(packed, 0.4, margin, predictor=Predictor.NONE)
        wanted_bytes.append(cache.figures()["wanted_bytes"])
    assert wanted_bytes == sorted(wanted_bytes, reverse=True)
    assert wanted_bytes[-1] < wanted_bytes[0]


def test_a_prompt_and_a_model_in_memory_are_as_without(folders, wanted):  # noqa: F811
    packed = folders[1]
    ops = op_list(packed.config)
    executor = Executor(ops, weights_of(packed, 0.4))
    executor.sparsify(thresholds(packed, VALUE), cache_aware=1.0)
    assert np.array_equal(executor.forward(PROMPT, 0)[0], wanted[VALUE][0])
    whole, _ = decoded(packed, 2, 1.0)
    assert np.array_equal(whole, decoded(packed, 2, 0)[0])
    executor.sparsify(thresholds(packed, VALUE))  # off again
    rows = [executor.forward(PROMPT, 0)]
    rows += [executor.forward(np.array([7 + i], np.int32), PROMPT.size + i) for i in range(4)]
    assert np.array_equal(np.concatenate(rows), wanted[VALUE][:5])


def test_a_margin_out_of_range_is_refused(folders):  # noqa: F811
    packed = folders[1]
    executor = Executor(op_list(packed.config), weights_of(packed, 0.4))
    for margin in (-0.1, 1.1, float("nan")):
        with pytest.raises(ShapeError, match=r"cache_aware: found .*, wanted 0 .* to 1"):
            executor.sparsify({}, cache_aware=margin)


def test_a_margin_without_a_choice_is_refused(panels):  # noqa: F811
    for options in ({}, {"memory": "1G"}, {"sparsity": 0.5}):
        with pytest.raises(UnsupportedError, match="without both memory and sparsity, wanted them"):
            elute.load(panels.path, cache_aware=0.5, **options)
    with pytest.raises(UnsupportedError, match="found weights in panel order, wanted channel"):
        elute.load(panels.path, cache_aware=0.5, memory="1G", sparsity=0.5)
