"""Perplexity of a model on a text, by llama.cpp's protocol, so that figures can be compared.

The tokens of the whole text are cut into windows of `context`; what is left over is dropped. Each
window is evaluated alone. Scored are the predictions made at positions context/2 .. context-2, so
that every one has at least half a window before it: 255 of a window of 512. Where the tokenizer
puts a beginning-of-text token, every window begins with it. Source: tools/perplexity in llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from elute.errors import BudgetError, ShapeError
from elute.runtime.sampler import F64, log_softmax_at
from elute.runtime.session import Executor, Session
from elute.types import F32

MIN_CONTEXT = 4  # the least with a prediction to score


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood; the standard error of the mean goes through exp."""

    perplexity: float
    standard_error: float
    n_windows: int
    n_scored: int


def text_windows(
    tokens: Sequence[int], *, context: int, n_windows: int | None = None, bos: int | None = None
) -> list[list[int]]:
    """The windows, the first n_windows of them. bos: the token that replaces the first of each.

    Raises ShapeError when the text has fewer tokens than that.
    """
    if context < MIN_CONTEXT:
        raise ShapeError(f"context: found {context}, wanted {MIN_CONTEXT} or more; use 512")
    available = len(tokens) // context
    wanted = available if n_windows is None else n_windows
    if wanted < 1 or wanted > available:
        raise ShapeError(
            f"text: {len(tokens)} tokens make {available} windows of {context}, wanted "
            f"{max(wanted, 1)}; use a longer text, fewer windows or a smaller context"
        )
    windows = [list(tokens[i * context : (i + 1) * context]) for i in range(wanted)]
    if bos is not None:
        for window in windows:
            window[0] = bos
    return windows


def perplexity(
    executor: Executor,
    windows: Sequence[Sequence[int]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """progress: called with (windows done, windows in all). Raises as check_window does."""
    session = Session(executor)
    losses = []
    for done, window in enumerate(windows, start=1):
        check_window(executor, window)
        session.reset()
        for first, logits in session.logits(window, len(window) // 2):
            losses.append(losses_at(window, first, logits))
        if progress is not None:
            progress(done, len(windows))
    return of_losses(np.concatenate(losses), len(windows))


def losses_at(window: Sequence[int], first: int, logits: F32) -> F64:
    """logits f32 [M, vocabulary] at positions first .. -> f64 [M], -log p of what came next."""
    targets = np.asarray(window[first + 1 : first + 1 + len(logits)], np.int64)
    return -log_softmax_at(logits, targets)


def of_losses(losses: F64, n_windows: int) -> Perplexity:
    """losses f64 [n_scored], of n_windows windows"""
    n = losses.size
    error = float(losses.std()) / math.sqrt(n - 1) if n > 1 else math.inf
    value = math.exp(float(losses.mean()))
    return Perplexity(value, value * error, n_windows, n)


def check_window(executor: Executor, window: Sequence[int]) -> None:
    """Raises BudgetError for a window that the executor's context cannot hold."""
    if len(window) > executor.context:
        raise BudgetError(
            f"window: found {len(window)} tokens, but the model's context is "
            f"{executor.context}; use a smaller --context"
        )
