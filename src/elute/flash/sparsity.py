"""Contextual sparsity: which channels of a linear's input count for a token. Pure.

A channel i of an input counts unless |x_i| * importance_i is below the input's threshold; the
others are taken as 0. The importance is 1, or the norm of the weights that a channel meets. One
dial, `sparsity`, is the share of all weights that are not needed; how it is spread over the inputs
is decided here, from histograms of scores and from how much the model's output changes when one
input alone is sparse.

Source: TEAL, arXiv 2408.14690 (thresholds by magnitude), WINA, arXiv 2505.19427 (norms of the
weights). Differs: histograms stream, thresholds are those of equal measured error for each byte
saved, and every token is sparse, those of the prompt too, so that a token's result is its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elute.errors import ShapeError
from elute.types import F32, I64

BINS = 1 << 12  # csrc/channel_mask.h: exponent and upper 4 bits of the fraction of a score
MAX_SPARSITY = 0.9
# Of one input: beyond it, thresholds hang on the few scores that a calibration saw there.
_MOST_OF_AN_INPUT = 0.95
# Measured beside the dense output, an input's own noise of rounding hides smaller changes.
_LEAST_ERROR = 1e-7


@dataclass(frozen=True, eq=False)
class Threshold:
    """What an executor needs for an input: importance f32 [K], and the least score that counts."""

    importance: F32
    value: float

    def active(
        self, x: F32, present: npt.NDArray[np.bool_] | None = None, *, cache_aware: float = 0.0
    ) -> npt.NDArray[np.bool_]:
        """Which channels of a token's input x f32 [K] count: bool [K].

        present      bool [K]: channels whose weights are in memory, or on their way
        cache_aware  0 to 1, see `least`

        What the executor does, bit for bit (csrc/channel_mask.h).
        """
        score = np.abs(x) * self.importance
        if present is None:
            return ~(score < np.float32(self.value))
        return ~(score < self.least(present, cache_aware))

    def least(self, present: npt.NDArray[np.bool_], cache_aware: float) -> F32:
        """The least score of each channel that counts, f32 [K], with cache_aware = M: value *
        (1 + M) of one that would have to be read, value * (1 - M / 2) of one that is in memory.

        Where more than half are in memory, M / 2 is multiplied by the others' number over theirs:
        so for any share in memory at most half as many channels come to count as cease to, were
        scores near the threshold spread evenly; and where all are in memory nothing changes.
        """
        n, n_present = present.size, int(present.sum())
        margin, value = np.float32(cache_aware), np.float32(self.value)
        rest = np.float32(1)
        if 2 * n_present > n:
            rest = np.float32(n - n_present) / np.float32(n_present)
        sooner = np.float32(1 - float(margin) / 2 * float(rest))
        later = np.float32(1) + margin
        return np.where(present, value * sooner, value * later).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Scores:
    """What a calibration saw of an input.

    importance   f32 [K], of its channels
    histogram    i64 [BINS], scores of its channels over all tokens
    outputs      of those weights: what a channel costs
    sensitivity  how much the model's output changed for each unit of score**2 left out of a token;
                 1 until it is measured
    """

    importance: F32
    histogram: I64
    outputs: int
    sensitivity: float = 1.0

    @property
    def weights(self) -> int:
        return self.outputs * self.importance.size

    def sparsity(self, threshold: float) -> float:
        """Share of scores below it."""
        edges, below = _cumulative(self.histogram)
        return float(np.interp(threshold, edges, below))

    def threshold(self, sparsity: float) -> float:
        """The inverse: scores spread evenly within their bin."""
        edges, below = _cumulative(self.histogram)
        rising = np.concatenate([[True], np.diff(below) > 0])
        return float(np.interp(sparsity, below[rising], edges[rising]))

    def left_out(self, threshold: float) -> float:
        """Sum of score**2 below it, of a token."""
        edges, below = _cumulative(self.histogram)
        shares = np.diff(np.minimum(below, np.interp(threshold, edges, below)))
        middles = (edges[1:] + edges[:-1]) / 2
        return float((shares * middles**2).sum()) * self.importance.size


def thresholds(scores: Mapping[str, Scores], sparsity: float) -> dict[str, Threshold]:
    """Of every input, so that `sparsity` of all weights is not needed, at equal cost of the last
    byte saved. {} at 0: nothing is left out. Raises ShapeError beyond 0 to MAX_SPARSITY.
    """
    check_sparsity(sparsity)
    if sparsity == 0 or not scores:
        return {}
    total = sum(entry.weights for entry in scores.values())
    limits = {name: entry.threshold(_MOST_OF_AN_INPUT) for name, entry in scores.items()}

    def chosen(log_price: float) -> dict[str, float]:
        # Leaving out a channel with score s costs sensitivity * s**2 and saves `outputs` weights.
        price = math.exp(log_price)
        return {
            name: min(math.sqrt(price * entry.outputs / entry.sensitivity), limits[name])
            for name, entry in scores.items()
        }

    def reached(values: Mapping[str, float]) -> float:
        return sum(scores[n].sparsity(v) * scores[n].weights for n, v in values.items()) / total

    low, high = -200.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(chosen(middle)) < sparsity else (low, middle)
    return {
        name: Threshold(scores[name].importance, float(np.float32(value)))
        for name, value in chosen(high).items()
    }


def with_sensitivities(
    scores: Mapping[str, Scores], errors: Mapping[str, tuple[float, float]]
) -> dict[str, Scores]:
    """From (threshold, change of the output) of some inputs, each sparse alone. Inputs of one kind,
    such as all layers' down projections, that were not measured lie between their neighbours.
    """
    tiny = float(np.finfo(np.float32).tiny)
    logs = {
        name: math.log(max(error, _LEAST_ERROR) / max(scores[name].left_out(threshold), tiny))
        for name, (threshold, error) in errors.items()
    }
    kinds: dict[str, list[str]] = {}
    for name in scores:
        kinds.setdefault(kind(name), []).append(name)
    found: dict[str, Scores] = {}
    for members in kinds.values():
        known = [i for i, name in enumerate(members) if name in logs]
        if not known:
            raise ShapeError(f"{members[0]}: no input of its kind was measured; measure one")
        between = np.interp(range(len(members)), known, [logs[members[i]] for i in known])
        for name, log in zip(members, between, strict=True):
            entry = scores[name]
            found[name] = Scores(entry.importance, entry.histogram, entry.outputs, math.exp(log))
    return {name: found[name] for name in scores}


def kind(name: str) -> str:
    """A tensor name without its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity <= MAX_SPARSITY:
        raise ShapeError(
            f"sparsity: found {sparsity}, wanted 0 (every weight counts) to {MAX_SPARSITY}"
        )


def check_cache_aware(cache_aware: float) -> None:
    if not 0 <= cache_aware <= 1:
        raise ShapeError(
            f"cache_aware: found {cache_aware}, wanted 0 (the answer does not depend on what is in "
            "memory) to 1"
        )


def _cumulative(histogram: I64) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """-> edges of the bins that are finite numbers, and the share of scores below each."""
    edges = np.arange(0, BINS << 19, 1 << 19, dtype=np.uint32).view(np.float32)
    finite = int(np.flatnonzero(np.isfinite(edges))[-1])
    counts = histogram[:finite].astype(np.float64)
    total = max(counts.sum(), 1.0)
    below = np.concatenate([[0.0], np.cumsum(counts) / total])
    return edges[: finite + 1].astype(np.float64), below
