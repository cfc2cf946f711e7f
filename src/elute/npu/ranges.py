"""How large the inputs and outputs of products get: streamed histograms of |x|, nothing is kept.

Source: llm.npu (arXiv 2407.05858), section 3.3. Its released tool takes percentiles of signed
values and keeps all activations; here they are of magnitudes, and a bin is at most 6 % wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elute.errors import ShapeError
from elute.types import F32, I64

BINS = 1 << 12  # by the 8 bits of a float's exponent and 4 of its fraction
_SHIFT = 19


@dataclass(frozen=True, eq=False)
class Range:
    """Magnitudes of a tensor.

    histogram  i64 [BINS], of |x| by the upper bits of its f32
    channels   f32 [K], the largest |x| of each channel; empty where nobody asks
    """

    histogram: I64
    channels: F32

    @property
    def maximum(self) -> float:
        return float(self.channels.max(initial=0.0))

    def quantile(self, share: float) -> float:
        """The least bound, to the width of a bin, that at most 1 - share of all values exceed."""
        counts = self.histogram.cumsum()
        beyond = counts[-1] - counts
        allowed = (1 - share) * float(counts[-1])
        bin_at = int(np.argmax(beyond <= allowed))
        edge = np.uint32((bin_at + 1) << _SHIFT).view(np.float32)
        return min(float(edge), self.maximum)

    def share_beyond(self, bound: float) -> float:
        """Of values above `bound`, to the width of a bin."""
        total = float(self.histogram.sum())
        first = int(np.float32(bound).view(np.uint32) >> _SHIFT)
        return float(self.histogram[first:].sum()) / total if bound < self.maximum else 0.0


class Observed:
    """A Range while it is measured."""

    def __init__(self, width: int) -> None:
        self._histogram = np.zeros(BINS, np.int64)
        self._channels = np.zeros(width, np.float32)

    def add(self, x: F32, *, name: str) -> None:
        """x f32 [M, width]. Raises ShapeError for values that are not finite."""
        magnitudes = np.abs(x)
        np.maximum(self._channels, magnitudes.max(axis=0), out=self._channels)
        check_finite(self._channels, name)
        bins = (magnitudes.view(np.uint32) >> _SHIFT).ravel()
        self._histogram += np.bincount(bins, minlength=BINS)

    def range(self) -> Range:
        return Range(self._histogram.copy(), self._channels.copy())


def check_finite(values: F32, where: str) -> None:
    """Raises ShapeError."""
    if not np.isfinite(values).all():
        raise ShapeError(
            f"calibrate: found a value that is not finite at {where}, wanted finite ones; the "
            "model or its conversion is broken, as elute run would show"
        )
