"""From logits to a token: penalties, bias, temperature, truncation and the draw. Knows no text."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from elute.errors import DeviceError, ShapeError
from elute.types import F32

COLDEST = 1e-6  # below it f32 logits divided by the temperature overflow; any tie is long decided
DRAWS_AT_ONCE = 64

F64 = npt.NDArray[np.float64]


SOFTMAX_ROWS = 4  # whose exponentials are there at once: 4 MB of a vocabulary of 128k


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


class Choice(NamedTuple):
    token: int
    logprob: TokenLogprob | None = None  # only when Sampling.logprobs is set


class Sampler:
    """Draws the tokens of one answer; holds its random stream and the counts that penalties need.

    The stream is numpy's PCG64, one draw a token and none when greedy. Not thread safe.
    """

    def __init__(self, sampling: Sampling, *, vocabulary: int, prompt: Sequence[int] = ()) -> None:
        """Raises ShapeError for a biased token outside the vocabulary."""
        from elute import _native

        for token in sampling.logit_bias:
            if not 0 <= token < vocabulary:
                raise ShapeError(
                    f"sampling: logit_bias names token {token}, wanted 0 to {vocabulary - 1}; "
                    "remove it"
                )
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._uniform = _uniforms(np.random.Generator(np.random.PCG64(self.seed)))
        self._greedy = sampling.temperature == 0.0
        self._n_top = sampling.logprobs
        temperature = max(sampling.temperature, COLDEST)
        self._native = _native.Sampler(
            _native.best_isa(),
            vocabulary,
            inverse_temperature=1 / temperature,
            top_k=1 if self._greedy else min(sampling.top_k, vocabulary),
            top_p=sampling.top_p,
            gap=temperature * math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
            prompt=np.fromiter(prompt, np.int32),
            biases=list(sampling.logit_bias.items()),
        )

    def sample(self, logits: F32) -> Choice:
        """logits f32 [vocabulary], left as they are. Raises DeviceError when one is not finite."""
        token = self._native.choose(logits, 0.0 if self._greedy else next(self._uniform))
        if token < 0:
            bad = int(np.flatnonzero(~np.isfinite(logits))[0])
            raise DeviceError(
                f"logits: token {bad} has {logits[bad]}, wanted a finite number; the weights or "
                "the kernel are broken: run `elute doctor` and `elute info MODEL --verify`"
            )
        return Choice(token, None if self._n_top is None else self._logprob(logits, token))

    def _logprob(self, logits: F32, token: int) -> TokenLogprob:
        peak, mass, ids = self._native.best(logits, self._n_top or 0)
        total = peak + math.log(mass)
        top = tuple((i, float(logits[i]) - total) for i in ids)
        return TokenLogprob(token, float(logits[token]) - total, top)


def _uniforms(random: np.random.Generator) -> Iterator[float]:
    """random.random() for ever; drawn in batches, as a lone call costs 30 us between two tokens."""
    while True:
        yield from random.random(DRAWS_AT_ONCE).tolist()


def log_softmax_at(logits: F32, tokens: npt.NDArray[np.integer]) -> F64:
    """logits f32 [M, vocabulary], tokens [M] -> f64 [M], log p of each row's token.

    Takes memory for SOFTMAX_ROWS rows.
    """
    steps = range(0, len(logits), SOFTMAX_ROWS)
    parts = [
        _log_softmax_at(logits[i : i + SOFTMAX_ROWS], tokens[i : i + SOFTMAX_ROWS]) for i in steps
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float64)


def _log_softmax_at(logits: F32, tokens: npt.NDArray[np.integer]) -> F64:
    peaks = logits.max(axis=1, keepdims=True)
    totals = np.exp(logits - peaks).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    logprobs: F64 = chosen - peaks[:, 0].astype(np.float64) - np.log(totals)
    return logprobs
