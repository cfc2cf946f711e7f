"""Types of the key-value cache, and their rounding in numpy: what the native kernels must hold."""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never

import numpy as np

from elute.errors import ShapeError, UnsupportedError
from elute.types import F32, I8

MOST_CODE = 127
LEAST_PEAK = np.float32(2.0**-100)  # rows whose largest value is below this count as 0
MOST_Q8_WIDTH = 512  # head width: 512 products of 15 and 7 bits add up in 32


class CacheType(StrEnum):
    F16 = "f16"
    Q8 = "q8"  # 8-bit codes, one f32 scale for a position's key, one for its value


def cache_type(name: str, *, head_width: int) -> CacheType:
    """Raises ShapeError for an unknown name, UnsupportedError for heads that q8 cannot hold."""
    try:
        found = CacheType(name)
    except ValueError:
        raise ShapeError(
            f"cache_type: found {name!r}, wanted one of {', '.join(CacheType)}"
        ) from None
    if found is CacheType.Q8 and head_width > MOST_Q8_WIDTH:
        raise UnsupportedError(
            f"cache_type: found q8 for heads of width {head_width}, wanted at most "
            f"{MOST_Q8_WIDTH}; use f16"
        )
    return found


def position_bytes(kind: CacheType, *, n_kv_heads: int, head_width: int) -> int:
    """Of the keys and values of one position in one layer; q8 pads values to 16 channels."""
    match kind:
        case CacheType.F16:
            return 2 * 2 * n_kv_heads * head_width
        case CacheType.Q8:
            padded = -(-head_width // 16) * 16
            return n_kv_heads * (head_width + padded + 2 * 4)
        case _:
            assert_never(kind)


def quantize_q8(x: F32) -> tuple[I8, F32]:
    """x f32 [..., D] -> codes i8 [..., D], scales f32 [..., 1]: x = codes * scales, rounded.

    A scale is the largest |x| / 127, NaN where one is not finite.
    """
    peak = np.abs(x).max(axis=-1, keepdims=True)
    peak = np.where(np.isfinite(x).all(axis=-1, keepdims=True), peak, np.float32(np.nan))
    some = peak > LEAST_PEAK
    factor = np.divide(np.float32(MOST_CODE), peak, out=np.zeros_like(peak), where=some)
    with np.errstate(invalid="ignore"):
        codes = np.where(some, np.rint(x * factor), 0).astype(np.int8)
    scales = np.where(some | np.isnan(peak), peak / np.float32(MOST_CODE), np.float32(0))
    return codes, scales


def rounded(x: F32, kind: CacheType) -> F32:
    """x f32 [..., D] as the cache gives it back."""
    match kind:
        case CacheType.F16:
            with np.errstate(over="ignore"):
                return x.astype(np.float16).astype(np.float32)
        case CacheType.Q8:
            codes, scales = quantize_q8(x)
            return codes * scales
        case _:
            assert_never(kind)
