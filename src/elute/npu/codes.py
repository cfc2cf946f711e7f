"""The packed codes of a site's weights as rows of int8, wherever and in whatever order they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from elute import _native
from elute.types import F32, I8, PANEL, U8, InBank, PackedMatrix

Scales = Sequence[F32]  # of each product: f32 [1] or [N], see rows.weight_scales
COLUMNS_BYTES = 4 << 20  # of int8 that are made of channels at a time, on their way to rows


class Asked(Protocol):
    """Channels whose rows are on their way."""

    read_bytes: int  # from flash

    def columns(self, scales: Scales) -> I8:
        """Waits. -> i8 [C, N of all products], rows of w.T. Raises DeviceError when they cannot be
        read."""

    def close(self) -> None:
        """Nobody wants them any more."""


class Codes(Protocol):
    """Of the products of one site, in the order of the stored columns. Several may be asked for at
    a time, by several threads.

    shapes  (N, K) of each product
    """

    shapes: tuple[tuple[int, int], ...]

    def ask(self, channels: npt.NDArray[Any]) -> Asked:
        """channels [C], ascending. Begins to read what is not in memory, and does not wait."""

    def rows(self, product: int, scales: F32, outputs: npt.NDArray[Any] | None = None) -> I8:
        """Rows of w, of all outputs when None. -> i8 [R, K]. Raises DeviceError when they cannot
        be read."""


class PanelCodes:
    """In panels, in memory or mapped."""

    def __init__(self, matrices: Sequence[PackedMatrix], *, isa: str) -> None:
        self.shapes = tuple(matrix.shape for matrix in matrices)
        self._matrices, self._isa = matrices, isa

    def ask(self, channels: npt.NDArray[Any]) -> Asked:
        return Present(
            lambda scales: beside(
                [
                    panel_columns(matrix, s, channels, isa=self._isa)
                    for matrix, s in zip(self._matrices, scales, strict=True)
                ]
            )
        )

    def rows(self, product: int, scales: F32, outputs: npt.NDArray[Any] | None = None) -> I8:
        return panel_rows(self._matrices[product], scales, outputs, isa=self._isa)


class BankCodes:
    """In one bank, by channel, in memory or mapped.

    blocks  u8 [n_blocks, block_bytes]
    """

    def __init__(
        self,
        matrices: Sequence[InBank],
        blocks: U8,
        *,
        rows_per_block: int,
        row_bytes: int,
        isa: str,
    ) -> None:
        self.shapes = tuple(matrix.shape for matrix in matrices)
        self._matrices, self._isa = matrices, isa
        self._per_block = rows_per_block
        self._rows = np.lib.stride_tricks.as_strided(
            blocks,
            (blocks.shape[0], rows_per_block, row_bytes),
            (blocks.strides[0], row_bytes, 1),
            writeable=False,
        )

    def ask(self, channels: npt.NDArray[Any]) -> Asked:
        return Present(
            lambda scales: bank_columns(
                self._matrices, scales, channels, self._at(channels), isa=self._isa
            )
        )

    def rows(self, product: int, scales: F32, outputs: npt.NDArray[Any] | None = None) -> I8:
        n, k = self.shapes[product]
        matrix = self._matrices[product]
        made = np.empty((n if outputs is None else len(outputs), k), np.int8)
        for channels in portions(np.arange(k), n):
            part = bank_columns([matrix], [scales], channels, self._at(channels), isa=self._isa)
            put_columns(made, channels, part, outputs)
        return made

    def _at(self, channels: npt.NDArray[Any]) -> U8:
        found: U8 = self._rows[channels // self._per_block, channels % self._per_block]
        return found


class Present:
    """What needs no reading."""

    read_bytes = 0

    def __init__(self, make: Any) -> None:
        self._make = make

    def columns(self, scales: Scales) -> I8:
        made: I8 = self._make(scales)
        return made

    def close(self) -> None:
        pass


def portions(channels: npt.NDArray[Any], n: int) -> Iterator[npt.NDArray[Any]]:
    """Runs of channels whose columns of n outputs are some COLUMNS_BYTES."""
    most = max(1, COLUMNS_BYTES // n)
    for start in range(0, channels.size, most):
        yield channels[start : start + most]


def put_columns(
    made: I8, channels: npt.NDArray[Any], part: I8, outputs: npt.NDArray[Any] | None
) -> None:
    """part i8 [C, N] into the columns `channels`, a run, of made i8 [R, K]"""
    chosen = part if outputs is None else part[:, outputs]
    made[:, channels[0] : channels[-1] + 1] = chosen.T


def beside(parts: Sequence[I8]) -> I8:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def panel_columns(matrix: PackedMatrix, scales: F32, channels: npt.NDArray[Any], *, isa: str) -> I8:
    """-> i8 [C, N]"""
    return _native.weight_columns(
        isa,
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


def panel_rows(
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


def bank_columns(
    matrices: Sequence[InBank],
    scales: Scales,
    channels: npt.NDArray[Any],
    rows: U8,
    *,
    isa: str,
) -> I8:
    """rows u8 [C, row_bytes] of the bank, of these channels -> i8 [C, N of all matrices]"""
    return beside(
        [
            _native.weight_columns_of_rows(
                isa,
                rows,
                channels.astype(np.int32),
                each,
                matrix.scales,
                matrix.offsets,
                *matrix.shape,
                matrix.bits,
                matrix.group_size,
                matrix.zero,
                str(matrix.affine),
                matrix.offset,
            )
            for matrix, each in zip(matrices, scales, strict=True)
        ]
    )


def panels_of(matrix: PackedMatrix, begin: int, end: int, planes: U8) -> PackedMatrix:
    """Panels begin..end of a matrix as one of their own, whose planes are these."""
    return PackedMatrix(
        shape=(min(end * PANEL, matrix.shape[0]) - begin * PANEL, matrix.shape[1]),
        planes=planes,
        scales=matrix.scales[begin:end],
        offsets=None if matrix.offsets is None else matrix.offsets[begin:end],
        affine=matrix.affine,
        zero=matrix.zero,
        bits=matrix.bits,
        group_size=matrix.group_size,
        columns=None,
    )
