"""The quad layout and its exact inverse, in numpy. Moves bits; knows nothing of files or kernels.

A quad is LUT_WIDTH = 4 consecutive input channels for all outputs, one nibble per output and plane.
Order of the bytes, outermost first (docs/packed-format.md shows an example):

    panel    PANEL = 32 outputs
    block    ACT_BLOCK = 64 channels (the last one of a row may be shorter)
    section  the planes of a code in runs of 4, 2 and 1: 7 bits = planes 0-3, planes 4-5, plane 6
    quad     4 channels
    byte     j * (planes of the section) + plane, for j in 0..15

The low nibble of a byte belongs to output j of the panel, the high nibble to output j + 16; bit i
of a nibble is channel 4 * quad + i. Planes of one output lie side by side so that one multiply-add
of adjacent bytes weighs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import ShapeError
from elute.types import ACT_BLOCK, F16, LUT_WIDTH, PANEL, U8, PackedMatrix, QuantizedMatrix

HALF_PANEL = PANEL // 2
QUADS_PER_BLOCK = ACT_BLOCK // LUT_WIDTH
MIN_GROUP = 16  # activation sums are kept for runs of 16 channels

# The four codes of a quad are the bytes of a little-endian u32 x. Its plane 0 is x & _LOW_BITS:
# bits 0, 8, 16 and 24. One multiply moves those four together, another apart; no two products meet
# in one bit, so nothing carries.
#   channel      0        1        2        3
#   from bit     0        8        16       24
#   * _GATHER    +24=24   +17=25   +10=26   +3=27    >> 24 = nibble, no other product is left
#   * _SPREAD    +0=0     +7=8     +14=16   +21=24   from bits 0-3; & _LOW_BITS drops the rest
_LOW_BITS = np.uint32(0x01010101)
_GATHER = np.uint32(1 << 24 | 1 << 17 | 1 << 10 | 1 << 3)
_SPREAD = np.uint32(1 | 1 << 7 | 1 << 14 | 1 << 21)
_CHUNK_BYTES = 1 << 20  # codes turned at once: a step's arrays stay in cache, temporaries small


def sections(bits: int) -> Iterator[tuple[int, int]]:
    """-> (first plane, number of planes) of each section of a `bits`-bit code."""
    first = 0
    for width in (4, 4, 2, 1):
        if bits - first >= width:
            yield first, width
            first += width


def check_groups(n_columns: int, group_size: int, *, where: str = "matrix") -> None:
    """Raises ShapeError unless a matrix of `n_columns` can be packed with this group size."""
    if n_columns % LUT_WIDTH:
        raise ShapeError(
            f"{where}: K={n_columns} is not a multiple of {LUT_WIDTH}; pad K to "
            f"{-(-n_columns // LUT_WIDTH) * LUT_WIDTH}"
        )
    if group_size == n_columns:
        return
    if group_size < MIN_GROUP or (ACT_BLOCK % group_size and group_size % ACT_BLOCK):
        raise ShapeError(
            f"{where}: group_size={group_size} neither divides {ACT_BLOCK} nor is a multiple of "
            f"it; use group_size=16, 32, 64, 128, 256 or the whole row ({n_columns})"
        )
    if n_columns % group_size:
        fitting = [str(g) for g in (128, 64, 32, 16) if n_columns % g == 0]
        raise ShapeError(
            f"{where}: K={n_columns} is not a multiple of group_size={group_size}; "
            f"use group_size={', '.join([*fitting, str(n_columns)])}"
        )


def planes_bytes(n_outputs: int, n_columns: int, bits: int) -> int:
    """Size of the packed planes of w[n_outputs, n_columns]."""
    return -(-n_outputs // PANEL) * (n_columns // LUT_WIDTH) * HALF_PANEL * bits


def pack_codes(codes: U8, bits: int) -> U8:
    """codes u8 [N, K] in [0, 2**bits) -> planes u8 [planes_bytes(N, K, bits)]."""
    n, k = codes.shape
    if k % LUT_WIDTH:
        raise ShapeError(f"codes: K={k} is not a multiple of {LUT_WIDTH}; pad K")
    largest = int(codes.max(initial=0))
    if largest >> bits:
        raise ShapeError(f"codes: found {largest}, wanted below {1 << bits} for {bits} bits")
    planes = np.empty((-(-n // PANEL), k // LUT_WIDTH * HALF_PANEL * bits), np.uint8)
    for first, last in _panel_chunks(n, k):
        rows = codes[first * PANEL : last * PANEL]
        if rows.shape[0] < (last - first) * PANEL:
            rows = np.concatenate([rows, np.zeros((last * PANEL - n, k), np.uint8)])
        quads = np.ascontiguousarray(rows).view("<u4").reshape(last - first, 2, HALF_PANEL, -1)
        for first_plane, width in sections(bits):
            words = np.zeros(quads.shape, np.uint32)
            for plane in range(width):
                bit = (quads >> (first_plane + plane)) & _LOW_BITS
                words |= (bit * _GATHER >> 24) << (8 * plane)
            both_halves = words[:, 0] | (words[:, 1] << 4)  # [panel, j, quad]
            for at, section in _section_views(planes[first:last], k, bits, first_plane, width):
                section[...] = both_halves[:, :, at].transpose(0, 2, 1)
    return planes.reshape(-1)


def unpack_codes(planes: U8, shape: tuple[int, int], bits: int) -> U8:
    """The exact inverse of pack_codes. -> codes u8 [N, K]."""
    n, k = shape
    by_panel = planes[: planes_bytes(n, k, bits)].reshape(-(-n // PANEL), -1)
    codes = np.empty((n, k), np.uint8)
    for first, last in _panel_chunks(n, k):
        quads = np.zeros((last - first, 2, HALF_PANEL, k // LUT_WIDTH), np.dtype("<u4"))
        for first_plane, width in sections(bits):
            words = np.empty((last - first, HALF_PANEL, k // LUT_WIDTH), np.uint32)
            for at, section in _section_views(by_panel[first:last], k, bits, first_plane, width):
                words[:, :, at] = section.transpose(0, 2, 1)
            for half in range(2):
                for plane in range(width):
                    nibble = (words >> (8 * plane + 4 * half)) & 0xF
                    quads[:, half] |= (nibble * _SPREAD & _LOW_BITS) << (first_plane + plane)
        rows = quads.view(np.uint8).reshape(-1, k)
        codes[first * PANEL : last * PANEL] = rows[: n - first * PANEL]
    return codes


def _panel_chunks(n_outputs: int, n_columns: int) -> Iterator[tuple[int, int]]:
    """-> [first, last) panels of about _CHUNK_BYTES codes each."""
    n_panels = -(-n_outputs // PANEL)
    step = max(1, _CHUNK_BYTES // max(1, PANEL * n_columns))
    for first in range(0, n_panels, step):
        yield first, min(first + step, n_panels)


def _section_views(
    planes: U8, n_columns: int, bits: int, first_plane: int, width: int
) -> Iterator[tuple[slice, npt.NDArray[np.unsignedinteger[Any]]]]:
    """Views of one section in planes u8 [panels, bytes], its 1, 2 or 4 plane bytes as one word.

    -> (slice of quads, words [panels, quads of the slice, HALF_PANEL]) for each block.
    """
    word = np.dtype({1: "u1", 2: "<u2", 4: "<u4"}[width])
    n_quads = n_columns // LUT_WIDTH
    for first_quad in range(0, n_quads, QUADS_PER_BLOCK):
        quads = min(QUADS_PER_BLOCK, n_quads - first_quad)
        at = HALF_PANEL * (first_quad * bits + quads * first_plane)
        section = planes[:, at : at + HALF_PANEL * quads * width].view(word)
        yield (
            slice(first_quad, first_quad + quads),
            section.reshape(section.shape[0], quads, HALF_PANEL),
        )


def pack_groups(values: F16) -> F16:
    """scales or offsets f16 [G, N] -> f16 [n_panels, G, PANEL], zero in padded outputs."""
    groups, n = values.shape
    n_panels = -(-n // PANEL)
    padded = np.zeros((groups, n_panels * PANEL), np.float16)
    padded[:, :n] = values
    return np.ascontiguousarray(padded.reshape(groups, n_panels, PANEL).transpose(1, 0, 2))


def unpack_groups(packed: F16, n_outputs: int) -> F16:
    """The exact inverse of pack_groups. -> f16 [G, N]."""
    n_panels, groups, _ = packed.shape
    return np.ascontiguousarray(
        packed.transpose(1, 0, 2).reshape(groups, n_panels * PANEL)[:, :n_outputs]
    )


def pack(matrix: QuantizedMatrix, *, where: str = "matrix") -> PackedMatrix:
    """Codes to quads. Raises ShapeError where check_groups does."""
    check_groups(matrix.shape[1], matrix.group_size, where=where)
    return PackedMatrix(
        shape=matrix.shape,
        planes=pack_codes(matrix.codes, matrix.bits),
        scales=pack_groups(matrix.scales),
        offsets=None if matrix.offsets is None else pack_groups(matrix.offsets),
        affine=matrix.affine,
        zero=matrix.zero,
        bits=matrix.bits,
        group_size=matrix.group_size,
        columns=matrix.columns,
    )


def unpack(packed: PackedMatrix) -> QuantizedMatrix:
    """The exact inverse of pack."""
    n = packed.shape[0]
    return QuantizedMatrix(
        codes=unpack_codes(packed.planes, packed.shape, packed.bits),
        scales=unpack_groups(packed.scales, n),
        offsets=None if packed.offsets is None else unpack_groups(packed.offsets, n),
        affine=packed.affine,
        zero=packed.zero,
        bits=packed.bits,
        group_size=packed.group_size,
        columns=packed.columns,
    )
