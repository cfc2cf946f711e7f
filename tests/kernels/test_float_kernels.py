"""Every level of the float kernels against numpy in float64; bounds come from the inputs."""

import zlib

import levels
import numpy as np
import pytest
from float_bounds import EXP_ERROR, ROUNDING, assert_within

from elute import _native

ISAS = levels.float_isas()
# Around every vector length (1, 8, 16) and every unrolled run (8, 64, 128).
LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 576]

each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def guarded(values):
    """A copy of `values` inside a larger array, and the array's cells outside it."""
    whole = np.full(values.size + 128, 7.25, np.float32)
    inside = whole[64:-64].reshape(values.shape)
    inside[:] = values
    return inside, lambda: np.concatenate([whole[:64], whole[-64:]])


# ---- norm, rope, element by element


@each_isa
@pytest.mark.parametrize("width", [*LENGTHS, 4097])
def test_rms_norm_is_within_its_bound(isa, width, rng):
    x = rng.normal(size=(3, width)).astype(np.float32) * np.array([[1], [1e-3], [300]], np.float32)
    w = rng.normal(size=width).astype(np.float32)
    y = levels.float_kernels(isa).rms_norm(x, w, 1e-5)
    wide = x.astype(np.float64)
    want = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + np.float32(1e-5)) * w
    assert_within(y, want, (width / 8 + 16) * ROUNDING * np.abs(want))


@each_isa
@pytest.mark.parametrize("width", [*LENGTHS, 4097])
def test_dot_is_within_its_bound(isa, width, rng):
    x = rng.normal(size=(2, width)).astype(np.float32) * np.array([[1], [300]], np.float32)
    w = rng.normal(size=(3, width)).astype(np.float32)
    y = levels.float_kernels(isa).dot(x, w)
    wide = x.astype(np.float64)[:, None] * w.astype(np.float64)
    assert_within(y, wide.sum(axis=-1), (width / 8 + 6) * ROUNDING * np.abs(wide).sum(axis=-1))


@each_isa
@pytest.mark.parametrize("width", [2, 6, 16, 30, 32, 34, 64, 66, 80, 128])
def test_rope_rounds_each_operation_once(isa, width, rng):
    x = rng.normal(size=(3, width)).astype(np.float32)
    cos, sin = rng.uniform(-1, 1, size=(2, width // 2)).astype(np.float32)
    first, second = x[:, : width // 2], x[:, width // 2 :]
    want = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    got, outside = guarded(x)
    levels.float_kernels(isa).rope(got, cos, sin)
    np.testing.assert_array_equal(got, want)
    assert np.all(outside() == 7.25)


@each_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_add_and_scale_round_once_and_stay_inside(isa, n, rng):
    kernels = levels.float_kernels(isa)
    x, y = rng.normal(size=(2, n)).astype(np.float32)
    got, outside = guarded(y)
    kernels.add(x, got)
    np.testing.assert_array_equal(got, y + x)
    kernels.scale(got, 0.3)
    np.testing.assert_array_equal(got, (y + x) * np.float32(0.3))
    assert np.all(outside() == 7.25)


def activation_inputs(n, rng):
    x = rng.normal(size=n) * np.exp(rng.uniform(-8, 5, size=n))
    return x.astype(np.float32), rng.normal(size=n).astype(np.float32)


def sigmoid(z):
    return np.where(z >= 0, 1, np.exp(-np.abs(z))) / (1 + np.exp(-np.abs(z)))


# Where e^x has left the normal floats the kernels give 0 for it: an error of e^-87 times the
# argument and `up`.
LEAST = 200 * np.exp(-87.0)


@each_isa
@pytest.mark.parametrize("n", [*LENGTHS, 5000])
def test_silu_gate_is_within_its_bound(isa, n, rng):
    x, up = activation_inputs(n, rng)
    want = x.astype(np.float64) * sigmoid(x.astype(np.float64)) * up
    bound = (2 * EXP_ERROR + 6 * ROUNDING) * np.abs(want) + LEAST * np.abs(up)
    assert_within(levels.float_kernels(isa).gate(x, up, "silu"), want, bound)


@each_isa
@pytest.mark.parametrize("n", [*LENGTHS, 5000])
def test_gelu_gate_is_within_its_bound(isa, n, rng):
    x, up = activation_inputs(n, rng)
    wide = x.astype(np.float64)
    z = 2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    want = wide * sigmoid(z) * up
    # z carries 5 roundings, which the exponential turns into 5 |z| of its result; beyond 90 it is
    # 0.
    relative = 2 * EXP_ERROR + (6 + 5 * np.minimum(np.abs(z), 90)) * ROUNDING
    bound = relative * np.abs(want) + LEAST * np.abs(up)
    assert_within(levels.float_kernels(isa).gate(x, up, "gelu_tanh"), want, bound)


@each_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_relu2_gate_rounds_each_operation_once(isa, n, rng):
    x, up = activation_inputs(n, rng)
    positive = np.maximum(x, 0)
    got = levels.float_kernels(isa).gate(x, up, "relu2")
    np.testing.assert_array_equal(got, positive * positive * up)


@each_isa
@pytest.mark.parametrize("n", [*LENGTHS, 5000])
def test_softcap_is_within_its_bound_also_near_zero(isa, n, rng):
    x = (rng.normal(size=n) * np.exp(rng.uniform(-12, 8, size=n))).astype(np.float32)
    want = 30 * np.tanh(x.astype(np.float64) / 30)
    got, outside = guarded(x)
    levels.float_kernels(isa).softcap(got, 30.0)
    assert_within(got, want, 4 * ROUNDING * np.abs(want))
    assert np.all(outside() == 7.25)


@each_isa
def test_activations_of_extreme_values(isa):
    kernels = levels.float_kernels(isa)
    big = np.array([88, 89, 104, 200, 1e4, 1e20, 3e38, np.inf], np.float32)
    one = np.ones_like(big)
    for name in ("silu", "gelu_tanh"):
        np.testing.assert_array_equal(kernels.gate(big, one, name), big)
        low = kernels.gate(-big, one, name)
        assert np.all(low <= 0)
        assert np.all(np.abs(low) < 1e-35), low
    np.testing.assert_array_equal(kernels.gate(-big, one, "relu2"), 0 * one)
    capped = np.concatenate([big, -big])
    kernels.softcap(capped, 2.0)
    np.testing.assert_array_equal(capped, np.concatenate([2 * one, -2 * one]))
    zero = np.zeros(3, np.float32)
    kernels.softcap(zero, 2.0)
    np.testing.assert_array_equal(zero, 0)


@each_isa
def test_nan_stays_nan(isa):
    kernels = levels.float_kernels(isa)
    nan = np.full(9, np.nan, np.float32)
    for name in ("silu", "gelu_tanh", "relu2"):
        assert np.isnan(kernels.gate(nan, np.ones_like(nan), name)).all()
    kernels.softcap(nan, 2.0)
    assert np.isnan(nan).all()
    assert np.isnan(kernels.rms_norm(nan[None], np.ones_like(nan), 1e-5)).all()


@each_isa
def test_a_value_does_not_depend_on_its_place_in_a_run(isa, rng):
    kernels = levels.float_kernels(isa)
    x, up = activation_inputs(100, rng)
    for name in ("silu", "gelu_tanh"):
        whole = kernels.gate(x, up, name)
        for begin, end in [(0, 1), (1, 8), (3, 50), (50, 100), (99, 100)]:
            part = kernels.gate(x[begin:end].copy(), up[begin:end].copy(), name)
            np.testing.assert_array_equal(part, whole[begin:end])


# ---- f16


@each_isa
def test_from_f16_agrees_with_numpy_on_every_half(isa):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(
        levels.float_kernels(isa).from_f16(halves), halves.astype(np.float32)
    )


@each_isa
@pytest.mark.filterwarnings("ignore:overflow")
def test_to_f16_rounds_to_nearest_even(isa, rng):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = (finite[1:] + finite[:-1]) / 2
    limits = np.array(
        [65519.99, 65520, 65536, 1e30, 2.0**-25, 2.0**-26, np.inf, np.nan, 1e-40], np.float32
    )
    limits = np.concatenate([limits, -limits])
    any_bits = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    x = np.concatenate(
        [halves, ties, np.nextafter(ties, 1e9), np.nextafter(ties, -1e9), limits, any_bits]
    )
    got = levels.float_kernels(isa).to_f16(x)
    np.testing.assert_array_equal(got, x.astype(np.float16))
    number = ~np.isnan(x)
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(x)[number])


@each_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_f16_tails(isa, n, rng):
    kernels = levels.float_kernels(isa)
    x = rng.normal(size=n).astype(np.float32)
    halves = kernels.to_f16(x)
    np.testing.assert_array_equal(halves, x.astype(np.float16))
    np.testing.assert_array_equal(kernels.from_f16(halves), halves.astype(np.float32))


# ---- the boundary


def test_wrong_shapes_are_refused_with_both_shapes():
    kernels = _native.float_kernels(ISAS[0])
    x, w = np.zeros((2, 8), np.float32), np.zeros(7, np.float32)
    with pytest.raises(ValueError, match=r"rms_norm: w: found shape \[7\], wanted \[8\]"):
        kernels.rms_norm(x, w, 1e-5)
    with pytest.raises(ValueError, match=r"rope: found width 7, wanted an even one"):
        kernels.rope(np.zeros((2, 7), np.float32), w, w)
    with pytest.raises(ValueError, match="found activation 'tanh', wanted silu"):
        kernels.gate(w, w, "tanh")
    with pytest.raises(ValueError, match=r"found cap .*, wanted a positive one"):
        kernels.softcap(w, 0.0)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="found 'avx9'"):
        _native.float_kernels("avx9")
