from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st

from elute.errors import FormatError
from elute.formats import gguf_codes
from elute.formats.gguf_codes import CODE_TYPES, is_dequantizable, read_codes, read_weights
from elute.types import Affine

EXACT = (T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.TQ1_0, T.TQ2_0)
K_TYPES = (T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K)
# Where the f16 scales lie in a block.
F16_AT = {
    T.Q4_0: (0,),
    T.Q4_1: (0, 2),
    T.Q5_0: (0,),
    T.Q5_1: (0, 2),
    T.Q8_0: (0,),
    T.Q2_K: (80, 82),
    T.Q3_K: (108,),
    T.Q4_K: (0, 2),
    T.Q5_K: (0, 2),
    T.Q6_K: (208,),
    T.TQ1_0: (52,),
    T.TQ2_0: (64,),
}


def random_blocks(kind: T, n: int, k: int, seed: int = 0) -> np.ndarray:
    """u8 [n, k / block * block bytes]: any bytes, scales finite, ternary codes below 3."""
    rng = np.random.default_rng(seed)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (n * k // block, block_bytes), np.uint8)
    if kind is T.TQ2_0:
        blocks[:, :64] = rng.choice([0x00, 0x55, 0xAA, 0x12, 0x64], blocks[:, :64].shape)
    for at in F16_AT[kind]:
        halves = (rng.standard_normal(len(blocks)) * 0.02).astype("<f2")
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(n, -1)


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_exact_types_equal_the_library_bit_for_bit(kind: T) -> None:
    n, k = 37, 512
    weights = np.random.default_rng(1).standard_normal((n, k)).astype(np.float32)
    for data in (quants.quantize(weights, kind), random_blocks(kind, n, k)):
        got = read_codes(data, (n, k), kind, where="t")
        assert got.codes.max() < 1 << got.bits
        np.testing.assert_array_equal(got.dequantize(), quants.dequantize(data, kind))


@pytest.mark.parametrize("kind", K_TYPES, ids=lambda kind: kind.name)
def test_k_types_differ_from_the_library_by_the_rounding_of_the_scales(kind: T) -> None:
    n, k = 29, 768
    data = random_blocks(kind, n, k)
    got = read_codes(data, (n, k), kind, where="t")
    want = quants.dequantize(data, kind)
    scales = np.repeat(abs(got.scales.astype(np.float64)).T, got.group_size, axis=1)
    distance = abs(got.codes.astype(np.float64) - got.zero)
    bound = scales * distance
    if got.offsets is not None:
        bound += np.repeat(abs(got.offsets.astype(np.float64)).T, got.group_size, axis=1)
    # 2**-11 of each rounded factor, and two f32 roundings of the library's own product and sum.
    bound = bound * (2.0**-11 + 2.0**-21)
    error = abs(got.dequantize() - want)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert error[worst] <= bound[worst], (worst, got.dequantize()[worst], want[worst], bound[worst])


@pytest.mark.parametrize("kind", K_TYPES, ids=lambda kind: kind.name)
def test_k_types_are_exact_where_the_products_fit_f16(kind: T) -> None:
    data = random_blocks(kind, 8, 512).reshape(-1, GGML_QUANT_SIZES[kind][1])
    for at in F16_AT[kind]:
        data[:, at : at + 2] = np.array([2.0**-5], "<f2").view(np.uint8)
    got = read_codes(data, (8, 512), kind, where="t")
    assert (got.affine is Affine.MIN) == (kind in (T.Q2_K, T.Q4_K, T.Q5_K))
    np.testing.assert_array_equal(
        got.dequantize(), quants.dequantize(data.reshape(8, -1), kind).reshape(8, 512)
    )


@pytest.mark.parametrize("kind", CODE_TYPES, ids=lambda kind: kind.name)
def test_chunks_and_row_order_move_whole_rows(kind: T, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 23, 512
    data = random_blocks(kind, n, k)
    plain = read_codes(data, (n, k), kind, where="t")
    rows = np.random.default_rng(3).permutation(n)
    monkeypatch.setattr(gguf_codes, "CHUNK_WEIGHTS", 4 * k)
    moved = read_codes(data, (n, k), kind, rows=rows, where="t")
    np.testing.assert_array_equal(moved.codes[rows], plain.codes)
    np.testing.assert_array_equal(moved.scales[:, rows], plain.scales)
    if plain.offsets is not None:
        assert moved.offsets is not None
        np.testing.assert_array_equal(moved.offsets[:, rows], plain.offsets)


@given(st.sampled_from(sorted(CODE_TYPES)), st.binary(min_size=256, max_size=256))
def test_any_bytes_give_codes_in_range_or_one_error(kind: T, noise: bytes) -> None:
    block_bytes = GGML_QUANT_SIZES[kind][1]
    data = np.frombuffer(noise[:block_bytes], np.uint8)
    shape = (1, GGML_QUANT_SIZES[kind][0])
    try:
        got = read_codes(data, shape, kind, where="t")
    except FormatError:
        return
    assert got.codes.max() < 1 << got.bits
    assert np.isfinite(got.scales).all()


@pytest.mark.parametrize("kind", CODE_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_scales_that_are_not_finite_are_refused(kind: T, bad: float) -> None:
    data = random_blocks(kind, 2, 256)
    at = F16_AT[kind][-1]
    data[1, at : at + 2] = np.array([bad], "<f2").view(np.uint8)
    with pytest.raises(
        FormatError, match=r"^the tensor: found scale or offset .* in row 1, column"
    ):
        read_codes(data, (2, 256), kind, where="the tensor")


def test_products_of_scales_beyond_f16_are_refused() -> None:
    data = np.zeros((1, 210), np.uint8)
    data[0, 192:208] = 127  # sub-scales
    data[0, 208:210] = np.array([1000.0], "<f2").view(np.uint8)
    with pytest.raises(FormatError, match=r"found scale or offset inf in row 0, column 0"):
        read_codes(data, (1, 256), T.Q6_K, where="t")


def test_ternary_code_3_is_refused() -> None:
    data = np.zeros((1, 66), np.uint8)
    data[0, 5] = 0b11
    with pytest.raises(FormatError, match="found code 3 in rows 0 to 0, wanted ternary codes"):
        read_codes(data, (1, 256), T.TQ2_0, where="t")


def test_extraction_needs_little_beyond_the_codes() -> None:
    n, k = 2048, 4096
    data = random_blocks(T.Q4_K, 16, k).repeat(n // 16, axis=0)
    tracemalloc.start()
    got = read_codes(data, (n, k), T.Q4_K, where="t")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = got.codes.nbytes + 2 * got.scales.nbytes
    assert peak < kept + 16 * gguf_codes.CHUNK_WEIGHTS, (peak, kept)


def test_codebook_types_are_dequantized_by_the_library() -> None:
    n, k = 3, 256
    block, block_bytes = GGML_QUANT_SIZES[T.IQ4_XS]
    noise = np.random.default_rng(0).integers(0, 256, (n, k // block * block_bytes), np.uint8)
    noise[:, :2] = np.array([0.01], "<f2").view(np.uint8)
    got = read_weights(noise.reshape(-1), (n, k), T.IQ4_XS)
    np.testing.assert_array_equal(got, quants.dequantize(noise, T.IQ4_XS))


def test_which_types_the_library_dequantizes() -> None:
    assert is_dequantizable(T.MXFP4)
    assert is_dequantizable(T.IQ1_S)
    assert not is_dequantizable(T.Q8_K)
    assert not is_dequantizable(T.I32)
