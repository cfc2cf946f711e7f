"""From logits to a token: penalties, bias, temperature, truncation and the draw. Knows no text."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import DeviceError, ShapeError
from elute.types import F32

COLDEST = 1e-6  # below it f32 logits divided by the temperature overflow; any tie is long decided
FIRST_CANDIDATES = 256  # top-p rarely needs more; each retry takes 8 times as many

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in this order: penalties, bias, temperature, top-k, top-p, min-p.

    temperature         0 is greedy: the most probable token, the lowest id among equals
    top_k               keep the k most probable; 0 keeps all
    top_p               keep the fewest tokens whose probability reaches top_p of what top-k left; 1
                        keeps all
    min_p               keep tokens at least min_p times as probable as the best one; 0 keeps all
    repetition_penalty  logits of tokens of prompt and answer are divided (negative: multiplied) by
                        it; 1 is off
    presence_penalty    subtracted from the logit of every token that the answer already has; 0 is
                        off
    frequency_penalty   the same, times how often the answer has it; 0 is off
    seed                same seed, model, prompt and settings: same text. None draws one, told in
                        Completion.seed
    logit_bias          token id -> addend, in [-100, 100] as in OpenAI's API
    logprobs            how many alternatives to report beside each chosen token; None reports
                        nothing. Reported are natural logarithms of the model's own distribution:
                        before penalties, bias and temperature

    Raises ShapeError (a ValueError) for a value out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, math.inf)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, 1000)
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias[{token}]", bias, -100.0, 100.0)


def _check(name: str, value: float, low: float, high: float) -> None:
    integral = isinstance(low, int)
    wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
    is_number = isinstance(value, int if integral else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # a NaN fails both comparisons
        kind = "an integer" if integral else "a number"
        raise ShapeError(f"sampling: {name}={value!r} found, wanted {kind} {wanted}; change {name}")


@dataclass(frozen=True)
class TokenLogprob:
    """A token, log p of it, and the most probable tokens at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    token: int
    logprob: TokenLogprob | None = None  # only when Sampling.logprobs is set


class Sampler:
    """Draws the tokens of one answer; holds its random stream and the counts that penalties need.

    The stream is numpy's PCG64, one draw a token and none when greedy.
    """

    def __init__(self, sampling: Sampling, *, vocabulary: int, prompt: Sequence[int] = ()) -> None:
        """Raises ShapeError for a biased token outside the vocabulary."""
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._counts = np.zeros(vocabulary, np.int32)  # of the answer
        self._seen = np.zeros(vocabulary, np.bool_)  # in prompt or answer
        if sampling.repetition_penalty != 1.0:
            self._seen[np.asarray(prompt, np.int64)] = True
        for token in sampling.logit_bias:
            if not 0 <= token < vocabulary:
                raise ShapeError(
                    f"sampling: logit_bias names token {token}, wanted 0 to {vocabulary - 1}; "
                    "remove it"
                )
        self._biased = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(sampling.logit_bias.values(), np.float32)

    def sample(self, logits: F32) -> Choice:
        """logits f32 [vocabulary], left as they are. Raises DeviceError when one is not finite."""
        peak = float(logits.max())
        # The sum of finite f32 cannot overflow f64, and one NaN or infinity makes it non-finite.
        if not math.isfinite(float(logits.sum(dtype=np.float64))):
            bad = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise DeviceError(
                f"logits: token {bad} has {logits[bad]}, wanted a finite number; the weights or "
                "the kernel are broken: run `elute doctor` and `elute info MODEL --verify`"
            )
        adjusted = self._adjust(logits)
        if adjusted is not logits:
            peak = float(adjusted.max())
        if self.sampling.temperature == 0.0:
            token = int(adjusted.argmax())
        else:
            token = self._draw(adjusted, peak)
        self._counts[token] += 1
        self._seen[token] = True
        wanted = self.sampling.logprobs
        return Choice(token, None if wanted is None else token_logprob(logits, token, wanted))

    def _adjust(self, logits: F32) -> F32:
        s = self.sampling
        penalized = (
            s.repetition_penalty != 1.0 or s.presence_penalty != 0 or s.frequency_penalty != 0
        )
        if not penalized and not self._biased.size:
            return logits
        adjusted = logits.copy()
        if s.repetition_penalty != 1.0:
            seen = adjusted[self._seen]
            penalty = np.float32(s.repetition_penalty)
            adjusted[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if s.presence_penalty or s.frequency_penalty:
            chosen = np.flatnonzero(self._counts)
            counts = self._counts[chosen]
            adjusted[chosen] -= (s.presence_penalty + s.frequency_penalty * counts).astype(
                np.float32
            )
        if self._biased.size:
            adjusted[self._biased] += self._biases
        return adjusted

    def _draw(self, logits: F32, peak: float) -> int:
        s = self.sampling
        ids: I64 | None = None  # None: all tokens
        if s.top_k and s.top_k < logits.size:
            ids = largest(logits, s.top_k)
            logits = logits[ids]
        # At most 0, so that exp cannot overflow; f32 halves the time over a large vocabulary.
        mass = np.exp((logits - np.float32(peak)) / np.float32(max(s.temperature, COLDEST)))
        if s.top_p < 1.0 or s.min_p > 0.0:
            keep = nucleus(mass, s.top_p, s.min_p)
            ids, mass = keep if ids is None else ids[keep], mass[keep]
        cumulative = np.cumsum(mass, dtype=np.float64)
        at = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        at = min(at, cumulative.size - 1)  # rounding can reach the end exactly
        return at if ids is None else int(ids[at])


def largest(values: Floats, k: int) -> I64:
    """-> i64 [k], indices of the k largest, best first; among equals the lowest index first."""
    if k >= values.size:
        return np.argsort(-values, kind="stable")
    threshold = np.partition(values, values.size - k)[values.size - k]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: k - above.size]
    chosen = np.concatenate([above, equal])
    return chosen[np.argsort(-values[chosen], kind="stable")]


def nucleus(mass: Floats, top_p: float, min_p: float) -> I64:
    """mass [n], unnormalized probabilities -> i64 [m], what top-p and min-p both keep.

    Best first; at least one.
    Both keep a prefix of the sorted order, so the shorter prefix is the answer whatever the order
    of the filters, and only as much is sorted as the prefix needs.
    """
    within_min_p = int(np.count_nonzero(mass >= min_p * mass.max())) if min_p > 0.0 else mass.size
    if top_p >= 1.0:
        return largest(mass, max(within_min_p, 1))
    wanted = top_p * float(mass.sum(dtype=np.float64))
    size = min(FIRST_CANDIDATES, within_min_p)
    while True:
        order = largest(mass, size)
        before = np.cumsum(mass[order], dtype=np.float64) - mass[order]
        kept = int(np.count_nonzero(before < wanted))
        if kept < size or size == within_min_p:
            return order[: max(kept, 1)]
        size = min(8 * size, within_min_p)


def log_softmax_at(logits: F32, tokens: npt.NDArray[np.integer]) -> F64:
    """logits f32 [M, vocabulary], tokens [M] -> f64 [M], log p of each row's token."""
    peaks = logits.max(axis=1, keepdims=True)
    totals = np.exp(logits - peaks).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    logprobs: F64 = chosen - peaks[:, 0].astype(np.float64) - np.log(totals)
    return logprobs


def token_logprob(logits: F32, token: int, n_top: int) -> TokenLogprob:
    """logits f32 [vocabulary] -> log p of `token` and of the n_top most probable tokens."""
    peak = logits.max()
    total = float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    best = largest(logits, min(n_top, logits.size)) if n_top else np.zeros(0, np.int64)
    top = tuple((int(i), float(logits[i]) - total) for i in best)
    return TokenLogprob(token, float(logits[token]) - total, top)
