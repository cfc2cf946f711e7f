"""Ternary is a rounded multiple of the mean magnitude."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import FormatError
from elute.quantize import ternary
from elute.types import Affine


@given(
    n=st.integers(1, 9),
    group_size=st.sampled_from([16, 32, 96]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_codes_are_the_nearest_of_three(n: int, group_size: int, seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal((n, 96)).astype(np.float32)
    quantized = ternary.quantize(w, group_size=group_size)
    assert (quantized.affine, quantized.zero, quantized.bits) == (Affine.SYMMETRIC, 1, 2)
    means = np.abs(w).reshape(n, -1, group_size).mean(axis=-1)
    assert np.abs(quantized.scales.T - means).max() <= 2**-11 * means.max()
    scale = np.repeat(quantized.scales.astype(np.float32).T, group_size, axis=1)
    levels = scale[..., None] * np.float32([-1, 0, 1])
    nearest = np.abs(levels - w[..., None]).min(axis=-1)
    assert np.abs(np.abs(quantized.dequantize() - w) - nearest).max() <= 1e-6


def test_weights_of_one_magnitude_are_exact() -> None:
    w = np.where(
        np.random.default_rng(0).random((5, 64)) < 0.5, np.float32(0.75), np.float32(-0.75)
    )
    assert np.array_equal(ternary.quantize(w, group_size=64).dequantize(), w)


def test_zeros_stay_zero() -> None:
    quantized = ternary.quantize(np.zeros((2, 32), np.float32), group_size=32)
    assert np.array_equal(quantized.codes, np.ones((2, 32)))
    assert not quantized.dequantize().any()


def test_weights_that_are_not_finite_are_named() -> None:
    w = np.zeros((2, 32), np.float32)
    w[1, 3] = np.nan
    with pytest.raises(FormatError, match=r"blk: weight \[1, 3\] is nan"):
        ternary.quantize(w, group_size=32, where="blk")


def test_a_scale_beyond_f16_is_refused() -> None:
    with pytest.raises(FormatError, match="the scale of row 0, group 0 is beyond 65504"):
        ternary.quantize(np.full((2, 32), 1e6, np.float32), group_size=32)
