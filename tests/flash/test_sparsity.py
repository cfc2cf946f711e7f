"""Thresholds and how they are spread: the dial is met, equal error a byte, nothing beyond it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import ShapeError
from elute.flash.sparsity import (
    BINS,
    MAX_SPARSITY,
    Scores,
    kind,
    thresholds,
    with_sensitivities,
)


def histogram(values):
    found = np.zeros(BINS, np.int64)
    np.add.at(found, np.abs(np.asarray(values, np.float32)).view(np.uint32) >> 19, 1)
    return found


def scores(values, *, outputs=10, channels=8, sensitivity=1.0):
    return Scores(np.ones(channels, np.float32), histogram(values), outputs, sensitivity)


VALUES = np.random.default_rng(3).normal(0, 2, 20000).astype(np.float32)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_threshold_leaves_out_the_share_of_the_values_seen(share):
    entry = scores(VALUES)
    threshold = entry.threshold(share)
    assert abs(entry.sparsity(threshold) - share) < 1e-6
    assert abs((np.abs(VALUES) < threshold).mean() - share) < 0.005


def test_left_out_is_the_energy_below_the_threshold():
    entry = scores(VALUES, channels=16)
    for share in (0.2, 0.5, 0.8):
        threshold = entry.threshold(share)
        magnitudes = np.abs(VALUES)
        want = 16 * (magnitudes[magnitudes < threshold] ** 2).sum() / VALUES.size
        assert math.isclose(entry.left_out(threshold), want, rel_tol=0.02)


def test_exact_zeros_and_infinities_are_counted_but_never_a_threshold():
    entry = scores([0.0] * 60 + [1.0] * 30 + [np.inf] * 10)
    assert 0 < entry.threshold(0.5) <= 1e-30  # zeros are below any threshold but 0
    assert math.isfinite(entry.threshold(0.99))


@given(
    st.lists(
        st.tuples(
            st.floats(0.01, 100),  # spread of the scores
            st.integers(1, 5000),  # outputs
            st.integers(1, 4000),  # channels
            st.floats(1e-8, 1e4),  # sensitivity
        ),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.01, MAX_SPARSITY),
)
@settings(max_examples=60, deadline=None)
def test_the_dial_is_met_whatever_the_inputs(inputs, sparsity):
    found = {
        f"layers.{i}.x": scores(VALUES * spread, outputs=n, channels=k, sensitivity=s)
        for i, (spread, n, k, s) in enumerate(inputs)
    }
    chosen = thresholds(found, sparsity)
    total = sum(entry.weights for entry in found.values())
    reached = sum(found[n].sparsity(t.value) * found[n].weights for n, t in chosen.items()) / total
    assert abs(reached - sparsity) < 1e-3


def test_the_last_byte_saved_costs_the_same_everywhere():
    found = {
        "a": scores(VALUES, outputs=100, sensitivity=2.0),
        "b": scores(VALUES, outputs=900, sensitivity=3.0),
    }
    chosen = thresholds(found, 0.4)
    prices = [found[n].sensitivity * t.value**2 / found[n].outputs for n, t in chosen.items()]
    assert math.isclose(*prices, rel_tol=1e-4)


def test_more_sparsity_raises_every_threshold():
    found = {"a": scores(VALUES), "b": scores(VALUES * 3, outputs=40)}
    low, high = thresholds(found, 0.2), thresholds(found, 0.7)
    assert all(low[name].value < high[name].value for name in found)


def test_no_sparsity_is_no_threshold():
    assert thresholds({"a": scores(VALUES)}, 0) == {}


@pytest.mark.parametrize("sparsity", [-0.1, 0.91, math.nan])
def test_a_dial_beyond_its_range_is_refused(sparsity):
    with pytest.raises(ShapeError, match=r"sparsity: found .*, wanted 0 .* to 0\.9"):
        thresholds({"a": scores(VALUES)}, sparsity)


def test_what_was_not_measured_lies_between_its_neighbours():
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(5)]
    found = {name: scores(VALUES) for name in names}
    threshold = found[names[0]].threshold(0.5)
    energy = found[names[0]].left_out(threshold)
    errors = {names[0]: (threshold, energy * 1.0), names[4]: (threshold, energy * 16.0)}
    measured = with_sensitivities(found, errors)
    assert np.allclose([measured[name].sensitivity for name in names], [1, 2, 4, 8, 16])
    assert list(measured) == names


def test_a_kind_of_which_none_was_measured_is_refused():
    found = {"layers.0.a": scores(VALUES), "layers.0.b": scores(VALUES)}
    with pytest.raises(ShapeError, match=r"layers\.0\.b"):
        with_sensitivities(found, {"layers.0.a": (1.0, 1.0)})


def test_kind_is_the_name_without_the_layer():
    assert kind("model.layers.12.mlp.down_proj.weight") == "model.layers.*.mlp.down_proj.weight"
