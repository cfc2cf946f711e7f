"""Every ISA of this CPU against the numpy reference: bit for bit, floats included."""

import numpy as np
import pytest
from matrices import random_matrix

from elute import _native
from elute.kernels.activations import build_tables, quantize_activations
from elute.kernels.lut_dequant import reference as lut_dequant
from elute.kernels.lut_matmul import reference as lut_matmul
from elute.pack import quads
from elute.types import Affine, PackedMatrix

ISAS = _native.isas()


def test_every_level_is_tested_here() -> None:
    if "avx512" not in ISAS:
        pytest.skip("this CPU lacks AVX-512 and libsimde-dev, which emulates it, is not installed")
    assert ISAS == ["scalar", "avx2", "avx512"]
    assert not _native.emulates_avx512 or _native.best_isa() == "avx2"


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
    q, scales, sums, entries, lows = _native.quantize_activations(isa, x)
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
        for n, m in ((32, 1), (33, 2), (95, 5)):
            k = 256 if group_size else 64 * 2 + 20
            matrix = random_matrix(
                n, k, bits=bits, group_size=group_size or k, affine=affine, seed=n + bits
            )
            packed = quads.pack(matrix)
            x = inputs(m, k, seed=bits)
            want = lut_matmul.lut_matmul(x, packed)
            for lookup in (True, False):
                got = _native.lut_matmul(isa, x, **arguments(packed), lookup=lookup)
                assert np.array_equal(got, want), (affine, n, m, lookup, np.abs(got - want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lookup", [True, False])
def test_bias_is_added_last(isa: str, lookup: bool) -> None:
    matrix = random_matrix(45, 64, bits=4, group_size=32, affine=Affine.MIN, seed=1)
    packed = quads.pack(matrix)
    x, bias = inputs(4, 64, seed=2), np.arange(45, dtype=np.float32)
    got = _native.lut_matmul(isa, x, **arguments(packed), bias=bias, lookup=lookup)
    assert np.array_equal(got, lut_matmul.lut_matmul(x, packed) + bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [4, 36, 64, 148])
def test_lut_dequant_equals_unpack(isa: str, bits: int, k: int) -> None:
    matrix = random_matrix(45, k, bits=bits, group_size=k, affine=Affine.MIN, seed=k)
    packed = quads.pack(matrix)
    assert np.array_equal(
        _native.lut_dequant(isa, padded(packed.planes), 45, k, bits), matrix.codes
    )


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
