"""The int8 weights of a site, as the CPU needs them: rows of w.T for outliers, made from codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elute.npu.device import Q_MAX
from elute.pack.quads import unpack
from elute.types import F32, I8, PackedMatrix


def weight_scales(w: F32, *, per_channel: bool) -> F32:
    """w f32 [N, K] -> f32 [N] or [1]: the largest weight becomes 127. 1 where all are 0."""
    peaks = np.abs(w).max(axis=1) if per_channel else np.abs(w).max(keepdims=True)[0]
    return np.where(peaks > 0, peaks / np.float32(Q_MAX), 1).astype(np.float32)


def quantized(w: F32, scales: F32) -> I8:
    """w f32 [N, K], scales f32 [N] or [1] -> i8 [N, K], ties to even."""
    return np.clip(np.rint(w / scales[:, None]), -Q_MAX, Q_MAX).astype(np.int8)


class Rows:
    """Of the products of one site, in the order of the stored columns.

    hot  channels whose rows stay in memory; those of others are made when they are needed
    """

    def __init__(
        self,
        matrices: Sequence[PackedMatrix],
        scales: Sequence[F32],
        hot: npt.NDArray[np.int64],
    ) -> None:
        self._matrices = matrices
        self._scales = scales
        self._hot = np.sort(hot)
        self._resident = self._made(self._hot)
        self.wanted = 0
        self.found = 0

    @property
    def nbytes(self) -> int:
        return self._resident.nbytes

    def of(self, channels: npt.NDArray[np.int64]) -> I8:
        """channels i64 [C], ascending -> i8 [C, N of all products]"""
        at = np.searchsorted(self._hot, channels)
        at[at == self._hot.size] = 0
        held = self._hot[at] == channels if self._hot.size else np.zeros(channels.size, bool)
        self.wanted += channels.size
        self.found += int(held.sum())
        rows = np.empty((channels.size, self._resident.shape[1]), np.int8)
        rows[held] = self._resident[at[held]]
        if not held.all():
            rows[~held] = self._made(channels[~held])
        return rows

    def outputs(self, product: int, outputs: npt.NDArray[np.int64]) -> I8:
        """outputs i64 [R] of a product -> i8 [R, K]"""
        w = _dequantized(self._matrices[product])[outputs]
        scales = self._scales[product]
        return quantized(w, scales if scales.size == 1 else scales[outputs])

    def _made(self, channels: npt.NDArray[np.int64]) -> I8:
        parts = [
            quantized(_dequantized(matrix)[:, channels], scales).T
            for matrix, scales in zip(self._matrices, self._scales, strict=True)
        ]
        return np.ascontiguousarray(np.concatenate(parts, axis=1))


def _dequantized(matrix: PackedMatrix) -> F32:
    """-> f32 [N, K], columns as stored"""
    from dataclasses import replace

    return replace(unpack(matrix), columns=None).dequantize()
