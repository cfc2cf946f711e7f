"""Activations as the integer kernels see them: int8, a scale per ACT_BLOCK, and lookup tables.

One quantization serves decode and prefill. It is chosen so that a table of all 16 subset sums of
4 activations, shifted to start at zero, fits a byte *exactly*: then a lookup is an integer
multiply, bit for bit, and a token's result does not depend on whether it was computed alone
(tables) or in a chunk (multiplies).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elute.errors import ShapeError
from elute.types import ACT_BLOCK, F32, I8, I32, LUT_WIDTH, U8

MAX_CODE = np.float32(127)  # int8, kept symmetric
# The span of a table is sum(|q|) <= sum(|x|)/scale + 4 * 0.5 (rounding), and must fit 255.
MAX_SPAN = np.float32(253)


@dataclass(frozen=True, eq=False)
class Activations:
    """x f32 [M, K] ~ q * scale.

    q       i8  [M, Kp]                K padded with zeros to Kp = n_blocks * ACT_BLOCK
    scales  f32 [M, n_blocks]
    """

    q: I8
    scales: F32
    n_columns: int


def quantize_activations(x: F32) -> Activations:
    """x f32 [M, K] -> int8 codes and one scale per ACT_BLOCK. |x - q*scale| <= scale/2.

    A block that holds a NaN or an infinity has it for its scale, so no product hides it.
    """
    m, k = x.shape
    n_blocks = -(-k // ACT_BLOCK)
    padded = np.zeros((m, n_blocks * ACT_BLOCK), np.float32)
    padded[:, :k] = x
    magnitude = np.abs(padded).reshape(m, n_blocks, ACT_BLOCK // LUT_WIDTH, LUT_WIDTH)
    # The order of these additions is part of the contract: C++ must find the same scale.
    spans = (magnitude[..., 0] + magnitude[..., 1]) + (magnitude[..., 2] + magnitude[..., 3])
    largest = magnitude.max(axis=(2, 3), initial=0) * (np.float32(1) / MAX_CODE)
    widest = spans.max(axis=2, initial=0) * (np.float32(1) / MAX_SPAN)
    scales = np.maximum(largest, widest).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales > np.finfo(np.float32).tiny, np.float32(1) / scales, 0)
    blocks = padded.reshape(m, n_blocks, ACT_BLOCK)
    with np.errstate(invalid="ignore"):  # NaN and infinity: the scale tells, whatever the codes
        q = np.rint(blocks * inverse.astype(np.float32)[:, :, None]).astype(np.int8)
    return Activations(q=q.reshape(m, -1), scales=scales, n_columns=k)


@dataclass(frozen=True, eq=False)
class Tables:
    """All subset sums of each quad's activations.

    entries  u8  [M, n_quads, 16]   subset sum minus `lows`; entries i and 15-i add to the span
    lows     i32 [M, n_quads]       the smallest subset sum: the sum of the negative activations
    """

    entries: U8
    lows: I32


def build_tables(activations: Activations) -> Tables:
    """Mirror-consolidated: eight entries are summed, the other eight are span - entry.

    Source: T-MAC, arXiv 2407.00088 §3.3. Differs: subset sums from zero instead of signed sums,
    which have all the same parity and so waste a bit; entries are exact sums of int8 activations,
    not rounded themselves.
    """
    q = activations.q.astype(np.int32).reshape(activations.q.shape[0], -1, LUT_WIDTH)
    if np.abs(q).sum(axis=-1).max(initial=0) > 255:
        raise ShapeError(
            "activations: a table spans more than 255; quantize with quantize_activations"
        )
    lows = np.minimum(q, 0).sum(axis=-1)
    span = np.abs(q).sum(axis=-1)
    entries = np.empty((*q.shape[:2], 16), np.uint8)
    for i in range(8):
        subset = sum((q[..., bit] for bit in range(3) if i >> bit & 1), start=np.zeros_like(lows))
        entries[..., i] = subset - lows
        entries[..., 15 - i] = span - (subset - lows)
    return Tables(entries=entries, lows=lows.astype(np.int32))
