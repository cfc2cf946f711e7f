"""A float matrix as groups of columns, a few rows at a time. Knows no codes.

Everything that quantizes walks a matrix through here, so that temporaries stay small and bad
weights are named the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import FormatError, ShapeError
from elute.types import F16, F32

F16_MAX = float(np.finfo(np.float16).max)
_F16_TINY = float(np.finfo(np.float16).tiny)  # below it f16 keeps fewer than 11 bits
_CHUNK_WEIGHTS = 1 << 18  # 1 MB of f32: a chunk's five temporaries stay in the second-level cache


def row_groups(
    w: npt.NDArray[Any], group_size: int, *, where: str, first_row: int
) -> Iterator[tuple[slice, F32]]:
    """-> (rows, their weights f32 [rows, K/group_size, group_size]), all of them finite.

    first_row is added to row numbers in messages, for callers that pass a slice of a matrix.
    Raises ShapeError unless w is 2-D and group_size divides K, FormatError at NaN or infinity.
    """
    if w.ndim != 2:
        raise ShapeError(
            f"{where}: found shape {w.shape}, wanted two dimensions [N, K]; reshape it"
        )
    k = w.shape[1]
    if group_size < 1 or k % group_size:
        raise ShapeError(
            f"{where}: K={k} is not a multiple of group_size={group_size}; "
            f"use a group_size that divides K, or K itself"
        )
    return _row_groups(w, group_size, where, first_row)


def _row_groups(
    w: npt.NDArray[Any], group_size: int, where: str, first_row: int
) -> Iterator[tuple[slice, F32]]:
    n, k = w.shape
    step = max(1, _CHUNK_WEIGHTS // max(1, k))
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        x = np.ascontiguousarray(w[rows], dtype=np.float32)
        if not np.isfinite(x).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
            raise FormatError(
                f"{where}: weight [{first_row + first + row}, {column}] is {x[row, column]}, "
                f"wanted a finite number; repair or re-download the checkpoint"
            )
        yield rows, x.reshape(x.shape[0], k // group_size, group_size)


def scale_to_f16(scale: F32) -> F16:
    """Nearest f16; where f16 is subnormal, the next one away from zero.

    Rounding a subnormal down may halve it or make it zero, and with it every weight of its group.
    """
    stored = scale.astype(np.float16)
    short = (np.abs(stored) < _F16_TINY) & (np.abs(stored.astype(np.float32)) < np.abs(scale))
    away = np.nextafter(stored, np.copysign(np.float16(np.inf), scale.astype(np.float16)))
    return np.where(short, away, stored)


def floor_to_f16(value: F32) -> F16:
    """The largest f16 that is not above value."""
    stored = value.astype(np.float16)
    below = np.nextafter(stored, np.float16(-np.inf))
    return np.where(stored.astype(np.float32) > value, below, stored)


def check_f16(stored: F16, what: str, *, where: str, first_row: int) -> None:
    """Raises FormatError unless every scale or offset [rows, groups] is finite."""
    if np.isfinite(stored).all():
        return
    row, group = (int(i) for i in np.argwhere(~np.isfinite(stored))[0])
    raise FormatError(
        f"{where}: the {what} of row {first_row + row}, group {group} is beyond {F16_MAX:.0f}, "
        f"the largest f16; scale the weights down"
    )
