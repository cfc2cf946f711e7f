"""Attention and its cache at every level, against numpy in float64; bounds come from the inputs."""

import zlib

import levels
import numpy as np
import pytest
from float_bounds import EXP_ERROR, ROUNDING, assert_within

from elute import _native
from elute.kernels.kv_cache import CacheType, quantize_q8, rounded

ISAS = levels.float_isas()
TILE = 64  # keys that a cache tile holds

each_isa = pytest.mark.parametrize("isa", ISAS)
each_kind = pytest.mark.parametrize("kind", CacheType)


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


class Cache:
    """A cache that nobody has written: f16 NaNs, or codes under scales of NaN, so that a kernel
    that uses them is seen. The layout is that of csrc/kernels/attention.h, written again."""

    def __init__(self, kind, tiles, width):
        self.kind, self.width = kind, width
        self.bytes = np.full((tiles, _native.cache_tile_bytes(kind, width)), 0xFF, np.uint8)

    def store(self, at, k, v):
        """k, v f32 [n, D] at positions at [n]"""
        tile, place = np.asarray(at) // TILE, np.asarray(at) % TILE
        if self.kind is CacheType.F16:
            keys, values = self.split(2 * TILE * self.width, 2 * TILE * self.width)
            keys.view(np.float16).reshape(-1, self.width, TILE)[tile, :, place] = k
            values.view(np.float16).reshape(-1, TILE, self.width)[tile, place] = v
            return
        padded = -(-self.width // 16) * 16
        keys, key_scales, values, value_scales = self.split(
            TILE * self.width, 4 * TILE, TILE * padded, 4 * TILE
        )
        pairs = keys.view(np.int8).reshape(-1, self.width // 2, TILE, 2)
        codes, scales = quantize_q8(k)
        pairs[tile, :, place] = codes.reshape(-1, self.width // 2, 2)
        key_scales.view(np.float32)[tile, place] = scales[:, 0]
        pairs = values.view(np.int8).reshape(-1, TILE // 2, padded, 2)
        codes, scales = quantize_q8(v)
        pairs[tile, place // 2, : self.width, place % 2] = codes
        value_scales.view(np.float32)[tile, place] = scales[:, 0]

    def split(self, *sizes):
        assert sum(sizes) == self.bytes.shape[1]
        return np.split(self.bytes, np.cumsum(sizes)[:-1], axis=1)

    def write(self, kernels, key, value, position):
        kernels.cache_write(self.bytes, key, value, position, self.kind)

    def attend(self, kernels, query, positions, scale, window=0, softcap=0.0, **how):
        positions = np.asarray(positions, np.int32)
        return kernels.attention(
            self.bytes, query, positions, scale, window, softcap, **how, cache_type=self.kind
        )


def filled_cache(kind, n_positions, width, rng):
    """-> the cache, the keys and the values f32 [n_positions, D] that it holds"""
    cache = Cache(kind, -(-n_positions // TILE), width)
    k, v = rng.normal(size=(2, n_positions, width)).astype(np.float32)
    cache.store(np.arange(n_positions), k, v)
    return cache, rounded(k, kind), rounded(v, kind)


@each_isa
@each_kind
@pytest.mark.parametrize("width", [2, 8, 14, 16, 64, 66, 256])
def test_cache_write_touches_one_position(isa, kind, width, rng):
    kernels = levels.float_kernels(isa)
    cache, want = Cache(kind, 3, width), Cache(kind, 3, width)
    for position, size in ((0, 1), (63, 1e-3), (64, 100), (130, 1e-20)):
        key, value = rng.normal(size=(2, width)).astype(np.float32) * np.float32(size)
        cache.write(kernels, key, value, position)
        want.store([position], key[None], value[None])
        np.testing.assert_array_equal(cache.bytes, want.bytes)


@each_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 7, 12])
def test_q8_keeps_what_is_not_finite_and_drops_what_is_next_to_nothing(isa, bad, channel, rng):
    kernels = levels.float_kernels(isa)
    cache = Cache(CacheType.Q8, 1, 14)
    tiny = np.full(14, 1e-31, np.float32)
    cache.write(kernels, tiny, tiny, 0)
    query = np.ones((1, 14), np.float32)
    np.testing.assert_array_equal(cache.attend(kernels, query, [0], 1.0), np.zeros((1, 14)))
    key = rng.normal(size=14).astype(np.float32)
    broken = key.copy()
    broken[channel] = bad
    for wrong in ((key, broken), (broken, key)):
        cache.write(kernels, *wrong, 1)
        assert np.isnan(cache.attend(kernels, query, [1], 1.0)).all()
        assert np.isfinite(cache.attend(kernels, query, [0], 1.0)).all()
    cache.write(kernels, key, key, 1)
    assert np.isnan(cache.attend(kernels, broken[None], [1], 1.0)).all()


def reference_attention(kind, k, v, query, positions, scale, window, softcap):
    """-> output f64 [M, D], and the bound of the kernels' error from the same inputs."""
    k, v, query = (a.astype(np.float64) for a in (k, v, query))
    output, bounds = np.empty_like(query), np.empty_like(query)
    width = query.shape[1]
    for row, position in enumerate(positions):
        first = max(0, position - window + 1) if window else 0
        seen = slice(first, position + 1)
        scores = k[seen] @ query[row] * scale
        score_error = (width + 2) * ROUNDING * (np.abs(k[seen]) @ np.abs(query[row])).max() * scale
        if kind is CacheType.Q8:  # the query has 15 bits
            step = np.abs(query[row]).max() / 32767
            score_error += step / 2 * np.abs(k[seen]).sum(axis=1).max() * scale
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
        if kind is CacheType.Q8:
            bounds[row] += (1 + 2 * score_error) * weight_error(p, v[seen], first)
    return output, bounds


def weight_error(p, v, first):
    """-> f64 [D]: probabilities times scales have 15 bits of their largest in a tile."""
    scales = np.abs(v).max(axis=1) / 127
    weights = p * scales
    codes = np.abs(v) / scales[:, None]
    tile = (first + np.arange(len(p))) // TILE
    steps = {t: weights[tile == t].max() / 32767 for t in np.unique(tile)}
    return np.array([steps[t] / 2 for t in tile]) @ codes


@each_isa
@each_kind
@pytest.mark.parametrize("n_rows", [1, 3, 7, 21])
@pytest.mark.parametrize("width", [2, 4, 8, 14, 16, 40, 62, 64, 66, 80, 128])
def test_attention_is_within_its_bound(isa, kind, width, n_rows, rng):
    kernels = levels.float_kernels(isa)
    cache, k, v = filled_cache(kind, 600, width, rng)
    query = (rng.normal(size=(n_rows, width)) * 2).astype(np.float32)
    positions = np.sort(rng.integers(0, 600, n_rows))
    for window, softcap in [(0, 0.0), (70, 0.0), (0, 3.0)]:
        got = cache.attend(kernels, query, positions, width**-0.5, window, softcap)
        want, bound = reference_attention(
            kind, k, v, query, positions, width**-0.5, window, softcap
        )
        assert_within(got, want, bound)


@each_isa
def test_q8_sums_of_the_widest_head_fit(isa):
    # Every product has the largest size and one sign: 512 * 32767 * 127.
    kernels = levels.float_kernels(isa)
    cache = Cache(CacheType.Q8, 1, 512)
    ones = np.ones((TILE, 512), np.float32)
    ones[1:] *= -1  # keys that all others are far below
    cache.store(np.arange(TILE), ones, ones)
    got = cache.attend(kernels, ones[:1], [TILE - 1], 0.1)
    np.testing.assert_allclose(got, 1, rtol=8 * ROUNDING)


@each_isa
@each_kind
@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 65, 127, 128, 191])
@pytest.mark.parametrize("window", [0, 1, 2, 63, 64, 65, 128, 1000])
def test_attention_sees_exactly_its_window(isa, kind, window, position, rng):
    # Values are one-hot per key (mod 64), so the output shows which keys took part; unseen cells
    # stay NaN.
    kernels = levels.float_kernels(isa)
    cache = Cache(kind, 3, TILE)
    first = max(0, position - window + 1) if window else 0
    seen = np.arange(first, position + 1)
    one_hot = np.eye(TILE, dtype=np.float32)[seen % TILE]
    cache.store(seen, np.zeros_like(one_hot), one_hot)
    query = rng.normal(size=(1, TILE)).astype(np.float32)
    got = cache.attend(kernels, query, [position], 1.0, window)
    want = np.bincount(seen % TILE, minlength=TILE) / len(seen)
    assert_within(got[0], want, 16 * ROUNDING * want)


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
@each_kind
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("width", "window", "softcap"), [(64, 0, 0.0), (64, 30, 0.0), (40, 100, 5.0), (80, 0, 0.0)]
)
def test_attention_of_a_row_does_not_depend_on_its_block(
    isa, kind, width, window, softcap, name, rng
):
    kernels = levels.float_kernels(isa)
    cache, _, _ = filled_cache(kind, 600, width, rng)
    positions = BLOCKS[name].astype(np.int32)
    query = rng.normal(size=(len(positions), width)).astype(np.float32)
    together = cache.attend(kernels, query, positions, 0.2, window, softcap)
    for row in range(len(positions)):
        one = slice(row, row + 1)
        alone = cache.attend(kernels, query[one], positions[one], 0.2, window, softcap)
        assert together[row].tobytes() == alone[0].tobytes(), (
            f"row {row} at position {positions[row]}"
        )


@each_isa
@each_kind
@pytest.mark.parametrize("position", [0, 255, 256, 600, 1023])
@pytest.mark.parametrize(
    ("width", "window", "softcap"), [(64, 0, 0.0), (64, 300, 0.0), (40, 257, 5.0)]
)
def test_attention_by_spans_has_the_same_bits(isa, kind, width, window, softcap, position, rng):
    kernels = levels.float_kernels(isa)
    cache, _, _ = filled_cache(kind, position + 1, width, rng)
    for n_rows in (1, 3, 9):
        query = rng.normal(size=(n_rows, width)).astype(np.float32)
        positions = np.full(n_rows, position, np.int32)
        at_once, by_spans = (
            cache.attend(kernels, query, positions, 0.2, window, softcap, by_spans=how)
            for how in (False, True)
        )
        assert at_once.tobytes() == by_spans.tobytes()


@each_isa
@each_kind
@pytest.mark.parametrize("n_rows", [3, 12])
def test_attention_ignores_what_comes_later(isa, kind, n_rows, rng):
    # A later token of the same block overflowed f16: only the rows that see it may show it.
    kernels = levels.float_kernels(isa)
    cache, _, _ = filled_cache(kind, 140, 64, rng)
    query = rng.normal(size=(n_rows, 64)).astype(np.float32)
    positions = np.arange(100, 100 + n_rows, dtype=np.int32)
    clean = cache.attend(kernels, query, positions, 0.125)
    last = int(positions[-1])
    cache.store([last], np.full((1, 64), np.nan), np.full((1, 64), np.inf))
    got = cache.attend(kernels, query, positions, 0.125)
    np.testing.assert_array_equal(got[:-1], clean[:-1])
    assert not np.isfinite(got[-1]).any()


@each_isa
@each_kind
@pytest.mark.parametrize("n_rows", [1, 16])
def test_attention_of_one_overwhelming_key_is_its_value(isa, kind, n_rows, rng):
    # Scores 200 apart: every other probability is exactly 0, in earlier and in later tiles.
    kernels = levels.float_kernels(isa)
    cache = Cache(kind, 3, 64)
    k, v = np.zeros((192, 64), np.float32), rng.normal(size=(192, 64)).astype(np.float32)
    k[100, 0] = 200
    cache.store(np.arange(192), k, v)
    query = np.zeros((n_rows, 64), np.float32)
    query[:, 0] = 1
    got = cache.attend(kernels, query, np.full(n_rows, 191), 1.0)
    want = np.tile(rounded(v[100], kind), (n_rows, 1))
    if kind is CacheType.F16:
        np.testing.assert_array_equal(got, want)
    assert_within(got, want, 4 * ROUNDING * np.abs(want))


def test_positions_outside_the_cache_are_refused():
    kernels = _native.float_kernels(ISAS[0])
    cache = Cache(CacheType.F16, 1, 8)
    row = np.zeros(8, np.float32)
    for position in (-1, 64):
        with pytest.raises(ValueError, match=f"found {position}, wanted one below 64"):
            cache.write(kernels, row, row, position)
        with pytest.raises(ValueError, match=f"found {position}, wanted one below 64"):
            cache.attend(kernels, row[None], [position], 1.0)
    too_many = _native.ATTENTION_ROWS + 1
    with pytest.raises(ValueError, match=f"found {too_many} queries, wanted 1 to {too_many - 1}"):
        cache.attend(kernels, np.zeros((too_many, 8), np.float32), np.zeros(too_many), 1.0)
    with pytest.raises(ValueError, match="by_spans wants queries at one position"):
        cache.attend(kernels, np.zeros((2, 8), np.float32), [0, 1], 1.0, by_spans=True)
    cache.bytes = np.ascontiguousarray(cache.bytes[:, :2047])
    with pytest.raises(ValueError, match=r"cache: found shape \[1, 2047\], wanted \[1, 2048\]"):
        cache.attend(kernels, row[None], [0], 1.0)
    cache.kind = "q4"
    with pytest.raises(ValueError, match="cache_type: found 'q4', wanted f16 or q8"):
        cache.attend(kernels, row[None], [0], 1.0)
    wide = np.zeros((1, 514), np.float32)
    with pytest.raises(ValueError, match="found head width 514, wanted at most 512"):
        Cache(CacheType.Q8, 1, 514).attend(kernels, wide, [0], 1.0)
