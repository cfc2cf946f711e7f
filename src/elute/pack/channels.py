"""The channel order of the planes and its exact inverse, in numpy. Moves bits, as quads.py does.

For matrices whose input channels are skipped and fetched one by one: each channel is a contiguous
row of all outputs' codes. Order of the bytes, outermost first (docs/packed-format.md shows an
example):

    row      a channel, row_bytes(N, bits)
    tile     TILE = 128 outputs; those beyond N hold code 0
    section  the planes of a code in runs of 4, 2 and 1, as in quads.py
    byte     position % (16 * planes of the section), in 16 * planes bytes
    field    position // (16 * planes), of as many bits as the section has planes

Position 64h + 16L + 4i + m holds output 64h + 16i + 4L + m (h 0..1; L, i, m 0..3): bytes of four
channels, interleaved within lanes of 16 bytes, are then consecutive outputs at every vector width.
Scales and offsets are those of quads.py.
"""

from __future__ import annotations

import numpy as np

from elute.errors import ShapeError
from elute.pack.quads import sections
from elute.types import U8

TILE = 128
_CHUNK_BYTES = 1 << 20  # codes turned at once: a step's arrays stay in cache, temporaries small


def row_bytes(n_outputs: int, bits: int) -> int:
    """Size of a channel's row of a matrix of n_outputs outputs."""
    return -(-n_outputs // TILE) * 16 * bits


def pack_codes(codes: U8, bits: int) -> U8:
    """codes u8 [N, K] in [0, 2**bits) -> rows u8 [K, row_bytes(N, bits)]."""
    n, k = codes.shape
    largest = int(codes.max(initial=0))
    if largest >> bits:
        raise ShapeError(f"codes: found {largest}, wanted below {1 << bits} for {bits} bits")
    n_tiles = -(-n // TILE)
    rows = np.empty((k, n_tiles, 16 * bits), np.uint8)
    step = max(1, _CHUNK_BYTES // max(1, n_tiles * TILE))
    for at in range(0, k, step):
        chunk = rows[at : at + step]
        outputs = np.zeros((len(chunk), n_tiles * TILE), np.uint8)
        outputs[:, :n] = codes[:, at : at + step].T
        positions = _swap_lanes(outputs)
        for first_plane, width in sections(bits):
            fields = positions.reshape(len(chunk), n_tiles, 8 // width, 16 * width)
            section = chunk[:, :, 16 * first_plane : 16 * (first_plane + width)]
            section[...] = 0
            for field in range(8 // width):
                of_section = fields[:, :, field] >> first_plane & ((1 << width) - 1)
                section |= of_section << (width * field)
    return rows.reshape(k, -1)


def unpack_codes(rows: U8, n_outputs: int, bits: int) -> U8:
    """The exact inverse of pack_codes. -> codes u8 [N, K]."""
    k = rows.shape[0]
    n_tiles = -(-n_outputs // TILE)
    by_tile = rows.reshape(k, n_tiles, 16 * bits)
    codes = np.empty((n_outputs, k), np.uint8)
    step = max(1, _CHUNK_BYTES // max(1, n_tiles * TILE))
    for at in range(0, k, step):
        chunk = by_tile[at : at + step]
        positions = np.zeros((len(chunk), n_tiles, TILE), np.uint8)
        for first_plane, width in sections(bits):
            fields = positions.reshape(len(chunk), n_tiles, 8 // width, 16 * width)
            section = chunk[:, :, 16 * first_plane : 16 * (first_plane + width)]
            for field in range(8 // width):
                of_section = section >> (width * field) & ((1 << width) - 1)
                fields[:, :, field] |= of_section << first_plane
        codes[:, at : at + step] = _swap_lanes(positions.reshape(len(chunk), -1))[:, :n_outputs].T
    return codes


def _swap_lanes(values: U8) -> U8:
    """values u8 [K, n_tiles * TILE] by output -> by position, and back: its own inverse."""
    return np.ascontiguousarray(
        values.reshape(values.shape[0], -1, 4, 4, 4).transpose(0, 1, 3, 2, 4)
    ).reshape(values.shape)
