"""CRC-32C: the vectors of RFC 3720 (B.4) and a slow reference, on every level of this CPU and of an
emulated ARM."""

import levels
import numpy as np
import pytest
from emulated import missing

from elute import _native

PAGE = 4096
HERE = _native.crc32c_levels()
EMULATED = "cortex-a72"  # an ARM CPU with CRC instructions and little else
LEVELS = [*HERE, *([] if missing() or "armv8" in HERE else ["armv8"])]


def home(level):
    return _native if level in HERE else levels.server(EMULATED)


def crc32c(data, level):
    return int(home(level).crc32c(data, level))


def reference(data):
    """Bit by bit, lowest first: division by the reversed polynomial 0x1edc6f41."""
    total = 0xFFFFFFFF
    for byte in data.tolist():
        total ^= byte
        for _ in range(8):
            total = total >> 1 ^ (0x82F63B78 if total & 1 else 0)
    return total ^ 0xFFFFFFFF


READ_10 = bytes.fromhex(
    "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018"
    "28000000 00000000 02000000 00000000"
)
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (READ_10, 0xD9963A56),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("data", "wanted"), VECTORS)
def test_the_published_vectors_hold(level, data, wanted):
    array = np.frombuffer(data, np.uint8)
    assert reference(array) == wanted
    assert crc32c(array, level) == wanted


@pytest.mark.parametrize("level", LEVELS)
def test_every_length_and_alignment_is_that_of_the_reference(level):
    random = np.random.default_rng(7).integers(0, 256, 80, dtype=np.uint8)
    for start in range(9):
        for size in range(40):
            part = random[start : start + size]
            assert crc32c(part, level) == reference(part), (start, size)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_pages", range(10))
def test_pages_have_the_sums_of_themselves(level, n_pages):
    data = np.random.default_rng(n_pages).integers(0, 256, n_pages * PAGE, dtype=np.uint8)
    found = home(level).crc32c_pages(data, level)
    assert found.dtype == np.uint32
    assert found.tolist() == [
        crc32c(data[i * PAGE : (i + 1) * PAGE], "table") for i in range(n_pages)
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_every_bit_of_a_page_counts(level):
    page = np.random.default_rng(1).integers(0, 256, PAGE, dtype=np.uint8)
    seen = {crc32c(page, level)}
    bits = range(0, 8 * PAGE, 1 if level in HERE else 997)
    for bit in bits:
        page[bit // 8] ^= 1 << bit % 8
        seen.add(crc32c(page, level))
        page[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 1 + len(bits)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_an_arm_cpu_gets_its_instructions():
    assert levels.server(EMULATED).crc32c_levels() == ["table", "armv8"]


def test_an_unknown_level_and_a_part_of_a_page_are_refused():
    with pytest.raises(ValueError, match=r"found 'md5', wanted one of crc32c_levels"):
        _native.crc32c(np.zeros(1, np.uint8), "md5")
    with pytest.raises(ValueError, match="wanted whole pages of 4096 bytes"):
        _native.crc32c_pages(np.zeros(4097, np.uint8))
