"""Shadow outlier execution in numpy: what the NPU clips, its product, and the sum of the two.

With a static scale s of an input, q = round(x / s). The NPU multiplies clip(q), which is int8; what
was clipped, r = q - clip(q), is sparse, and the CPU multiplies it by the few rows of w.T that it
needs. Law: clip(q) + r == q, and the two products add up to that of q, in integers. Rounding is to
the nearest, ties to even; x / s is a division of f32.

Plain code: the functions of elute._native with the same names equal it, bit for bit, floats
included. Source: llm.npu (arXiv 2407.05858), section 3.3; its equation 1 as printed is no identity.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.npu.device import Q_MAX
from elute.types import F32, I8, I32, I64, QuantizedMatrix

Q_MIN_INPUT, Q_MAX_INPUT = -128, 127
MOST_STEPS = 1 << 24  # |q|: f32 holds all whole numbers up to here


def split_outliers(x: F32, scale: float) -> tuple[I8, I32, I32, I32]:
    """x f32 [M, K] -> q i8 [M, K], starts i32 [M + 1], channels i32 [n], residuals i32 [n].

    Row m clips residuals[starts[m]:starts[m + 1]], of those channels, ascending.

    Raises ValueError where x is not finite or more than MOST_STEPS steps from 0.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(x / np.float32(scale))
    refused = np.argwhere(~(np.abs(steps) <= MOST_STEPS))
    if refused.size:
        row, channel = refused[0]
        raise ValueError(
            f"x[{row}, {channel}]: found {x[row, channel]:g}, wanted a finite number of at most "
            f"2^24 steps of {scale:g}"
        )
    q = steps.astype(np.int32)
    clipped = np.clip(q, Q_MIN_INPUT, Q_MAX_INPUT)
    residuals = q - clipped
    rows, channels = np.nonzero(residuals)
    starts = np.searchsorted(rows, np.arange(len(x) + 1)).astype(np.int32)
    return clipped.astype(np.int8), starts, channels.astype(np.int32), residuals[rows, channels]


def quantize_weights(w: F32, weight_scales: F32) -> I8:
    """w f32 [N, K], weight_scales f32 [1] or [N] -> Wq i8 [N, K] within +-Q_MAX.

    Raises ValueError for weights that are not finite.
    """
    if not np.isfinite(w).all():
        raise ValueError("weights: found one that is not finite; the model is damaged")
    with np.errstate(over="ignore"):
        steps = np.rint(w / weight_scales[:, None])
    quantized: I8 = np.clip(steps, -Q_MAX, Q_MAX).astype(np.int8)
    return quantized


def weight_columns(matrix: QuantizedMatrix, columns: I32, weight_scales: F32) -> I8:
    """Rows of Wq.T of stored columns. -> i8 [C, N]."""
    w = replace(matrix, columns=None).dequantize()[:, columns]
    return np.ascontiguousarray(quantize_weights(w, weight_scales).T)


def weight_rows(matrix: QuantizedMatrix, outputs: I32, weight_scales: F32) -> I8:
    """Rows of Wq, in stored order of columns. -> i8 [R, K]."""
    w = replace(matrix, columns=None).dequantize()[outputs]
    scales = weight_scales if len(weight_scales) == 1 else weight_scales[outputs]
    return quantize_weights(w, scales)


def shadow_product(starts: I32, slots: I32, residuals: I32, rows: I8) -> I64:
    """The residuals times rows i8 [C, N] of Wq.T, residual i by row slots[i]. -> i64 [M, N]."""
    product = np.zeros((len(starts) - 1, rows.shape[1]), np.int64)
    for row, (begin, end) in enumerate(pairwise(starts)):
        weights = rows[slots[begin:end]].astype(np.int64)
        product[row] = residuals[begin:end].astype(np.int64) @ weights
    return product


def unclipped(q: I8, starts: I32, channels: I32, residuals: I32) -> I64:
    """clip(q) + r. -> i64 [M, K]."""
    whole = q.astype(np.int64)
    np.add.at(whole, (np.repeat(np.arange(len(q)), np.diff(starts)), channels), residuals)
    return whole


def saturated_products(
    q: I8, starts: I32, channels: I32, residuals: I32, rows: I8, at_rows: I32, at_slots: I32
) -> I64:
    """Whole products of single elements, whose int8 result saturated. -> i64 [n].

    rows i8 [R, K] of Wq; element i is that of row at_rows[i] of x and of rows[at_slots[i]].
    """
    whole = unclipped(q, starts, channels, residuals)
    products: I64 = (whole[at_rows] * rows[at_slots].astype(np.int64)).sum(axis=1)
    return products


def finish_product(
    result: npt.NDArray[Any],
    shadow: npt.NDArray[Any] | None,
    scales: F32,
    bias: F32 | None,
    y: F32,
    output_scale: float = 0.0,
) -> None:
    """y f32 [M, N] of what a device returned and the shadow's product, from left to right:

    result i32   scale * float(result + shadow) + bias       the sum exact, rounded once
    result i8    output_scale * result + scale * float(shadow) + bias
    result f32   result + scale * float(shadow) + bias

    scales f32 [1] or [N], input scale times weight scale. What is None is not added.
    """
    if result.dtype == np.int32:
        total = result.astype(np.int64) if shadow is None else result.astype(np.int64) + shadow
        y[...] = scales * total.astype(np.float32)
    else:
        small = result.dtype == np.int8
        y[...] = np.float32(output_scale) * result.astype(np.float32) if small else result
        if shadow is not None:
            y += scales * shadow.astype(np.float32)
    if bias is not None:
        y += bias
