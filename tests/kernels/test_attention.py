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


class F16Cache:
    """A cache and its parts: keys f16 [tiles, D, TILE], values f16 [tiles, TILE, D]."""

    def __init__(self, tiles, width):
        self.bytes = np.empty((tiles, _native.cache_tile_bytes(width)), np.uint8)
        keys, values = np.split(self.bytes.view(np.float16), 2, axis=1)
        self.keys = keys.reshape(tiles, width, TILE)
        self.values = values.reshape(tiles, TILE, width)
        assert np.shares_memory(self.keys, self.bytes)
        # Nobody has written them: NaN, so that a kernel that uses them is seen.
        self.keys[:] = np.nan
        self.values[:] = np.nan


def filled_cache(n_positions, width, rng):
    """-> the cache, its keys and its values f16 [n_positions, D]; what is behind them is NaN."""
    cache = F16Cache(-(-n_positions // TILE), width)
    k, v = rng.normal(size=(2, n_positions, width)).astype(np.float16)
    at = np.arange(n_positions)
    cache.keys[at // TILE, :, at % TILE] = k
    cache.values[at // TILE, at % TILE] = v
    return cache, k, v


@each_isa
@pytest.mark.parametrize("width", [2, 8, 14, 16, 64, 66])
def test_cache_write_touches_one_position(isa, width, rng):
    kernels = levels.float_kernels(isa)
    cache, want = F16Cache(3, width), F16Cache(3, width)
    for position in (0, 63, 64, 130):
        key, value = rng.normal(size=(2, width)).astype(np.float32)
        kernels.cache_write(cache.bytes, key, value, position)
        want.keys[position // TILE, :, position % TILE] = key
        want.values[position // TILE, position % TILE] = value
    np.testing.assert_array_equal(cache.keys, want.keys)
    np.testing.assert_array_equal(cache.values, want.values)


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
            2 * (score_error + EXP_ERROR) + (2 * n_seen + 8 * (n_seen // TILE + 1) + 8) * ROUNDING
        )
        bounds[row] = relative * (p @ np.abs(v[seen]))
    return output, bounds


@each_isa
@pytest.mark.parametrize("n_rows", [1, 3, 7, 21])
@pytest.mark.parametrize("width", [2, 4, 8, 14, 16, 40, 62, 64, 66, 80, 128])
def test_attention_is_within_its_bound(isa, width, n_rows, rng):
    kernels = levels.float_kernels(isa)
    cache, k, v = filled_cache(600, width, rng)
    query = (rng.normal(size=(n_rows, width)) * 2).astype(np.float32)
    positions = np.sort(rng.integers(0, 600, n_rows)).astype(np.int32)
    for window, softcap in [(0, 0.0), (70, 0.0), (0, 3.0)]:
        got = kernels.attention(cache.bytes, query, positions, width**-0.5, window, softcap)
        want, bound = reference_attention(k, v, query, positions, width**-0.5, window, softcap)
        assert_within(got, want, bound)


@each_isa
@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 65, 127, 128, 191])
@pytest.mark.parametrize("window", [0, 1, 2, 63, 64, 65, 128, 1000])
def test_attention_sees_exactly_its_window(isa, window, position, rng):
    # Values are one-hot per key (mod 64), so the output shows which keys took part; unseen cells
    # stay NaN.
    kernels = levels.float_kernels(isa)
    cache = F16Cache(3, TILE)
    first = max(0, position - window + 1) if window else 0
    for seen in range(first, position + 1):
        one_hot = np.zeros(TILE, np.float32)
        one_hot[seen % TILE] = 1
        kernels.cache_write(cache.bytes, np.zeros(TILE, np.float32), one_hot, seen)
    query = rng.normal(size=(1, TILE)).astype(np.float32)
    got = kernels.attention(cache.bytes, query, np.array([position], np.int32), 1.0, window)
    want = np.bincount(np.arange(first, position + 1) % TILE, minlength=TILE) / (
        position + 1 - first
    )
    assert_within(got[0], want, 8 * ROUNDING * want)


BLOCKS = {
    "prefill, heads of a token adjacent": np.repeat(np.arange(110, 131), 3),
    "prefill, tokens of a head adjacent": np.tile(np.arange(110, 131), 3),
    "whole block at one position": np.full(64, 131),
    "in several spans": np.arange(230, 530, 10),
    "far apart": np.array([599, 0, 64, 63, 128, 5, 190, 70, 127, 1]),
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
    cache, _, _ = filled_cache(600, width, rng)
    positions = BLOCKS[name].astype(np.int32)
    query = rng.normal(size=(len(positions), width)).astype(np.float32)
    together = kernels.attention(cache.bytes, query, positions, 0.2, window, softcap)
    for row in range(len(positions)):
        one = slice(row, row + 1)
        alone = kernels.attention(cache.bytes, query[one], positions[one], 0.2, window, softcap)
        assert together[row].tobytes() == alone[0].tobytes(), (
            f"row {row} at position {positions[row]}"
        )


@each_isa
@pytest.mark.parametrize("position", [0, 255, 256, 600, 1023])
@pytest.mark.parametrize(
    ("width", "window", "softcap"), [(64, 0, 0.0), (64, 300, 0.0), (40, 257, 5.0)]
)
def test_attention_by_spans_has_the_same_bits(isa, width, window, softcap, position, rng):
    kernels = levels.float_kernels(isa)
    cache, _, _ = filled_cache(position + 1, width, rng)
    for n_rows in (1, 3, 9):
        query = rng.normal(size=(n_rows, width)).astype(np.float32)
        positions = np.full(n_rows, position, np.int32)
        at_once, by_spans = (
            kernels.attention(cache.bytes, query, positions, 0.2, window, softcap, by_spans=how)
            for how in (False, True)
        )
        assert at_once.tobytes() == by_spans.tobytes()


@each_isa
@pytest.mark.parametrize("n_rows", [3, 12])
def test_attention_ignores_what_comes_later(isa, n_rows, rng):
    # A later token of the same block overflowed f16: only the rows that see it may show it.
    kernels = levels.float_kernels(isa)
    cache, _, _ = filled_cache(140, 64, rng)
    query = rng.normal(size=(n_rows, 64)).astype(np.float32)
    positions = np.arange(100, 100 + n_rows, dtype=np.int32)
    clean = kernels.attention(cache.bytes, query, positions, 0.125)
    last = int(positions[-1])
    cache.values[last // TILE, last % TILE] = np.inf
    cache.keys[last // TILE, :, last % TILE] = np.nan
    got = kernels.attention(cache.bytes, query, positions, 0.125)
    np.testing.assert_array_equal(got[:-1], clean[:-1])
    assert not np.isfinite(got[-1]).any()


@each_isa
@pytest.mark.parametrize("n_rows", [1, 16])
def test_attention_of_one_overwhelming_key_is_its_value(isa, n_rows, rng):
    # Scores 200 apart: every other probability is exactly 0, in earlier and in later tiles.
    kernels = levels.float_kernels(isa)
    cache = F16Cache(3, 64)
    k, v = np.zeros((192, 64), np.float32), rng.normal(size=(192, 64)).astype(np.float32)
    k[100, 0] = 200
    for position in range(192):
        kernels.cache_write(cache.bytes, k[position], v[position], position)
    query = np.zeros((n_rows, 64), np.float32)
    query[:, 0] = 1
    got = kernels.attention(cache.bytes, query, np.full(n_rows, 191, np.int32), 1.0)
    np.testing.assert_array_equal(
        got, np.tile(v[100].astype(np.float16).astype(np.float32), (n_rows, 1))
    )


def test_positions_outside_the_cache_are_refused():
    kernels = _native.float_kernels(ISAS[0])
    cache = F16Cache(1, 8).bytes
    row = np.zeros(8, np.float32)
    for position in (-1, 64):
        with pytest.raises(ValueError, match=f"found {position}, wanted one below 64"):
            kernels.cache_write(cache, row, row, position)
        with pytest.raises(ValueError, match=f"found {position}, wanted one below 64"):
            kernels.attention(cache, row[None], np.array([position], np.int32), 1.0)
    too_many = _native.ATTENTION_ROWS + 1
    with pytest.raises(ValueError, match=f"found {too_many} queries, wanted 1 to {too_many - 1}"):
        kernels.attention(
            cache, np.zeros((too_many, 8), np.float32), np.zeros(too_many, np.int32), 1.0
        )
    with pytest.raises(ValueError, match=r"cache: found shape \[1, 2047\], wanted \[1, 2048\]"):
        kernels.attention(
            np.ascontiguousarray(cache[:, :2047]), row[None], np.zeros(1, np.int32), 1.0
        )
    with pytest.raises(ValueError, match="by_spans wants queries at one position"):
        kernels.attention(
            cache, np.zeros((2, 8), np.float32), np.arange(2, dtype=np.int32), 1.0, by_spans=True
        )
