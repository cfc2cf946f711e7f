"""The int8 weights of a site, as the CPU needs them: rows of w.T for outliers, made from codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elute import _native
from elute.npu.device import Q_MAX
from elute.types import F32, I8, I64, PackedMatrix


def weight_scales(peaks: F32, *, per_channel: bool) -> F32:
    """peaks f32 [N], the largest |w| of each output -> f32 [N] or [1]: those become 127.

    1 where all weights are 0.
    """
    chosen = peaks if per_channel else peaks.max(keepdims=True)
    scales: F32 = np.where(chosen > 0, chosen / np.float32(Q_MAX), np.float32(1))
    return scales.astype(np.float32)


class Rows:
    """Of the products of one site, in the order of the stored columns.

    hot  channels whose rows stay in memory; those of others are made when they are needed
    """

    def __init__(
        self,
        matrices: Sequence[PackedMatrix],
        scales: Sequence[F32],
        hot: I64,
        *,
        isa: str,
    ) -> None:
        self._matrices = matrices
        self._scales = scales
        self._isa = isa
        self._hot = np.sort(hot)
        self._resident = self._made(self._hot)
        self.wanted = 0
        self.found = 0

    @property
    def nbytes(self) -> int:
        return self._resident.nbytes

    def of(self, channels: npt.NDArray[Any]) -> I8:
        """channels [C], ascending -> i8 [C, N of all products]"""
        at = np.searchsorted(self._hot, channels)
        at[at == self._hot.size] = 0
        held = self._hot[at] == channels if self._hot.size else np.zeros(channels.size, np.bool_)
        self.wanted += channels.size
        self.found += int(held.sum())
        if held.all():
            return self._resident[at]
        rows = np.empty((channels.size, self._resident.shape[1]), np.int8)
        rows[held] = self._resident[at[held]]
        rows[~held] = self._made(channels[~held])
        return rows

    def outputs(self, product: int, outputs: npt.NDArray[Any]) -> I8:
        """outputs [R] of a product -> i8 [R, K]"""
        return weight_rows(self._matrices[product], self._scales[product], outputs, isa=self._isa)

    def _made(self, channels: npt.NDArray[Any]) -> I8:
        parts = [
            _native.weight_columns(
                self._isa,
                channels.astype(np.int32),
                scales,
                matrix.planes,
                matrix.scales,
                matrix.offsets,
                *matrix.shape,
                matrix.bits,
                matrix.group_size,
                matrix.zero,
                str(matrix.affine),
            )
            for matrix, scales in zip(self._matrices, self._scales, strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def weight_rows(
    matrix: PackedMatrix, scales: F32, outputs: npt.NDArray[Any] | None = None, *, isa: str
) -> I8:
    """Rows of the int8 weights, of all outputs when None. -> i8 [R, K], columns as stored"""
    wanted = np.arange(matrix.shape[0]) if outputs is None else outputs
    return _native.weight_rows(
        isa,
        wanted.astype(np.int32),
        scales,
        matrix.planes,
        matrix.scales,
        matrix.offsets,
        *matrix.shape,
        matrix.bits,
        matrix.group_size,
        matrix.zero,
        str(matrix.affine),
    )
