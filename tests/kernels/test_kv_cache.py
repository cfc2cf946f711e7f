"""The cache's rounding in numpy. That the kernels store the same codes: test_attention.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elute import _native
from elute.errors import ShapeError, UnsupportedError
from elute.kernels.kv_cache import (
    LEAST_PEAK,
    CacheType,
    cache_type,
    position_bytes,
    quantize_q8,
    rounded,
)

TILE = 64
floats = st.floats(-(2.0**100), 2.0**100, width=32)


@given(arrays(np.float32, (3, 6), elements=floats))
def test_q8_is_within_half_a_step_of_each_row(x):
    codes, scales = quantize_q8(x)
    peak = np.abs(x).max(axis=1)
    assert np.abs(codes.astype(int)).max() <= 127
    lost = peak <= LEAST_PEAK
    assert (scales[lost] == 0).all()
    assert (np.abs(codes[~lost].astype(int)).max(axis=1, initial=0) == 127).all()
    bound = np.where(lost, peak, peak / 127 * 0.5001)[:, None]
    assert (np.abs(rounded(x, CacheType.Q8).astype(np.float64) - x) <= bound).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_q8_of_what_is_not_finite_is_nan_in_its_row_alone(bad):
    x = np.ones((2, 4), np.float32)
    x[0, 2] = bad
    got = rounded(x, CacheType.Q8)
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(got[1], x[1])


def test_f16_rounds_as_the_hardware():
    x = np.array([1.0, 1 / 3, 65520.0, 1e-8], np.float32)
    np.testing.assert_array_equal(
        rounded(x, CacheType.F16), np.array([1.0, 0.33325195, np.inf, 0.0], np.float32)
    )


@pytest.mark.parametrize("kind", CacheType)
@pytest.mark.parametrize("width", [2, 14, 64, 80, 128])
def test_positions_take_what_the_native_tiles_take(kind, width):
    tile = _native.cache_tile_bytes(kind, width)
    assert position_bytes(kind, n_kv_heads=3, head_width=width) * TILE == 3 * tile


def test_unknown_types_and_heads_that_do_not_fit_are_refused():
    assert cache_type("q8", head_width=512) is CacheType.Q8
    assert cache_type("f16", head_width=4096) is CacheType.F16
    with pytest.raises(ShapeError, match="cache_type: found 'q4', wanted one of f16, q8"):
        cache_type("q4", head_width=64)
    with pytest.raises(UnsupportedError, match="q8 for heads of width 514, wanted at most 512"):
        cache_type("q8", head_width=514)
