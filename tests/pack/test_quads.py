"""pack only moves bits: unpack is its exact inverse for every width and ragged size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import ShapeError
from elute.pack import quads


@given(
    n=st.integers(1, 70),
    n_quads=st.integers(1, 40),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack(n: int, n_quads: int, bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, 4 * n_quads), np.uint8)
    planes = quads.pack_codes(codes, bits)
    assert planes.nbytes == quads.planes_bytes(n, 4 * n_quads, bits)
    assert np.array_equal(quads.unpack_codes(planes, codes.shape, bits), codes)


@given(n=st.integers(1, 70), groups=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_unpack_groups_inverts_pack_groups(n: int, groups: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((groups, n)).astype(np.float16)
    assert np.array_equal(quads.unpack_groups(quads.pack_groups(values), n), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_sections_cover_every_plane_once(bits: int) -> None:
    planes = [p for first, width in quads.sections(bits) for p in range(first, first + width)]
    assert planes == list(range(bits))


def test_pack_places_one_bit_where_the_format_says() -> None:
    codes = np.zeros((32, 64), np.uint8)
    codes[17, 4 * 3 + 2] = (
        0b100  # output 17 = high nibble of j = 1; quad 3, channel 2; plane 2 of 3
    )
    planes = quads.pack_codes(codes, 3)
    (at,) = np.flatnonzero(planes)
    section_of_planes_0_and_1 = 16 * 16 * 2
    assert at == section_of_planes_0_and_1 + 3 * 16 + 1
    assert planes[at] == 1 << (4 + 2)


@pytest.mark.parametrize(
    ("k", "group_size", "says"),
    [(66, 32, "not a multiple of 4"), (96, 64, "use group_size=32"), (96, 48, "neither divides")],
)
def test_groups_that_cannot_be_packed_are_refused(k: int, group_size: int, says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        quads.check_groups(k, group_size, where="blk")


def test_codes_beyond_their_bits_are_refused() -> None:
    with pytest.raises(ShapeError, match="wanted below 4"):
        quads.pack_codes(np.full((32, 4), 4, np.uint8), 2)
