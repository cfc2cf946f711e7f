"""GGUF blocks to codes, scales and offsets, without going through weights. Knows no file.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0 and TQ2_0 are exact. The K types multiply small integer scales
by one f16 per 256 weights; that product is rounded to f16 here (relative error 2**-11 of scales and
offsets), the codes are kept. Layouts: ggml, src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from elute.errors import FormatError
from elute.types import F16, F32, U8, Affine, QuantizedMatrix

CHUNK_WEIGHTS = (
    1 << 19
)  # weights extracted at a time: a few MB of temporaries, which stay in the cache

Parts = tuple[U8, F16, F16 | None]  # codes [n, block], scales and offsets [n, block / group_size]


@dataclass(frozen=True)
class CodeType:
    """How a block type becomes a QuantizedMatrix; parts takes blocks u8 [n, block bytes]."""

    bits: int
    group_size: int
    affine: Affine
    zero: int
    parts: Callable[[U8], Parts]


def _f16(blocks: U8, at: int) -> F16:
    """-> f16 [n, 1], the two bytes at `at` of each block."""
    halves: F16 = blocks[:, at : at + 2].view("<f2")
    return halves


def _spread(packed: U8, bits: int, width: int) -> U8:
    """Bit fields to bytes: byte i of a run of `width` holds codes i, width + i, 2 * width + i, ...

    The first is in the low bits. bits 4, width 2, in hex:

        bytes  ba dc  ->  codes  a c b d
    """
    n = packed.shape[0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = packed.reshape(n, -1, 1, width) >> shifts
    fields &= np.uint8((1 << bits) - 1)
    return fields.reshape(n, -1)


def _product(d: F16, factors: npt.NDArray[np.uint8 | np.int8]) -> F16:
    """d [n, 1] * factors [n, groups], rounded once to f16; exact in f32: 11 + 7 bits."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (d.astype(np.float32) * factors.astype(np.float32)).astype(np.float16)


def _q4_0(blocks: U8) -> Parts:
    return _spread(blocks[:, 2:], 4, 16), _f16(blocks, 0), None


def _q4_1(blocks: U8) -> Parts:
    return _spread(blocks[:, 4:], 4, 16), _f16(blocks, 0), _f16(blocks, 2)


def _q5(high: U8, low: U8) -> U8:
    """high u8 [n, 4]: bit i is the fifth bit of code i. low u8 [n, 16]: nibbles."""
    codes = _spread(low, 4, 16)
    codes |= np.unpackbits(high, axis=1, bitorder="little") << 4
    return codes


def _q5_0(blocks: U8) -> Parts:
    return _q5(blocks[:, 2:6], blocks[:, 6:]), _f16(blocks, 0), None


def _q5_1(blocks: U8) -> Parts:
    return _q5(blocks[:, 4:8], blocks[:, 8:]), _f16(blocks, 0), _f16(blocks, 2)


def _q8_0(blocks: U8) -> Parts:
    return blocks[:, 2:] ^ np.uint8(0x80), _f16(blocks, 0), None  # int8 q -> u8 q + 128


def _q2_k(blocks: U8) -> Parts:
    factors = blocks[:, :16]
    scales = _product(_f16(blocks, 80), factors & 15)
    return _spread(blocks[:, 16:80], 2, 32), scales, -_product(_f16(blocks, 82), factors >> 4)


def _q3_k(blocks: U8) -> Parts:
    codes = _spread(blocks[:, 32:96], 2, 32)
    codes |= _spread(blocks[:, :32], 1, 32) << 2  # stored so that w = scale * (code - 4)
    low = _spread(blocks[:, 96:104], 4, 8)
    factors = low | (_spread(blocks[:, 104:108], 2, 4) << 4)
    return codes, _product(_f16(blocks, 108), factors.view(np.int8) - np.int8(32)), None


def _k_scales(blocks: U8) -> tuple[F16, F16]:
    """The scales and offsets of Q4_K and Q5_K: d, dmin, and 12 bytes of 6-bit factors."""
    factors, minimums = quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return _product(_f16(blocks, 0), factors), -_product(_f16(blocks, 2), minimums)


def _q4_k(blocks: U8) -> Parts:
    return _spread(blocks[:, 16:], 4, 32), *_k_scales(blocks)


def _q5_k(blocks: U8) -> Parts:
    codes = _spread(blocks[:, 48:], 4, 32)
    codes |= _spread(blocks[:, 16:48], 1, 32) << 4
    return codes, *_k_scales(blocks)


def _q6_k(blocks: U8) -> Parts:
    codes = _spread(blocks[:, :128], 4, 64)
    codes |= _spread(blocks[:, 128:192], 2, 32) << 4
    return codes, _product(_f16(blocks, 208), blocks[:, 192:208].view(np.int8)), None


def _trits(packed: U8, n_trits: int, width: int) -> U8:
    """Base-3 digits to bytes, in the order of _spread.

    A byte is ceil(value * 256 / 243), value = five digits, so its first digit is (3 * byte) >> 8.
    """
    n = packed.shape[0]
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:n_trits].reshape(1, 1, -1, 1)
    shifted = packed.reshape(n, -1, 1, width) * powers  # modulo 256: the digits above fall away
    return ((shifted.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(n, -1)


def _tq1_0(blocks: U8) -> Parts:
    runs = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    codes = [_trits(blocks[:, start:end], n, end - start) for start, end, n in runs]
    return np.concatenate(codes, axis=1), _f16(blocks, 52), None


def _tq2_0(blocks: U8) -> Parts:
    return _spread(blocks[:, :64], 2, 32), _f16(blocks, 64), None


_S, _M = Affine.SYMMETRIC, Affine.MIN
CODE_TYPES: Mapping[GGMLQuantizationType, CodeType] = {
    GGMLQuantizationType.Q4_0: CodeType(4, 32, _S, 8, _q4_0),
    GGMLQuantizationType.Q4_1: CodeType(4, 32, _M, 0, _q4_1),
    GGMLQuantizationType.Q5_0: CodeType(5, 32, _S, 16, _q5_0),
    GGMLQuantizationType.Q5_1: CodeType(5, 32, _M, 0, _q5_1),
    GGMLQuantizationType.Q8_0: CodeType(8, 32, _S, 128, _q8_0),
    GGMLQuantizationType.Q2_K: CodeType(2, 16, _M, 0, _q2_k),
    GGMLQuantizationType.Q3_K: CodeType(3, 16, _S, 4, _q3_k),
    GGMLQuantizationType.Q4_K: CodeType(4, 32, _M, 0, _q4_k),
    GGMLQuantizationType.Q5_K: CodeType(5, 32, _M, 0, _q5_k),
    GGMLQuantizationType.Q6_K: CodeType(6, 16, _S, 32, _q6_k),
    GGMLQuantizationType.TQ1_0: CodeType(2, 256, _S, 1, _tq1_0),
    GGMLQuantizationType.TQ2_0: CodeType(2, 256, _S, 1, _tq2_0),
}
_TERNARY = (GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0)


def is_dequantizable(block_type: GGMLQuantizationType) -> bool:
    """Whether the gguf library can turn blocks of this type into weights."""
    block_bytes = GGML_QUANT_SIZES[block_type][1]
    try:
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), block_type)
    except NotImplementedError:
        return False
    return True


def _row_chunks(n_rows: int, n_columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_WEIGHTS // n_columns)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def read_codes(
    data: U8,
    shape: tuple[int, int],
    block_type: GGMLQuantizationType,
    *,
    rows: npt.NDArray[np.intp] | None = None,
    where: str,
) -> QuantizedMatrix:
    """Blocks of a type in CODE_TYPES to a QuantizedMatrix.

    data  u8 [N * K / block * block bytes]
    rows  stored row i becomes row rows[i]; None keeps the order

    Raises FormatError where a scale is not finite, or a ternary code is 3.
    """
    n, k = shape
    code_type = CODE_TYPES[block_type]
    block, block_bytes = GGML_QUANT_SIZES[block_type]
    stored = data.reshape(n, k // block, block_bytes)
    n_groups = k // code_type.group_size
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n_groups, n), np.float16)
    offsets = np.empty((n_groups, n), np.float16) if code_type.affine is Affine.MIN else None
    for chunk in _row_chunks(n, k):
        to = chunk if rows is None else rows[chunk]
        blocks = stored[chunk].reshape(-1, block_bytes)
        chunk_codes, chunk_scales, chunk_offsets = code_type.parts(blocks)
        if block_type in _TERNARY and chunk_codes.max() > 2:
            raise FormatError(
                f"{where}: found code 3 in rows {chunk.start} to {chunk.stop - 1}, wanted ternary "
                "codes 0 to 2; download or convert the file again"
            )
        codes[to] = chunk_codes.reshape(-1, k)
        for found, kept in ((chunk_scales, scales), (chunk_offsets, offsets)):
            if found is not None and kept is not None:
                by_row = found.reshape(-1, n_groups)
                _check_finite(by_row, chunk.start, code_type.group_size, where)
                kept[:, to] = by_row.T
    return QuantizedMatrix(
        codes=codes,
        scales=scales,
        offsets=offsets,
        affine=code_type.affine,
        zero=code_type.zero,
        bits=code_type.bits,
        group_size=code_type.group_size,
    )


def _check_finite(by_row: F16, first_row: int, group_size: int, where: str) -> None:
    finite = np.isfinite(by_row)
    if not finite.all():
        row, group = divmod(int(np.argmin(finite)), by_row.shape[1])
        raise FormatError(
            f"{where}: found scale or offset {by_row[row, group]} in row {first_row + row}, column "
            f"{group * group_size}, wanted one that f16 holds (at most 65504); convert the model "
            "again, or to another type"
        )


def read_weights(data: U8, shape: tuple[int, ...], block_type: GGMLQuantizationType) -> F32:
    """Blocks of any type that is_dequantizable to f32 weights, by the gguf library."""
    k = shape[-1]
    block, block_bytes = GGML_QUANT_SIZES[block_type]
    stored = data.reshape(-1, k // block * block_bytes)
    weights = np.empty((stored.shape[0], k), np.float32)
    with np.errstate(all="ignore"):  # hostile scales: the caller refuses what is not finite
        for chunk in _row_chunks(*weights.shape):
            weights[chunk] = quants.dequantize(stored[chunk], block_type)
    return weights.reshape(shape)
