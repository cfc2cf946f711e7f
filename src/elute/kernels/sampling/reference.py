"""Choosing a token, in numpy; csrc/sampler.cpp and csrc/kernels/sampling_body.h are its twin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elute.types import F32, I32

I64 = npt.NDArray[np.int64]

_LEAST = np.float32(-25)  # e^-25 rounds to 0
_MAGIC = np.float32(1.5 * 2**23)  # added and subtracted, rounds to whole numbers
_EDGE = np.float32(2.0**-11)  # below it masses are rounded to 2^-34, above it f32 is no finer


def _f32(text: str) -> np.float32:
    return np.float32(float.fromhex(text))


def masses(logits: F32, peak: np.float32, inverse_temperature: np.float32) -> F32:
    """exp((logits - peak) * inverse_temperature), for logits <= peak, in multiples of 2^-34.

    Every operation is rounded to f32 on its own. Sums of up to 2^19 masses are exact in f64.
    """
    with np.errstate(over="ignore"):  # to -infinity, whose mass is 0
        y = np.maximum((logits - peak) * inverse_temperature, _LEAST)
    n = (y * _f32("0x1.715476p0") + _MAGIC) - _MAGIC
    r = (y - n * _f32("0x1.63p-1")) + n * _f32("0x1.bd0106p-13")
    q = _f32("0x1.6a23d0p-10") * r + _f32("0x1.123a20p-7")
    q = q * r + _f32("0x1.5558f2p-5")
    q = q * r + _f32("0x1.555492p-3")
    q = q * r + _f32("0x1.fffffcp-2")
    e = np.ldexp(np.float32(1) + (r * r * q + r), n.astype(np.int32))
    rounded: F32 = np.where(e < _EDGE, (e + _EDGE) - _EDGE, e)
    return rounded


class Sampler:
    """Chooses the tokens of one answer.

    inverse_temperature  rounded to f32
    top_k                the first in rank to keep; 0 keeps all
    top_p                of these, the fewest whose masses reach this share of their sum; 1 keeps
                         all
    gap                  of these, the logits of at least peak + gap: temperature * ln(min_p)
    repetition           divides (negative: multiplies) the logits of tokens of prompt and answer
    presence, frequency  presence + frequency * count is subtracted from the logits of tokens that
                         the answer has `count` times
    biases               (token, addend), after the penalties

    Changed logits are held between the largest f32. At least one token is kept.
    """

    def __init__(
        self,
        vocabulary: int,
        inverse_temperature: float,
        top_k: int,
        top_p: float,
        gap: float,
        repetition: float,
        presence: float,
        frequency: float,
        prompt: I32,
        biases: Sequence[tuple[int, float]],
    ) -> None:
        self._inverse_temperature = np.float32(inverse_temperature)
        self._top_k = top_k if 0 < top_k < vocabulary else vocabulary
        self._top_p = top_p
        self._gap = gap
        self._repetition = np.float32(repetition)
        self._presence, self._frequency = presence, frequency
        self._counts = np.zeros(vocabulary, np.int32)
        self._seen = np.zeros(vocabulary, np.bool_)
        self._seen[prompt] = True
        self._biases = np.zeros(vocabulary, np.float32)
        for token, bias in biases:
            self._biases[token] = bias

    def choose(self, logits: F32, uniform: float) -> int:
        """-> a token, which the penalties count; -1 when a logit is not finite.

        logits   f32 [vocabulary]
        uniform  in [0, 1): where in the masses of the kept tokens the chosen one lies, in the order
                 of ranks, or of ids when all filters are off
        """
        if not np.isfinite(logits).all():
            return -1
        token = self._draw(self._changed(logits), uniform)
        self._counts[token] += 1
        self._seen[token] = True
        return token

    def _changed(self, x: F32) -> F32:
        with np.errstate(over="ignore"):
            repeated = np.where(x > 0, x / self._repetition, x * self._repetition)
            x = np.where(self._seen, repeated, x)
            penalties = (self._presence + self._frequency * self._counts).astype(np.float32)
            x = np.where(self._counts > 0, x - penalties, x) + self._biases
        limits = np.finfo(np.float32)
        return np.clip(x, limits.min, limits.max)

    def _draw(self, logits: F32, uniform: float) -> int:
        peak = logits.max()
        filtered = self._top_k < logits.size or self._top_p < 1 or self._gap > -math.inf
        order = ranked(logits)[: self._top_k] if filtered else np.arange(logits.size)
        mass = masses(logits[order], peak, self._inverse_temperature)
        before = np.cumsum(mass, dtype=np.float64) - mass
        wanted = self._top_p * mass.sum(dtype=np.float64) if self._top_p < 1 else math.inf
        high = logits[order].astype(np.float64) >= float(peak) + self._gap
        kept = max(np.count_nonzero((before < wanted) & high), 1)
        cumulative = np.cumsum(mass[:kept], dtype=np.float64)
        # A product of the total and a number below 1 can still round to the total.
        at = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0))
        return int(order[np.searchsorted(cumulative, at, side="right")])

    def best(self, logits: F32, n: int) -> tuple[float, float, list[int]]:
        """Finite logits f32 [vocabulary] -> peak, mass, ids of the n first in rank.

        log(sum(exp(logits))) = peak + log(mass), within 2^-35 * vocabulary / mass + 2e-7.
        """
        peak = logits.max()
        mass = masses(logits, peak, np.float32(1)).sum(dtype=np.float64)
        return float(peak), float(mass), ranked(logits)[:n].tolist()


def ranked(logits: F32) -> I64:
    """Ids by descending logit, equal ones by ascending id."""
    return np.argsort(-logits, kind="stable")
