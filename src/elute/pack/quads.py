"""The quad layout and its exact inverse, in numpy. Moves bits; knows nothing of files or kernels.

A quad is LUT_WIDTH = 4 consecutive input channels for all outputs, one nibble per output and bit plane.
Order of the bytes, outermost first (docs/packed-format.md shows an example):

    panel    PANEL = 32 outputs
    block    ACT_BLOCK = 64 channels (the last one of a row may be shorter)
    section  the planes of a code in runs of 4, 2 and 1: 7 bits = planes 0-3, planes 4-5, plane 6
    quad     4 channels
    byte     j * (planes of the section) + plane, for j in 0..15

The low nibble of a byte belongs to output j of the panel, the high nibble to output j + 16; bit i of a nibble is
channel 4 * quad + i. Planes of one output lie side by side so that one multiply-add of adjacent bytes weighs them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elute.errors import ShapeError
from elute.types import ACT_BLOCK, F16, LUT_WIDTH, PANEL, U8, PackedMatrix, QuantizedMatrix

HALF_PANEL = PANEL // 2
QUADS_PER_BLOCK = ACT_BLOCK // LUT_WIDTH
MIN_GROUP = 16  # activation sums are kept for runs of 16 channels


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
            f"{where}: group_size={group_size} neither divides {ACT_BLOCK} nor is a multiple of it; "
            f"use group_size=16, 32, 64, 128, 256 or the whole row ({n_columns})"
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
    if codes.size and int(codes.max()) >> bits:
        raise ShapeError(f"codes: found {int(codes.max())}, wanted below {1 << bits} for {bits} bits")
    n_panels, n_quads = -(-n // PANEL), k // LUT_WIDTH
    padded = np.zeros((n_panels * PANEL, k), np.uint8)
    padded[:n] = codes
    # [panel, half, j, quad, channel]
    by_quad = padded.reshape(n_panels, 2, HALF_PANEL, n_quads, LUT_WIDTH)
    parts: list[U8] = []
    for first_quad in range(0, n_quads, QUADS_PER_BLOCK):
        block = by_quad[:, :, :, first_quad : first_quad + QUADS_PER_BLOCK]
        for first_plane, width in sections(bits):
            section = np.zeros((n_panels, block.shape[3], HALF_PANEL, width), np.uint8)
            for plane in range(width):
                bit = (block >> (first_plane + plane)) & 1
                nibble = sum(
                    (bit[..., i] << i for i in range(1, LUT_WIDTH)), start=bit[..., 0]
                )  # [panel, half, j, quad]
                byte = nibble[:, 0] | (nibble[:, 1] << 4)
                section[..., plane] = byte.transpose(0, 2, 1)
            parts.append(section.reshape(n_panels, -1))
    if not parts:
        return np.zeros(0, np.uint8)
    return np.ascontiguousarray(np.concatenate(parts, axis=1)).reshape(-1)


def unpack_codes(planes: U8, shape: tuple[int, int], bits: int) -> U8:
    """The exact inverse of pack_codes. -> codes u8 [N, K]."""
    n, k = shape
    n_panels, n_quads = -(-n // PANEL), k // LUT_WIDTH
    by_panel = planes[: planes_bytes(n, k, bits)].reshape(n_panels, -1)
    codes = np.zeros((n_panels, 2, HALF_PANEL, n_quads, LUT_WIDTH), np.uint8)
    at = 0
    for first_quad in range(0, n_quads, QUADS_PER_BLOCK):
        quads = min(QUADS_PER_BLOCK, n_quads - first_quad)
        block = codes[:, :, :, first_quad : first_quad + quads]
        for first_plane, width in sections(bits):
            size = quads * HALF_PANEL * width
            section = by_panel[:, at : at + size].reshape(n_panels, quads, HALF_PANEL, width)
            at += size
            for plane in range(width):
                byte = section[..., plane].transpose(0, 2, 1)  # [panel, j, quad]
                for half in range(2):
                    for i in range(LUT_WIDTH):
                        bit = (byte >> (4 * half + i)) & 1
                        block[:, half, :, :, i] |= bit << (first_plane + plane)
    return codes.reshape(n_panels * PANEL, k)[:n]


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
