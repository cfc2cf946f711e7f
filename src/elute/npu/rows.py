"""The int8 weights of a site, as the CPU needs them: rows of w.T for outliers, made from codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.npu.codes import Asked, Codes
from elute.npu.device import Q_MAX
from elute.types import F32, I8, I64

PART_BYTES = 8 << 20  # of rows that are there at a time, however many a shadow wants


def weight_scales(peaks: F32, *, per_channel: bool) -> F32:
    """peaks f32 [N], the largest |w| of each output -> f32 [N] or [1]: those become 127.

    1 where all weights are 0.
    """
    chosen = peaks if per_channel else peaks.max(keepdims=True)
    scales: F32 = np.where(chosen > 0, chosen / np.float32(Q_MAX), np.float32(1))
    return scales.astype(np.float32)


class Rows:
    """Of the products of one site, in the order of the stored columns.

    hot  channels whose rows stay in memory; those of others are made when they are needed, from
         codes that may have to be read
    """

    def __init__(
        self,
        codes: Codes,
        scales: Sequence[F32],
        hot: I64,
        *,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._codes, self._scales = codes, scales
        self._width = sum(n for n, _ in codes.shapes)
        self._most = max(1, part_bytes // self._width)
        self._hot = np.sort(hot)
        self._resident = np.empty((self._hot.size, self._width), np.int8)
        for at in self._cuts(self._hot.size):
            asked = codes.ask(self._hot[at])
            self._resident[at] = asked.columns(scales)
            asked.close()
        self.wanted = 0
        self.found = 0  # of those, in memory
        self.read_bytes = 0  # from flash, for the others

    @property
    def nbytes(self) -> int:
        return self._resident.nbytes

    def ask(self, channels: npt.NDArray[Any]) -> Wanted:
        """channels [C], ascending. Begins to read what is not in memory, and does not wait."""
        return Wanted(self, channels, self._cuts(channels.size))

    def outputs(self, product: int, outputs: npt.NDArray[Any]) -> I8:
        """outputs [R] of a product -> i8 [R, K]"""
        return self._codes.rows(product, self._scales[product], outputs)

    def _cuts(self, n: int) -> list[slice]:
        return [slice(at, min(at + self._most, n)) for at in range(0, n, self._most)]

    def _begin(self, channels: npt.NDArray[Any]) -> _Part:
        at = np.searchsorted(self._hot, channels)
        at[at == self._hot.size] = 0
        held = self._hot[at] == channels if self._hot.size else np.zeros(channels.size, np.bool_)
        asked = None if held.all() else self._codes.ask(channels[~held])
        self.wanted += channels.size
        self.found += int(held.sum())
        return _Part(at, held, asked)

    def _end(self, part: _Part) -> I8:
        if part.asked is None:
            return self._resident[part.at]
        cold = part.asked.columns(self._scales)
        self.read_bytes += part.asked.read_bytes
        part.close()
        if not part.held.any():
            return cold
        rows = np.empty((part.at.size, self._width), np.int8)
        rows[part.held] = self._resident[part.at[part.held]]
        rows[~part.held] = cold
        return rows


class _Part:
    """Of what is wanted: where it is among the hot rows, which of it is there, the rest."""

    def __init__(self, at: I64, held: npt.NDArray[np.bool_], asked: Asked | None) -> None:
        self.at, self.held, self.asked = at, held, asked

    def close(self) -> None:
        if self.asked is not None:
            self.asked.close()


class Wanted:
    """The rows that a shadow wants, in parts, the first of which is on its way.

    cuts  which of the channels each part has
    """

    def __init__(self, rows: Rows, channels: npt.NDArray[Any], cuts: list[slice]) -> None:
        self.cuts = cuts
        self._rows, self._channels = rows, channels
        self._next: _Part | None = rows._begin(channels[cuts[0]]) if cuts else None

    def parts(self) -> Iterator[tuple[slice, I8]]:
        """Once. (channels of the part, i8 [C, N of all products]); while one is used the next is
        read. Raises DeviceError when they cannot be read."""
        for i, cut in enumerate(self.cuts):
            assert self._next is not None
            rows = self._rows._end(self._next)
            later = self.cuts[i + 1 : i + 2]
            self._next = self._rows._begin(self._channels[later[0]]) if later else None
            yield cut, rows

    def close(self) -> None:
        """Nobody wants them any more."""
        if self._next is not None:
            self._next.close()
            self._next = None
