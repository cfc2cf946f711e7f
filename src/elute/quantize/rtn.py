"""Round-to-nearest: every weight becomes the nearest code of its group, with no calibration data.

Asymmetric groups are stored as MIN, not ZERO: a group of equal weights is exact (scale 0), and the
offset keeps its precision however far from zero the group lies, where a zero point in code units
would overflow f16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import ShapeError
from elute.quantize.groups import check_f16, floor_to_f16, row_groups, scale_to_f16
from elute.types import F16, F32, U8, Affine, QuantizedMatrix


def quantize(
    w: npt.NDArray[Any],
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    where: str = "matrix",
    first_row: int = 0,
) -> QuantizedMatrix:
    """The codes nearest to w, under scales and offsets already rounded to f16.

    w          f32, f16 or bf16 [N, K]
    symmetric  SYMMETRIC with zero = 2**(bits-1), scales of either sign; otherwise MIN
    where      the tensor's name, and first_row the number of row w[0] in it, for messages

    Codes end on the extreme weights of a group. Below 4 bits a group takes, where its squared error
    is less, codes that share its range equally, whose step is smaller. Both keep, above 1 bit,
        |w - dequantized| <= |scale|/2 + 2**-11 * (2**bits * |scale| + |offset|)      (+ 2**-24)
    1 bit is the sign of w - center times its mean magnitude, center 0 (symmetric) or the group's
    mean, as MIN: that halves no step, but it is the least squared error for two codes.

    Raises ShapeError for bits outside 1..8 or a group_size that does not divide K, FormatError for
    weights that are not finite or whose scale or offset exceeds f16.
    """
    if not 1 <= bits <= 8:
        raise ShapeError(f"{where}: bits={bits}, wanted 1 to 8; choose a width in that range")
    groups = row_groups(w, group_size, where=where, first_row=first_row)
    n, k = w.shape
    n_groups = k // group_size
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n_groups, n), np.float16)
    with_offsets = bits == 1 or not symmetric
    offsets = np.empty((n_groups, n), np.float16) if with_offsets else None
    zero = 0 if with_offsets else 1 << (bits - 1)
    # f16 overflow becomes an infinity, which check_f16 reports
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, x in groups:
            if bits == 1:
                fits = [_sign_fit(x, centered=not symmetric)]
            elif symmetric:
                fits = _symmetric_fits(x, bits)
            else:
                fits = _min_fits(x, bits)
            for scale, offset in fits:
                # the scale spans from the offset, so the offset is the one to blame first
                check_f16(offset, "offset", where=where, first_row=first_row + rows.start)
                check_f16(scale, "scale", where=where, first_row=first_row + rows.start)
            chosen, scale, offset = _best(x, fits, zero=zero, largest=(1 << bits) - 1)
            codes[rows] = chosen.reshape(-1, k)
            scales[:, rows] = scale.T
            if offsets is not None:
                offsets[:, rows] = offset.T
    return QuantizedMatrix(
        codes=codes,
        scales=scales,
        offsets=offsets,
        affine=Affine.MIN if with_offsets else Affine.SYMMETRIC,
        zero=zero,
        bits=bits,
        group_size=group_size,
    )


# From here up, exact extremes are worth more than a step that is smaller by 1/2**bits. Perplexity
# of SmolLM2-135M (its Q4_1 weights quantized again, groups of 64, 4 windows of 512): both fits
# against ends alone are 157 : 208 at 3 bits, but 32.3 : 30.8 at 4 (symmetric, groups of 32:
# 28.5 : 27.5).
_ENDS_ONLY_BITS = 4

Fit = tuple[F16, F16]  # scale and offset of each group [rows, groups]; offset 0 when symmetric


def _min_fits(x: F32, bits: int) -> list[Fit]:
    low, high = x.min(axis=-1), x.max(axis=-1)
    # The offset is rounded down and the scale spans from there, so that a group far from zero pays
    # for its coarse offset with a wider step, not with clipped weights.
    end_offset = floor_to_f16(low)
    span = high - end_offset.astype(np.float32)
    end_scale = scale_to_f16(span / np.float32((1 << bits) - 1))
    if bits >= _ENDS_ONLY_BITS:
        return [(end_scale, end_offset)]
    share_scale = scale_to_f16(span / np.float32(1 << bits))
    share_offset = end_offset.astype(np.float32) + share_scale.astype(np.float32) / 2
    return [(end_scale, end_offset), (share_scale, share_offset.astype(np.float16))]


def _symmetric_fits(x: F32, bits: int) -> list[Fit]:
    low, high = x.min(axis=-1), x.max(axis=-1)
    below = 1 << (bits - 1)  # codes below zero; one fewer above it
    fits: list[Fit] = []
    for margin in (0.0,) if bits >= _ENDS_ONLY_BITS else (0.0, 0.5):
        above_step, below_step = np.float32(below - 1 + margin), np.float32(below + margin)
        positive = np.maximum(high / above_step, -low / below_step)
        negative = np.maximum(-low / above_step, high / below_step)  # the spare code goes to `high`
        scale = scale_to_f16(np.where(positive <= negative, positive, -negative))
        fits.append((scale, np.zeros_like(scale)))
    return fits


def _sign_fit(x: F32, *, centered: bool) -> Fit:
    center = x.mean(axis=-1) if centered else np.zeros(x.shape[:2], np.float32)
    magnitude = np.abs(x - center[..., None]).mean(axis=-1)
    return scale_to_f16(2 * magnitude), (center - magnitude).astype(np.float16)


def _best(x: F32, fits: list[Fit], *, zero: int, largest: int) -> tuple[U8, F16, F16]:
    """-> codes [rows, groups, group_size], scale and offset of the fit with the least error."""
    codes, scale, offset = _round(x, fits[0], zero=zero, largest=largest), *fits[0]
    error = _squared_error(x, codes, fits[0], zero=zero)
    for fit in fits[1:]:
        other = _round(x, fit, zero=zero, largest=largest)
        other_error = _squared_error(x, other, fit, zero=zero)
        better = other_error < error
        codes = np.where(better[..., None], other, codes)
        scale, offset = np.where(better, fit[0], scale), np.where(better, fit[1], offset)
        error = np.minimum(error, other_error)
    return codes.astype(np.uint8), scale, offset


def _round(x: F32, fit: Fit, *, zero: int, largest: int) -> F32:
    scale, offset = (part.astype(np.float32)[..., None] for part in fit)
    steps = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = (x - offset) * steps
    np.rint(codes, out=codes)
    codes += np.float32(zero)
    return np.clip(codes, 0, largest, out=codes)


def _squared_error(x: F32, codes: F32, fit: Fit, *, zero: int) -> F32:
    scale, offset = (part.astype(np.float32)[..., None] for part in fit)
    error = (codes - np.float32(zero)) * scale
    error += offset
    error -= x
    result: F32 = np.einsum("rgk,rgk->rg", error, error)
    return result
