"""Round-to-nearest keeps its bound, is exact where it can be, and names what it refuses."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import FormatError, ShapeError
from elute.quantize import groups, rtn
from elute.types import F32, Affine, QuantizedMatrix


def bound(quantized: QuantizedMatrix) -> F32:
    """The docstring's, per weight [N, K]."""
    scale = np.abs(quantized.scales.astype(np.float32))
    step = scale / 2 + 2**-11 * 2**quantized.bits * scale + 2**-24
    if quantized.offsets is not None:
        step += 2**-11 * np.abs(quantized.offsets.astype(np.float32))
    return np.repeat(step.T, quantized.group_size, axis=1)


def check_bound(w: F32, quantized: QuantizedMatrix) -> None:
    error, limit = np.abs(quantized.dequantize() - w), bound(quantized)
    # f32 arithmetic of dequantize itself: three roundings of values below |w| + error
    limit = limit + 3 * 2**-24 * (np.abs(w) + error)
    worst = np.unravel_index(np.argmax(error - limit), w.shape)
    assert error[worst] <= limit[worst], (worst, w[worst], error[worst], limit[worst])


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([16, 32, 64]),
    exponent=st.integers(-9, 1),
    shift=st.sampled_from([0.0, 0.5, -3.0, 100.0]),
    outlier=st.sampled_from([1.0, 30.0, -30.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_quantize_keeps_its_bound(
    bits: int,
    symmetric: bool,
    group_size: int,
    exponent: int,
    shift: float,
    outlier: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((5, 128)) + shift
    w[:, 7] *= outlier
    w = (w * 10.0**exponent).astype(np.float32)
    quantized = rtn.quantize(w, bits=bits, group_size=group_size, symmetric=symmetric)
    assert int(quantized.codes.max()) < 1 << bits
    assert quantized.affine is (Affine.SYMMETRIC if symmetric else Affine.MIN)
    check_bound(w, quantized)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_on_a_grid_are_exact(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (9, 64))
    codes[:, ::32], codes[:, 1::32] = 0, (1 << bits) - 1  # both ends in every group of 32
    zero = 1 << (bits - 1) if symmetric else 3
    scale = rng.uniform(0.01, 2, (9, 1)).astype(np.float16).astype(np.float32)
    w = (codes - zero) * scale
    if not symmetric:
        w = codes * scale + np.float32(0.25)
    quantized = rtn.quantize(w, bits=bits, group_size=32, symmetric=symmetric)
    assert np.array_equal(quantized.dequantize(), w)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_bit_is_the_sign_times_the_mean_magnitude(symmetric: bool) -> None:
    w = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32) + 0.5
    quantized = rtn.quantize(w, bits=1, group_size=32, symmetric=symmetric)
    x = w.reshape(4, 2, 32)
    center = np.zeros((4, 2, 1)) if symmetric else x.mean(axis=-1, keepdims=True)
    magnitude = np.abs(x - center).mean(axis=-1, keepdims=True)
    want = (center + np.where(x >= center, magnitude, -magnitude)).reshape(4, 64)
    assert quantized.affine is Affine.MIN
    assert np.abs(quantized.dequantize() - want).max() <= 2**-11 * 3 * np.abs(want).max()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.5, -1.25])
def test_equal_weights_are_exact(bits: int, symmetric: bool, value: float) -> None:
    w = np.full((3, 32), value, np.float32)
    quantized = rtn.quantize(w, bits=bits, group_size=16, symmetric=symmetric)
    got = quantized.dequantize()
    if symmetric and bits > 1:  # a scale of value / 2**(bits-1), exact in f16
        assert np.array_equal(got, w)
    else:
        assert np.array_equal(got, w), got[0, 0]


def test_tiny_weights_are_not_flushed_to_zero() -> None:
    w = np.linspace(-3e-7, 3e-7, 32, dtype=np.float32)[None]
    quantized = rtn.quantize(w, bits=4, group_size=32, symmetric=True)
    assert np.all(quantized.scales != 0)
    check_bound(w, quantized)


def test_smaller_groups_and_more_bits_do_not_raise_the_error() -> None:
    w = np.random.default_rng(2).standard_normal((32, 256)).astype(np.float32)
    errors = [
        [
            float(
                (
                    (rtn.quantize(w, bits=b, group_size=g, symmetric=False).dequantize() - w) ** 2
                ).sum()
            )
            for g in (256, 128, 64, 32)
        ]
        for b in range(1, 9)
    ]
    assert (np.diff(errors, axis=0) < 0).all()
    assert (np.diff(errors, axis=1) < 0).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights_quantize_like_their_f32_values(dtype: type) -> None:
    w = np.random.default_rng(3).standard_normal((6, 64)).astype(dtype)
    half = rtn.quantize(w, bits=4, group_size=32, symmetric=False)
    full = rtn.quantize(w.astype(np.float32), bits=4, group_size=32, symmetric=False)
    assert np.array_equal(half.codes, full.codes)
    assert np.array_equal(half.scales, full.scales)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(4).standard_normal((37, 64)).astype(np.float32)
    whole = rtn.quantize(w, bits=3, group_size=16, symmetric=False)
    monkeypatch.setattr(groups, "_CHUNK_WEIGHTS", 5 * 64)
    parts = rtn.quantize(w, bits=3, group_size=16, symmetric=False)
    assert np.array_equal(whole.codes, parts.codes)
    assert np.array_equal(whole.scales, parts.scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    w = np.zeros((8, 32), np.float32)
    w[5, 17] = bad
    with pytest.raises(FormatError, match=rf"blk.q: weight \[105, 17\] is {bad}, wanted a finite"):
        rtn.quantize(w, bits=4, group_size=16, symmetric=True, where="blk.q", first_row=100)


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "says"),
    [
        (-6e4, 1e6, False, "blk.q: the scale of row 3, group 1"),
        (-1e5, -9.9e4, False, "blk.q: the offset of row 3, group 1"),
        (-1e7, 1e7, True, "blk.q: the scale of row 3, group 1"),
    ],
)
def test_weights_beyond_f16_are_refused(
    low: float, high: float, symmetric: bool, says: str
) -> None:
    w = np.zeros((4, 32), np.float32)
    w[3, 16:] = np.linspace(low, high, 16)
    with pytest.raises(FormatError, match=says):
        rtn.quantize(w, bits=4, group_size=16, symmetric=symmetric, where="blk.q")


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "says"),
    [
        ((4, 32), 0, 16, "bits=0, wanted 1 to 8"),
        ((4, 32), 9, 16, "bits=9, wanted 1 to 8"),
        ((4, 32), 4, 24, "K=32 is not a multiple of group_size=24"),
        ((4, 32), 4, 0, "not a multiple of group_size=0"),
        ((32,), 4, 16, "wanted two dimensions"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    shape: tuple[int, ...], bits: int, group_size: int, says: str
) -> None:
    with pytest.raises(ShapeError, match=says):
        rtn.quantize(np.zeros(shape, np.float32), bits=bits, group_size=group_size, symmetric=True)
