"""Attention and its cache at every level, against numpy in float64; bounds come from the inputs."""

import zlib

import levels
import numpy as np
import pytest
from float_bounds import EXP_ERROR, ROUNDING, assert_within

from elute import _native

ISAS = levels.float_isas()
TILE = 64  # keys that a cache tile holds

each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def empty_cache(tiles, width):
    """Keys and values that nobody has written: NaN, so that a kernel that uses them is seen."""
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
    kernels = levels.float_kernels(isa)
    keys, values = empty_cache(3, width)
    want_keys, want_values = keys.copy(), values.copy()
    for position in (0, 63, 64, 130):
        key, value = rng.normal(size=(2, width)).astype(np.float32)
        kernels.cache_write(keys, values, key, value, position)
        want_keys[position // TILE, :, position % TILE] = key
        want_values[position] = value
    np.testing.assert_array_equal(keys, want_keys)
    np.testing.assert_array_equal(values, want_values)


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
            score_error += 4 * ROUNDING * softcap
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
    kernels = levels.float_kernels(isa)
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
    # Values are one-hot per key (mod 64), so the output shows which keys took part; unseen cells
    # stay NaN.
    kernels = levels.float_kernels(isa)
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
    kernels = levels.float_kernels(isa)
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
    kernels = levels.float_kernels(isa)
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
    # Scores 200 apart: every other probability is exactly 0, in earlier and in later tiles.
    kernels = levels.float_kernels(isa)
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
