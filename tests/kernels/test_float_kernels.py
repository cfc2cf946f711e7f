"""Every level of the float kernels against numpy in float64; bounds are computed from the inputs."""

import zlib

import numpy as np
import pytest

from elute import _native

ISAS = _native.isas()
ROUNDING = 2.0**-24  # relative error of one f32 operation
EXP_ERROR = 2e-7  # relative error of the kernels' exp
TILE = 64  # keys that a cache tile holds
# Around every vector length (1, 8, 16) and every unrolled run (8, 64, 128).
LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 576]

each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def assert_within(got, want, bound):
    error = np.abs(got.astype(np.float64) - want)
    bound = np.broadcast_to(bound, error.shape)
    excess = np.where(error <= bound, -np.inf, np.where(np.isnan(error), np.inf, error - bound))
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert np.all(error <= bound), (
        f"at {worst}: got {got[worst]!r}, want {want[worst]!r}, bound {bound[worst]:.3g}"
    )


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
    y = _native.float_kernels(isa).rms_norm(x, w, 1e-5)
    wide = x.astype(np.float64)
    want = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + np.float32(1e-5)) * w
    assert_within(y, want, (width / 8 + 16) * ROUNDING * np.abs(want))


@each_isa
@pytest.mark.parametrize("width", [2, 6, 16, 30, 32, 34, 64, 66, 80, 128])
def test_rope_rounds_each_operation_once(isa, width, rng):
    x = rng.normal(size=(3, width)).astype(np.float32)
    cos, sin = rng.uniform(-1, 1, size=(2, width // 2)).astype(np.float32)
    first, second = x[:, : width // 2], x[:, width // 2 :]
    want = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    got, outside = guarded(x)
    _native.float_kernels(isa).rope(got, cos, sin)
    np.testing.assert_array_equal(got, want)
    assert np.all(outside() == 7.25)


@each_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_add_and_scale_round_once_and_stay_inside(isa, n, rng):
    kernels = _native.float_kernels(isa)
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


# Where e^x has left the normal floats the kernels give 0 for it: at most e^-87 times the argument and `up`.
LEAST = 200 * np.exp(-87.0)


@each_isa
@pytest.mark.parametrize("n", [*LENGTHS, 5000])
def test_silu_gate_is_within_its_bound(isa, n, rng):
    x, up = activation_inputs(n, rng)
    want = x.astype(np.float64) * sigmoid(x.astype(np.float64)) * up
    bound = (2 * EXP_ERROR + 6 * ROUNDING) * np.abs(want) + LEAST * np.abs(up)
    assert_within(_native.float_kernels(isa).gate(x, up, "silu"), want, bound)


@each_isa
@pytest.mark.parametrize("n", [*LENGTHS, 5000])
def test_gelu_gate_is_within_its_bound(isa, n, rng):
    x, up = activation_inputs(n, rng)
    wide = x.astype(np.float64)
    z = 2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    want = wide * sigmoid(z) * up
    # z carries 5 roundings, which the exponential turns into 5 |z| of its result; beyond 90 that is 0.
    relative = 2 * EXP_ERROR + (6 + 5 * np.minimum(np.abs(z), 90)) * ROUNDING
    bound = relative * np.abs(want) + LEAST * np.abs(up)
    assert_within(_native.float_kernels(isa).gate(x, up, "gelu_tanh"), want, bound)


@each_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_relu2_gate_rounds_each_operation_once(isa, n, rng):
    x, up = activation_inputs(n, rng)
    positive = np.maximum(x, 0)
    got = _native.float_kernels(isa).gate(x, up, "relu2")
    np.testing.assert_array_equal(got, positive * positive * up)


@each_isa
@pytest.mark.parametrize("n", [*LENGTHS, 5000])
def test_softcap_is_within_its_bound_also_near_zero(isa, n, rng):
    x = (rng.normal(size=n) * np.exp(rng.uniform(-12, 8, size=n))).astype(np.float32)
    want = 30 * np.tanh(x.astype(np.float64) / 30)
    got, outside = guarded(x)
    _native.float_kernels(isa).softcap(got, 30.0)
    assert_within(got, want, 16 * ROUNDING * np.abs(want))
    assert np.all(outside() == 7.25)


@each_isa
def test_activations_of_extreme_values(isa):
    kernels = _native.float_kernels(isa)
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
    kernels = _native.float_kernels(isa)
    nan = np.full(9, np.nan, np.float32)
    for name in ("silu", "gelu_tanh", "relu2"):
        assert np.isnan(kernels.gate(nan, np.ones_like(nan), name)).all()
    kernels.softcap(nan, 2.0)
    assert np.isnan(nan).all()
    assert np.isnan(kernels.rms_norm(nan[None], np.ones_like(nan), 1e-5)).all()


@each_isa
def test_a_value_does_not_depend_on_its_place_in_a_run(isa, rng):
    kernels = _native.float_kernels(isa)
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
        _native.float_kernels(isa).from_f16(halves), halves.astype(np.float32)
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
    got = _native.float_kernels(isa).to_f16(x)
    np.testing.assert_array_equal(got, x.astype(np.float16))
    number = ~np.isnan(x)
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(x)[number])


@each_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_f16_tails(isa, n, rng):
    kernels = _native.float_kernels(isa)
    x = rng.normal(size=n).astype(np.float32)
    halves = kernels.to_f16(x)
    np.testing.assert_array_equal(halves, x.astype(np.float16))
    np.testing.assert_array_equal(kernels.from_f16(halves), halves.astype(np.float32))


# ---- the cache


def empty_cache(tiles, width):
    """Keys and values of a cache nobody has written: NaN, so that a kernel that reads it is seen."""
    keys = np.full((tiles, width, TILE), np.nan, np.float16)
    return keys, np.full((tiles * TILE, width), np.nan, np.float16)


def filled_cache(kernels, n_positions, width, rng, *, spread=1.0):
    keys, values = empty_cache(-(-n_positions // TILE), width)
    k, v = (rng.normal(size=(2, n_positions, width)) * spread).astype(np.float32)
    for position in range(n_positions):
        kernels.cache_write(keys, values, k[position], v[position], position)
    return keys, values, k.astype(np.float16), v.astype(np.float16)


@each_isa
@pytest.mark.parametrize("width", [2, 8, 14, 16, 64, 66])
def test_cache_write_touches_one_position(isa, width, rng):
    kernels = _native.float_kernels(isa)
    keys, values = empty_cache(3, width)
    want_keys, want_values = keys.copy(), values.copy()
    for position in (0, 63, 64, 130):
        key, value = rng.normal(size=(2, width)).astype(np.float32)
        kernels.cache_write(keys, values, key, value, position)
        want_keys[position // TILE, :, position % TILE] = key
        want_values[position] = value
    np.testing.assert_array_equal(keys, want_keys)
    np.testing.assert_array_equal(values, want_values)


# ---- attention


def reference_attention(k, v, query, positions, scale, window, softcap):
    """-> output f64 [M, D], and the bound of the kernels' error from the same inputs."""
    k, v, query = (a.astype(np.float64) for a in (k, v, query))
    output, bounds = np.empty_like(query), np.empty_like(query)
    width = query.shape[1]
    for row, position in enumerate(positions):
        seen = slice(max(0, position - window + 1) if window else 0, position + 1)
        scores = k[seen] @ query[row] * scale
        score_error = (width + 2) * ROUNDING * (np.abs(k[seen]) @ np.abs(query[row])).max() * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
            score_error += 16 * ROUNDING * softcap
        score_error += ROUNDING * (scores.max() - scores.min())
        p = np.exp(scores - scores.max())
        p /= p.sum()
        output[row] = p @ v[seen]
        n_seen = len(scores)
        relative = (
            2 * (score_error + EXP_ERROR) + (2 * n_seen + 4 * (n_seen // TILE + 1) + 8) * ROUNDING
        )
        bounds[row] = relative * (p @ np.abs(v[seen]))
    return output, bounds


@each_isa
@pytest.mark.parametrize("n_rows", [1, 3, 7, 21])
@pytest.mark.parametrize("width", [2, 4, 8, 14, 16, 40, 62, 64, 66, 80, 128])
def test_attention_is_within_its_bound(isa, width, n_rows, rng):
    kernels = _native.float_kernels(isa)
    keys, values, k, v = filled_cache(kernels, 200, width, rng)
    query = (rng.normal(size=(n_rows, width)) * 2).astype(np.float32)
    positions = np.sort(rng.integers(0, 200, n_rows)).astype(np.int32)
    for window, softcap in [(0, 0.0), (70, 0.0), (0, 3.0)]:
        got = kernels.attention(keys, values, query, positions, width**-0.5, window, softcap)
        want, bound = reference_attention(k, v, query, positions, width**-0.5, window, softcap)
        assert_within(got, want, bound)


@each_isa
@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 65, 127, 128, 191])
@pytest.mark.parametrize("window", [0, 1, 2, 63, 64, 65, 128, 1000])
def test_attention_sees_exactly_its_window(isa, window, position, rng):
    # Values are one-hot per key (mod 64), so the output shows which keys took part; unseen cells stay NaN.
    kernels = _native.float_kernels(isa)
    keys, values = empty_cache(3, TILE)
    first = max(0, position - window + 1) if window else 0
    for seen in range(first, position + 1):
        one_hot = np.zeros(TILE, np.float32)
        one_hot[seen % TILE] = 1
        kernels.cache_write(keys, values, np.zeros(TILE, np.float32), one_hot, seen)
    query = rng.normal(size=(1, TILE)).astype(np.float32)
    got = kernels.attention(keys, values, query, np.array([position], np.int32), 1.0, window)
    want = np.bincount(np.arange(first, position + 1) % TILE, minlength=TILE) / (
        position + 1 - first
    )
    assert_within(got[0], want, 8 * ROUNDING * want)


BLOCKS = {
    "prefill, heads of a token adjacent": np.repeat(np.arange(110, 131), 3),
    "prefill, tokens of a head adjacent": np.tile(np.arange(110, 131), 3),
    "whole block at one position": np.full(64, 131),
    "far apart": np.array([199, 0, 64, 63, 128, 5, 190, 70, 127, 1]),
    "two": np.array([3, 199]),
    "six": np.array([130, 131, 132, 133, 134, 135]),
    "eight": np.array([60, 61, 62, 63, 64, 65, 66, 67]),
    "nine": np.array([130, 130, 130, 131, 131, 131, 2, 2, 2]),
}


@each_isa
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("width", "window", "softcap"), [(64, 0, 0.0), (64, 30, 0.0), (40, 100, 5.0), (80, 0, 0.0)]
)
def test_attention_of_a_row_does_not_depend_on_its_block(isa, width, window, softcap, name, rng):
    kernels = _native.float_kernels(isa)
    keys, values, _, _ = filled_cache(kernels, 200, width, rng)
    positions = BLOCKS[name].astype(np.int32)
    query = rng.normal(size=(len(positions), width)).astype(np.float32)
    together = kernels.attention(keys, values, query, positions, 0.2, window, softcap)
    for row in range(len(positions)):
        one = slice(row, row + 1)
        alone = kernels.attention(keys, values, query[one], positions[one], 0.2, window, softcap)
        assert together[row].tobytes() == alone[0].tobytes(), (
            f"row {row} at position {positions[row]}"
        )


@each_isa
@pytest.mark.parametrize("n_rows", [3, 12])
def test_attention_ignores_what_comes_later(isa, n_rows, rng):
    # A later token of the same block overflowed f16: only the rows that see it may show it.
    kernels = _native.float_kernels(isa)
    keys, values, _, _ = filled_cache(kernels, 140, 64, rng)
    query = rng.normal(size=(n_rows, 64)).astype(np.float32)
    positions = np.arange(100, 100 + n_rows, dtype=np.int32)
    clean = kernels.attention(keys, values, query, positions, 0.125)
    last = int(positions[-1])
    values[last] = np.inf
    keys[last // TILE, :, last % TILE] = np.nan
    got = kernels.attention(keys, values, query, positions, 0.125)
    np.testing.assert_array_equal(got[:-1], clean[:-1])
    assert not np.isfinite(got[-1]).any()


@each_isa
@pytest.mark.parametrize("n_rows", [1, 16])
def test_attention_of_one_overwhelming_key_is_its_value(isa, n_rows, rng):
    # Scores 200 apart: every other probability underflows to exactly 0, in earlier and in later tiles.
    kernels = _native.float_kernels(isa)
    keys, values = empty_cache(3, 64)
    k, v = np.zeros((192, 64), np.float32), rng.normal(size=(192, 64)).astype(np.float32)
    k[100, 0] = 200
    for position in range(192):
        kernels.cache_write(keys, values, k[position], v[position], position)
    query = np.zeros((n_rows, 64), np.float32)
    query[:, 0] = 1
    got = kernels.attention(keys, values, query, np.full(n_rows, 191, np.int32), 1.0)
    np.testing.assert_array_equal(
        got, np.tile(v[100].astype(np.float16).astype(np.float32), (n_rows, 1))
    )


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


def test_positions_outside_the_cache_are_refused():
    kernels = _native.float_kernels(ISAS[0])
    keys, values = empty_cache(1, 8)
    row = np.zeros(8, np.float32)
    for position in (-1, 64):
        with pytest.raises(ValueError, match=f"found {position}, wanted one below 64"):
            kernels.cache_write(keys, values, row, row, position)
        with pytest.raises(ValueError, match=f"found {position}, wanted one below 64"):
            kernels.attention(keys, values, row[None], np.array([position], np.int32), 1.0)
    with pytest.raises(ValueError, match="found 65 queries, wanted 1 to 64"):
        kernels.attention(keys, values, np.zeros((65, 8), np.float32), np.zeros(65, np.int32), 1.0)
    with pytest.raises(ValueError, match=r"values: found shape \[63, 8\], wanted \[64, 8\]"):
        kernels.attention(keys, values[:63], row[None], np.zeros(1, np.int32), 1.0)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="found 'avx9'"):
        _native.float_kernels("avx9")
