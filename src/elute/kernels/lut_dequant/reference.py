"""Two-level lookup: bit planes to weights without shifting bit by bit (T-MAN, arXiv 2511.11248)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elute.kernels.activations import Activations
from elute.kernels.lut_matmul.reference import matmul
from elute.pack import quads
from elute.types import ACT_BLOCK, F32, LUT_WIDTH, PANEL, U8, Affine, PackedMatrix


def repack_table(plane: int) -> npt.NDArray[np.uint32]:
    """Level 1 of one plane: nibble -> 4 bytes; byte i has its bit i at `plane`. u32 [16]"""
    index = np.arange(16, dtype=np.uint32)
    return sum(
        ((index >> i & 1) << (8 * i + plane) for i in range(LUT_WIDTH)),
        start=np.zeros(16, np.uint32),
    ).astype(np.uint32)


def codes_by_table(packed: PackedMatrix) -> U8:
    """Level 1: the tables of all planes, looked up and or-ed. -> u8 [N, K] == quads.unpack_codes"""
    n, k = packed.shape
    n_panels, n_quads = packed.n_panels, k // LUT_WIDTH
    by_panel = packed.planes[: quads.planes_bytes(n, k, packed.bits)].reshape(n_panels, -1)
    words = np.zeros((n_panels, 2, quads.HALF_PANEL, n_quads), np.uint32)
    at = 0
    for first_quad in range(0, n_quads, quads.QUADS_PER_BLOCK):
        count = min(quads.QUADS_PER_BLOCK, n_quads - first_quad)
        for first_plane, width in quads.sections(packed.bits):
            size = count * quads.HALF_PANEL * width
            section = by_panel[:, at : at + size].reshape(n_panels, count, quads.HALF_PANEL, width)
            at += size
            for plane in range(width):
                table = repack_table(first_plane + plane)
                byte = section[..., plane].transpose(0, 2, 1)
                for half in range(2):
                    nibble = byte >> (4 * half) & 15
                    words[:, half, :, first_quad : first_quad + count] |= table[nibble]
    codes = words.astype("<u4").view(np.uint8).reshape(n_panels * PANEL, k)
    return codes[:n]


def value_table(packed: PackedMatrix, group: int) -> F32:
    """Level 2 of one group: code -> weight, for every output. f32 [N, 2**bits]."""
    n = packed.shape[0]
    code: F32 = np.arange(1 << packed.bits, dtype=np.float32)
    scale: F32 = quads.unpack_groups(packed.scales, n)[group].astype(np.float32)[:, None]
    if packed.affine is Affine.SYMMETRIC:
        symmetric: F32 = scale * (code - np.float32(packed.zero))
        return symmetric
    assert packed.offsets is not None
    offset: F32 = quads.unpack_groups(packed.offsets, n)[group].astype(np.float32)[:, None]
    table: F32 = scale * (code - offset) if packed.affine is Affine.ZERO else scale * code + offset
    return table


def lut_dequant(packed: PackedMatrix) -> F32:
    """w f32 [N, K]. Law 2: equals unpack-then-affine, QuantizedMatrix.dequantize, bit for bit."""
    n, k = packed.shape
    codes = codes_by_table(packed)
    w = np.empty((n, k), np.float32)
    for group in range(k // packed.group_size):
        columns = slice(group * packed.group_size, (group + 1) * packed.group_size)
        w[:, columns] = np.take_along_axis(
            value_table(packed, group), codes[:, columns].astype(np.int64), axis=1
        )
    if packed.columns is None:
        return w
    in_order = np.empty_like(w)
    in_order[:, packed.columns] = w
    return in_order


def gemm(activations: Activations, packed: PackedMatrix) -> F32:
    """The product of dequantized codes, floats in the order of lut_matmul. -> f32 [M, N]"""
    assert ACT_BLOCK % LUT_WIDTH == 0
    return matmul(activations, packed, by_lookup=False)
