"""Every ISA of this CPU against the numpy reference: bit for bit, floats included."""

import ctypes
import mmap
import os

import levels
import numpy as np
import pytest
from matrices import random_matrix

from elute import _native
from elute.kernels.activations import build_tables, quantize_activations
from elute.kernels.lut_dequant import reference as lut_dequant
from elute.kernels.lut_matmul import reference as lut_matmul
from elute.pack import quads
from elute.types import Affine, PackedMatrix

ISAS = levels.isas()


def test_every_level_is_tested_here() -> None:
    if "avx512" not in ISAS:
        pytest.skip("this CPU lacks AVX-512 and libsimde-dev, which emulates it, is not installed")
    assert _native.isas() == ["scalar", "avx2", "avx512"]
    assert not _native.emulates_avx512 or _native.best_isa() == "avx2"


def ways(isa: str) -> list[dict[str, bool]]:
    """All kernels: lookup, codes in scratch, and where there is one, codes in registers."""
    direct = isa in _native.isas() and _native.multiplies_directly(isa)
    found = [{"lookup": True}, {"lookup": False}]
    return [*found, {"lookup": False, "direct": True}] if direct else found


def test_emulated_avx512_multiplies_few_rows_directly() -> None:
    if not _native.emulates_avx512:
        pytest.skip("this build does not emulate AVX-512")
    assert [len(ways(isa)) for isa in _native.isas()] == [2, 2, 3]
    packed = quads.pack(random_matrix(45, 64, bits=4, group_size=32, affine=Affine.MIN, seed=1))
    with pytest.raises(ValueError, match="direct: level avx2 has no such kernel"):
        _native.lut_matmul(
            "avx2", inputs(1, 64, seed=2), **arguments(packed), lookup=False, direct=True
        )


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_that_share_their_codes_keep_their_bits(bits: int) -> None:
    """Every number of rows around the tiles of the direct kernel."""
    if "avx512" not in ISAS or not _native.multiplies_directly("avx512"):
        pytest.skip("no AVX-512 with GFNI here, nor its emulation")
    matrix = random_matrix(40, 192, bits=bits, group_size=64, affine=Affine.ZERO, seed=bits)
    packed = quads.pack(matrix)
    x = inputs(17, 192, seed=bits)
    want = lut_matmul.lut_matmul(x, packed)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17):
        got = _native.lut_matmul("avx512", x[:m], **arguments(packed), lookup=False, direct=True)
        assert np.array_equal(got, want[:m]), m


def padded(planes: np.ndarray) -> np.ndarray:
    return np.concatenate([planes, np.full(64, 0xAB, np.uint8)])


def arguments(packed: PackedMatrix) -> dict:
    return {
        "planes": padded(packed.planes), "scales": packed.scales, "offsets": packed.offsets,
        "n": packed.shape[0], "bits": packed.bits, "group_size": packed.group_size,
        "zero": packed.zero, "affine": str(packed.affine),
    }  # fmt: skip


def inputs(m: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[:, rng.integers(k)] *= np.float32(300)  # a massive activation, as real models have
    x[0, : min(k, 64)] = 0  # a block without a scale
    return x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [4, 20, 64, 100, 576])
@pytest.mark.parametrize("size", [1.0, 1e-37, 1e-45, 1e30])
def test_quantize_equals_the_reference(isa: str, k: int, size: float) -> None:
    x = inputs(3, k, seed=k) * np.float32(size)
    q, scales, sums, entries, lows = levels.quantize_activations(isa, x)
    want = quantize_activations(x)
    assert np.array_equal(scales, want.scales)
    assert np.array_equal(q, want.q)
    assert np.array_equal(sums, q.reshape(3, -1, 16).sum(axis=-1, dtype=np.int32))
    tables = build_tables(want)
    assert np.array_equal(entries, tables.entries)
    assert np.array_equal(lows, tables.lows.reshape(3, -1, 4).sum(axis=-1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 0])
def test_matmul_equals_the_reference(isa: str, bits: int, group_size: int) -> None:
    """group_size 0: one group a row, of a K that ends inside a block and inside a vector of
    quads."""
    for affine in Affine:
        for n, m in ((32, 1), (33, 2), (95, 5), (33, 13)):
            k = 256 if group_size else 64 * 2 + 20
            matrix = random_matrix(
                n, k, bits=bits, group_size=group_size or k, affine=affine, seed=n + bits
            )
            packed = quads.pack(matrix)
            x = inputs(m, k, seed=bits)
            want = lut_matmul.lut_matmul(x, packed)
            for way in ways(isa):
                got = levels.lut_matmul(isa, x, **arguments(packed), **way)
                assert np.array_equal(got, want), (affine, n, m, way, np.abs(got - want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 192, 0])
def test_many_rows_and_columns_equal_lookup_in_plain_c(
    isa: str, bits: int, group_size: int
) -> None:
    """More rows than kernels take at once, and more columns; groups across the runs of columns, a
    row that ends in the middle of a block."""
    m, n, k = 131, 33, {16: 1136, 32: 1184, 0: 1100}.get(group_size, 1152)
    for affine in Affine:
        matrix = random_matrix(n, k, bits=bits, group_size=group_size or k, affine=affine, seed=m)
        given = arguments(quads.pack(matrix))
        x = inputs(m, k, seed=bits)
        want = _native.lut_matmul("scalar", x, **given)
        for way in ways(isa):
            assert np.array_equal(levels.lut_matmul(isa, x, **given, **way), want), (affine, way)


def extreme_inputs(k: int) -> np.ndarray:
    """Rows whose activations are the largest codes: spans near 255, codes of +-127, both signs."""
    quads_of = np.array(
        [[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1], [1, 0, 0, 0], [0, 0, 0, -1], [-1, 1, 0, 0]]
    )
    return np.tile(quads_of, (1, k // 4)).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [4, 12, 20, 36, 64, 100, 256])
def test_the_largest_sums_do_not_overflow(isa: str, bits: int, k: int) -> None:
    """One group a row. Codes all 0, all largest, around the middle, and alternating."""
    most = (1 << bits) - 1
    matrix = random_matrix(37, k, bits=bits, group_size=k, affine=Affine.SYMMETRIC, seed=k)
    for row, code in enumerate((0, most, most // 2, most // 2 + 1)):
        matrix.codes[row] = code
        matrix.codes[32 + row] = code
    matrix.codes[4] = np.arange(k) % 2 * most
    packed = quads.pack(matrix)
    x = extreme_inputs(k)
    want = lut_matmul.lut_matmul(x, packed)
    for way in ways(isa):
        got = levels.lut_matmul(isa, x, **arguments(packed), **way)
        assert np.array_equal(got, want), (way, np.abs(got - want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_seen(isa: str, bad: float) -> None:
    packed = quads.pack(random_matrix(33, 128, bits=4, group_size=32, affine=Affine.MIN, seed=1))
    x = np.tile(inputs(2, 128, seed=1)[1:], (129, 1))
    x[np.arange(128), np.arange(128)] = bad  # row r has it at column r, the last row nowhere
    for way in ways(isa):
        got = levels.lut_matmul(isa, x, **arguments(packed), **way)
        assert not np.isfinite(got[:-1]).any()
        assert np.isfinite(got[-1]).all()
    scales = levels.quantize_activations(isa, x)[1]
    assert np.array_equal(scales, quantize_activations(x).scales, equal_nan=True)


def at_the_end_of_memory(values: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last readable one."""
    page = mmap.PAGESIZE
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    room = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(room.ctypes.data + size)
    assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0, os.strerror(ctypes.get_errno())
    inside = room[size - values.nbytes : size].view(values.dtype).reshape(values.shape)
    inside[:] = values
    return inside


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_no_kernel_reads_beyond_what_it_was_promised(isa: str, bits: int) -> None:
    for k in (4, 20, 36, 64, 100, 128):
        matrix = random_matrix(33, k, bits=bits, group_size=k, affine=Affine.MIN, seed=k)
        packed = quads.pack(matrix)
        given = arguments(packed)
        for name in ("planes", "scales", "offsets"):
            given[name] = at_the_end_of_memory(given[name])
        x = at_the_end_of_memory(inputs(3, k, seed=k))
        want = lut_matmul.lut_matmul(x, packed)
        for way in ways(isa):
            assert np.array_equal(levels.lut_matmul(isa, x, **given, **way), want)
        codes = levels.lut_dequant(isa, given["planes"], 33, k, bits)
        assert np.array_equal(codes, matrix.codes)


@pytest.mark.parametrize("isa", ISAS)
def test_bias_is_added_last(isa: str) -> None:
    matrix = random_matrix(45, 64, bits=4, group_size=32, affine=Affine.MIN, seed=1)
    packed = quads.pack(matrix)
    x, bias = inputs(4, 64, seed=2), np.arange(45, dtype=np.float32)
    for way in ways(isa):
        got = levels.lut_matmul(isa, x, **arguments(packed), bias=bias, **way)
        assert np.array_equal(got, lut_matmul.lut_matmul(x, packed) + bias), way


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [4, 36, 64, 148])
def test_lut_dequant_equals_unpack(isa: str, bits: int, k: int) -> None:
    matrix = random_matrix(45, k, bits=bits, group_size=k, affine=Affine.MIN, seed=k)
    packed = quads.pack(matrix)
    assert np.array_equal(levels.lut_dequant(isa, padded(packed.planes), 45, k, bits), matrix.codes)


@pytest.mark.parametrize("affine", list(Affine))
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequant_rows_equals_the_reference(bits: int, affine: Affine) -> None:
    matrix = random_matrix(45, 192, bits=bits, group_size=64, affine=affine, seed=bits)
    packed = quads.pack(matrix)
    got = _native.dequant_rows(k=192, **arguments(packed))
    assert np.array_equal(got, lut_dequant.lut_dequant(packed))


def test_wrong_arguments_are_refused_not_read() -> None:
    packed = quads.pack(random_matrix(45, 64, bits=4, group_size=32, affine=Affine.MIN, seed=1))
    x = inputs(1, 64, seed=1)
    good = arguments(packed)
    for change, says in [
        ({"planes": packed.planes}, "with padding"),
        ({"offsets": None}, "offsets are missing"),
        ({"bits": 9}, "wanted 1 to 8"),
        ({"zero": 256}, "zero=256, wanted 0 to 255"),
        ({"n": 2**31 - 1}, r"shape \[2147483647, 64\]"),
        ({"group_size": 48}, "group_size=48"),
        ({"scales": packed.scales[:, :1]}, "wrong shape"),
        ({"scales": packed.scales.view(np.int16)}, "not float16"),
        ({"affine": "cubic"}, "affine 'cubic'"),
    ]:
        if "scales" in change:
            change["scales"] = np.ascontiguousarray(change["scales"])
        with pytest.raises(ValueError, match=says):
            _native.lut_matmul("scalar", x, **{**good, **change})
    with pytest.raises(ValueError, match="isa: found 'mmx'"):
        _native.lut_matmul("mmx", x, **good)
