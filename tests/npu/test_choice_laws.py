"""What is chosen of what was measured, and what is measured of values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import ShapeError
from elute.npu.choices import (
    CHOICES,
    PLAIN,
    SHADOWED,
    Choice,
    choose,
)
from elute.npu.ranges import BINS, Observed, Range

BIN = 1 + 1 / 16  # how much wider a bin's upper edge is than its lower one, at most
F32_MAX = float(np.finfo(np.float32).max)


@st.composite
def effects(draw: st.DrawFn) -> dict[str, dict[Choice, float]]:
    names = [f"site{i}" for i in range(draw(st.integers(0, 12)))]
    one = st.sampled_from([0.0, 1e-5, 1e-3, 0.1]) | st.floats(0, 10)
    return {name: {c: draw(one) for c in CHOICES} for name in names}


@given(of=effects(), shares=st.lists(st.floats(0, 1), min_size=2, max_size=5))
@settings(max_examples=150, deadline=None)
def test_more_pruning_takes_more_shadows_and_puts_none_back(of, shares) -> None:
    before: set[str] = set()
    for share in sorted(shares):
        chosen = choose(of, share)
        assert list(chosen) == list(of)
        without = {name for name, choice in chosen.items() if not choice.shadow}
        assert len(without) == round(share * len(of))
        assert before <= without
        before = without
        gains = {n: min(e[c] for c in PLAIN) - min(e[c] for c in SHADOWED) for n, e in of.items()}
        kept = [gains[n] for n in of if n not in without]
        assert max((gains[n] for n in without), default=-np.inf) <= min(kept, default=np.inf)
        for name, choice in chosen.items():
            assert choice in (PLAIN if name in without else SHADOWED)
            if name in without:
                assert of[name][choice] == min(of[name][c] for c in PLAIN)
    assert choose(of, shares[0]) == choose(dict(of), shares[0])


def test_ties_are_taken_in_the_order_of_the_model() -> None:
    of = {f"site{i}": dict.fromkeys(CHOICES, 0.5) for i in range(8)}
    chosen = choose(of, 0.5)
    assert [name for name, c in chosen.items() if not c.shadow] == [f"site{i}" for i in range(4)]
    assert set(chosen.values()) == {PLAIN[0], SHADOWED[0]}
    assert all(c.shadow for c in choose(of, 0).values())
    assert not any(c.shadow for c in choose(of, 1).values())


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan"), float("inf"), -1])
def test_shares_outside_0_to_1_are_refused(share: float) -> None:
    with pytest.raises(ShapeError, match=f"pruning: found {share}, wanted 0 to 1"):
        choose({}, share)


def test_choices_are_named_for_files() -> None:
    assert [str(c) for c in CHOICES] == ["1", "0.9999", "0.999+shadow", "0.99+shadow"]


def observed(*parts: np.ndarray) -> Range:
    whole = Observed(parts[0].shape[1])
    for part in parts:
        whole.add(part, name="x")
    return whole.range()


values = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, F32_MAX, -F32_MAX, 1.0, 0.9999999]),
)


@given(
    x=st.lists(st.lists(values, min_size=4, max_size=4), min_size=1, max_size=30),
    share=st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.99, 0.999, 0.9999, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_quantiles_are_those_of_numpy_within_a_bin(x: list[list[float]], share: float) -> None:
    whole = np.array(x, np.float32)
    cut = len(whole) // 2
    seen = observed(*(part for part in (whole[:cut], whole[cut:]) if len(part)))
    magnitudes = np.sort(np.abs(whole).ravel()).astype(np.float64)
    n = magnitudes.size
    assert seen.histogram.sum() == n
    assert seen.histogram.shape == (BINS,)
    assert seen.maximum == magnitudes[-1]
    assert np.array_equal(seen.channels, np.abs(whole).max(axis=0))
    bound = seen.quantile(share)
    assert 0 <= bound <= seen.maximum
    assert (magnitudes > bound).sum() <= (1 - share) * n + 1e-9
    # Less than a bin below it, more values are beyond than are allowed.
    beyond = (magnitudes >= bound / BIN * (1 - 1e-6)).sum()
    assert beyond > (1 - share) * n - 1e-9 or bound < 1e-37, (bound, magnitudes)


@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-42, 1e-3, 1.0, 1e30]))
@settings(max_examples=50, deadline=None)
def test_shares_beyond_a_bound_are_those_of_numpy_within_a_bin(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    x = (random.standard_t(2, (50, 8)) * spread).astype(np.float32)
    x = np.nan_to_num(x, posinf=F32_MAX, neginf=-F32_MAX)
    seen = observed(x)
    magnitudes = np.abs(x).astype(np.float64)
    for bound in [0.0, *np.quantile(magnitudes, [0.1, 0.5, 0.9, 0.99]), seen.maximum]:
        got = seen.share_beyond(float(bound))
        assert (magnitudes > bound).mean() - 1e-9 <= got
        if spread > 1e-30:  # the bins of the smallest numbers are wider
            assert got <= (magnitudes >= bound / BIN).mean() + 1e-9
    assert seen.share_beyond(seen.maximum) == 0


def test_zeros_have_bounds_that_scale_to_something() -> None:
    x = np.zeros((5, 3), np.float32)
    seen = observed(x)
    assert (seen.maximum, seen.quantile(0.99), seen.share_beyond(0.0)) == (0, 0, 0)
    assert [c.bound(seen) for c in CHOICES] == [1.0] * 4
    x[0, 1] = -2.0  # one channel of zeros beside another
    seen = observed(x)
    assert seen.channels.tolist() == [0, 2, 0]
    assert seen.share_beyond(0.0) == 1  # zeros share the bin of the smallest numbers
    assert seen.share_beyond(1e-3) == pytest.approx(1 / 15)
    assert Choice(1.0, False).bound(seen) == 2.0
    assert seen.quantile(0.9) < 1e-30  # most values are 0


def test_the_largest_and_the_smallest_numbers_have_a_bin() -> None:
    x = np.array([[F32_MAX, -F32_MAX, 1e-45, -1e-45]], np.float32)
    seen = observed(x)
    assert seen.maximum == F32_MAX
    assert seen.quantile(1.0) == F32_MAX
    assert seen.quantile(0.9) == F32_MAX
    assert seen.quantile(0.5) < 1e-37
    assert seen.share_beyond(1.0) == 0.5
    only = observed(np.full((2, 2), 1e-45, np.float32))
    assert 0 < only.quantile(0.999) == only.maximum


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.ones((4, 3), np.float32)
    x[2, 1] = bad
    with pytest.raises(ShapeError, match=r"found a value that is not finite at ffn\.down, wanted"):
        Observed(3).add(x, name="ffn.down")


def test_a_range_does_not_change_when_more_is_observed() -> None:
    whole = Observed(2)
    whole.add(np.ones((3, 2), np.float32), name="x")
    seen = whole.range()
    whole.add(np.full((3, 2), 5, np.float32), name="x")
    assert (seen.maximum, seen.histogram.sum()) == (1, 6)
