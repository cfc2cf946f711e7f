"""The channel order only moves bits: unpack inverts pack, and codes lie where the format says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import ShapeError
from elute.pack import channels
from elute.pack.quads import sections


@given(
    n=st.integers(1, 300),
    k=st.integers(1, 40),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack(n: int, k: int, bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, k), np.uint8)
    rows = channels.pack_codes(codes, bits)
    assert rows.shape == (k, channels.row_bytes(n, bits))
    assert np.array_equal(channels.unpack_codes(rows, n, bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_places_each_code_where_the_format_says(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (200, 3), np.uint8)
    rows = channels.pack_codes(codes, bits)
    for channel in range(3):
        for output in range(256):
            tile, of_tile = divmod(output, 128)
            h, i, lane, m = of_tile // 64, of_tile // 16 % 4, of_tile // 4 % 4, of_tile % 4
            position = 64 * h + 16 * lane + 4 * i + m
            code = 0
            for first, planes in sections(bits):
                section = tile * 16 * bits + 16 * first
                byte = rows[channel, section + position % (16 * planes)]
                field = int(byte) >> (planes * (position // (16 * planes))) & ((1 << planes) - 1)
                code |= field << first
            assert code == (codes[output, channel] if output < 200 else 0), (channel, output)


def test_codes_beyond_their_bits_are_refused() -> None:
    with pytest.raises(ShapeError, match="wanted below 4"):
        channels.pack_codes(np.full((32, 4), 4, np.uint8), 2)
