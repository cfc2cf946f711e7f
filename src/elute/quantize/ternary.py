"""Ternary by mean magnitude: each weight becomes -1, 0 or 1 times one scale a group (or a row)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from elute.quantize.groups import check_f16, row_groups, scale_to_f16
from elute.quantize.recipe import TERNARY_BITS, TERNARY_ZERO
from elute.types import Affine, QuantizedMatrix


def quantize(
    w: npt.NDArray[Any], *, group_size: int, where: str = "matrix", first_row: int = 0
) -> QuantizedMatrix:
    """code = clip(round(w / scale), -1, 1) + 1 with scale = mean |w| of the group, rounded to f16.

    w f32, f16 or bf16 [N, K]; group_size = K gives one scale a row. A matrix of ternary weights
    keeps its zeros and signs, but its scale only in groups without a zero.

    Raises ShapeError unless group_size divides K, FormatError for weights that are not finite or
    whose scale exceeds f16.
    Source: BitNet b1.58, arXiv 2402.17764 §2. Differs: a scale per group or row, not per matrix.
    """
    groups = row_groups(w, group_size, where=where, first_row=first_row)
    n, k = w.shape
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((k // group_size, n), np.float16)
    with np.errstate(over="ignore"):
        for rows, x in groups:
            scale = scale_to_f16(np.abs(x).mean(axis=-1))
            check_f16(scale, "scale", where=where, first_row=first_row + rows.start)
            wide = scale.astype(np.float32)[..., None]
            steps = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
            codes[rows] = (np.clip(np.rint(x * steps), -1, 1) + TERNARY_ZERO).reshape(-1, k)
            scales[:, rows] = scale.T
    return QuantizedMatrix(
        codes=codes,
        scales=scales,
        offsets=None,
        affine=Affine.SYMMETRIC,
        zero=TERNARY_ZERO,
        bits=TERNARY_BITS,
        group_size=group_size,
    )
