"""Products in channel order: bit for bit the reference's, whatever channels are active."""

import levels
import numpy as np
import pytest
from matrices import random_matrix
from test_matmul import at_the_end_of_memory, extreme_inputs, inputs

from elute import _native
from elute.kernels.lut_matmul import reference as lut_matmul
from elute.pack import channels, quads
from elute.types import U8, Affine, QuantizedMatrix

ISAS = levels.isas()


def arguments(matrix: QuantizedMatrix, rows: U8 | None = None) -> dict:
    packed = quads.pack(matrix)
    return {
        "rows": channels.pack_codes(matrix.codes, matrix.bits) if rows is None else rows,
        "scales": packed.scales, "offsets": packed.offsets, "n": packed.shape[0],
        "bits": packed.bits, "group_size": packed.group_size, "zero": packed.zero,
        "affine": str(packed.affine),
    }  # fmt: skip


def patterns(k: int, seed: int) -> dict[str, np.ndarray]:
    """-> which channels are active, bool [K]."""
    rng = np.random.default_rng(seed)
    channel = np.arange(k)
    return {
        "all": channel >= 0,
        "none": channel < 0,
        "first": channel == 0,
        "last": channel == k - 1,
        "some": rng.random(k) < 0.4,
        "few": rng.random(k) < 0.02,
        "one run": channel // 16 == k // 32,
        "all but one": channel != k // 2,
    }


def words(active: np.ndarray) -> np.ndarray:
    """bool [K] -> u64 [K / 64, rounded up]; bits beyond K are set, to be ignored."""
    padded = np.ones(-(-len(active) // 64) * 64, bool)
    padded[: len(active)] = active
    return np.packbits(padded, bitorder="little").view("<u8")


def check(isa: str, matrix: QuantizedMatrix, x: np.ndarray, **changed: object) -> None:
    """All patterns; channels that are not active hold rubbish, which must not be read."""
    k = matrix.shape[1]
    packed = quads.pack(matrix)
    given = {**arguments(matrix), **changed}
    for name, active in patterns(k, seed=k).items():
        masked = np.where(active, x, np.float32(0))
        want = lut_matmul.lut_matmul(masked, packed)
        rows = given["rows"].copy()
        rows[~active] = 0xAB
        got = levels.channel_matmul(isa, masked, words(active), **{**given, "rows": rows})
        assert np.array_equal(got, want), (name, np.abs(got - want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 0])
def test_channel_matmul_equals_the_reference(isa: str, bits: int, group_size: int) -> None:
    """group_size 0: one group a row, of a K that ends inside a block."""
    k = 256 if group_size else 64 * 2 + 20
    for affine in Affine:
        for n in (33, 128, 300):
            matrix = random_matrix(
                n, k, bits=bits, group_size=group_size or k, affine=affine, seed=n + bits
            )
            check(isa, matrix, inputs(2, k, seed=bits))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 0])
def test_channel_gemm_equals_the_reference(isa: str, bits: int, group_size: int) -> None:
    k = 256 if group_size else 64 * 2 + 20
    for affine in Affine:
        for n, m in ((33, 1), (128, 5), (300, 13)):
            matrix = random_matrix(
                n, k, bits=bits, group_size=group_size or k, affine=affine, seed=n + bits
            )
            x = inputs(m, k, seed=bits)
            want = lut_matmul.lut_matmul(x, quads.pack(matrix))
            got = levels.channel_gemm(isa, x, **arguments(matrix))
            assert np.array_equal(got, want), (affine, n, m, np.abs(got - want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("group_size", [16, 64, 192, 0])
def test_many_rows_columns_and_outputs_equal_lookup_in_plain_c(
    isa: str, bits: int, group_size: int
) -> None:
    """More rows, columns and tiles than kernels take at once; groups across the runs of columns, a
    row that ends in the middle of a block."""
    k = {16: 1136, 0: 1100}.get(group_size, 1152)
    for affine, m, n in ((Affine.SYMMETRIC, 131, 140), (Affine.MIN, 1, 4200)):
        matrix = random_matrix(n, k, bits=bits, group_size=group_size or k, affine=affine, seed=m)
        x = inputs(m, k, seed=bits)
        packed = quads.pack(matrix)
        want = _native.lut_matmul(
            "scalar", x, np.pad(packed.planes, (0, 64)), packed.scales, packed.offsets, n, bits,
            packed.group_size, packed.zero, str(affine),
        )  # fmt: skip
        given = arguments(matrix)
        assert np.array_equal(levels.channel_gemm(isa, x, **given), want), affine
        got = levels.channel_matmul(isa, x[:3], words(np.ones(k, bool)), **given)
        assert np.array_equal(got, want[:3]), affine


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [4, 8, 12, 20, 36, 64, 100, 256])
def test_the_largest_sums_do_not_overflow(isa: str, bits: int, k: int) -> None:
    """One group a row. Codes all 0, all largest, around the middle, and alternating."""
    most = (1 << bits) - 1
    matrix = random_matrix(133, k, bits=bits, group_size=k, affine=Affine.SYMMETRIC, seed=k)
    for row, code in enumerate((0, most, most // 2, most // 2 + 1)):
        matrix.codes[row] = code
        matrix.codes[128 + row] = code
    matrix.codes[4] = np.arange(k) % 2 * most
    x = extreme_inputs(k)
    check(isa, matrix, x)
    # Every 4th channel alone: a quad is of four different ones, and all its |q| can be 127.
    largest = np.zeros((2, k), np.float32)
    largest[0, ::4] = 1
    largest[1, 1::4] = -1
    for row in largest:
        want = lut_matmul.lut_matmul(row[None], quads.pack(matrix))
        got = levels.channel_matmul(isa, row[None], words(row != 0), **arguments(matrix))
        assert np.array_equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_nothing_beyond_a_row_is_read(isa: str, bits: int) -> None:
    """One tile, and a matrix that begins within the rows."""
    for n, k, offset in ((33, 36, 0), (128, 64, 0), (130, 4, 7)):
        matrix = random_matrix(n, k, bits=bits, group_size=k, affine=Affine.MIN, seed=k)
        given = arguments(matrix)
        given["rows"] = np.pad(given["rows"], ((0, 0), (offset, 0)), constant_values=0xAB)
        for name in ("rows", "scales", "offsets"):
            given[name] = at_the_end_of_memory(given[name])
        x = at_the_end_of_memory(inputs(3, k, seed=k))
        want = lut_matmul.lut_matmul(x, quads.pack(matrix))
        active = words(np.ones(k, bool))
        got = levels.channel_matmul(isa, x, active, **given, offset=offset)
        assert np.array_equal(got, want)
        assert np.array_equal(levels.channel_gemm(isa, x, **given, offset=offset), want)


@pytest.mark.parametrize("isa", ISAS)
def test_bias_is_added_last(isa: str) -> None:
    matrix = random_matrix(145, 64, bits=4, group_size=32, affine=Affine.MIN, seed=1)
    x, bias = inputs(4, 64, seed=2), np.arange(145, dtype=np.float32)
    want = lut_matmul.lut_matmul(x, quads.pack(matrix)) + bias
    given = arguments(matrix)
    active = words(np.ones(64, bool))
    assert np.array_equal(levels.channel_matmul(isa, x, active, **given, bias=bias), want)
    assert np.array_equal(levels.channel_gemm(isa, x, **given, bias=bias), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_seen(isa: str, bad: float) -> None:
    """Even where no channel of its block is active."""
    matrix = random_matrix(33, 128, bits=4, group_size=16, affine=Affine.MIN, seed=1)
    x = np.tile(inputs(2, 128, seed=1)[1:], (3, 1))
    x[0, 5] = x[1, 127] = bad
    active = np.arange(128) == 70
    for masked in (x, np.where(active | ~np.isfinite(x), x, np.float32(0))):
        got = levels.channel_matmul(isa, masked, words(active), **arguments(matrix))
        assert not np.isfinite(got[:2]).any()
        assert np.isfinite(got[2]).all()


def test_wrong_arguments_are_refused_not_read() -> None:
    matrix = random_matrix(145, 64, bits=4, group_size=32, affine=Affine.MIN, seed=1)
    x, active = inputs(1, 64, seed=1), words(np.ones(64, bool))
    good = arguments(matrix)
    rows = good["rows"]
    for change, says in [
        ({"rows": rows[:63]}, "wanted 64 of 128 bytes"),
        ({"rows": np.ascontiguousarray(rows[:, :127])}, "wanted 64 of 128 bytes"),
        ({"offset": 1}, "from byte 1"),
        ({"offset": -1}, "from byte -1"),
        ({"offsets": None}, "offsets are missing"),
        ({"bias": np.zeros(144, np.float32)}, r"bias: wanted \[N\]"),
    ]:
        with pytest.raises(ValueError, match=says):
            _native.channel_matmul("scalar", x, active, **{**good, **change})
        with pytest.raises(ValueError, match=says):
            _native.channel_gemm("scalar", x, **{**good, **change})
    with pytest.raises(ValueError, match="active: wanted"):
        _native.channel_matmul("scalar", x, active[:0], **good)
