"""How far a model's predictions are from another's: Kullback-Leibler divergence over a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from elute.errors import ShapeError
from elute.evaluate.perplexity import Perplexity, check_window, losses_at, of_losses
from elute.runtime.sampler import F64
from elute.runtime.session import Executor, Session
from elute.types import F32

ROWS = 32  # f64 work of 32 rows of a 150k vocabulary: 38 MB


@dataclass(frozen=True)
class Divergence:
    """D(base || model) in nats over the scored positions of evaluate.perplexity.

    perplexity  of the model, from the same logits
    """

    mean: float
    median: float
    percentile_99: float
    maximum: float
    same_top: float  # share of positions where both find the same token most probable
    n_scored: int
    perplexity: Perplexity


def divergence(
    base: Executor,
    model: Executor,
    windows: Sequence[Sequence[int]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Both run every window alone, in step. Raises ShapeError unless they share a vocabulary."""
    if base.vocabulary != model.vocabulary:
        raise ShapeError(
            f"vocabulary: found {model.vocabulary} and {base.vocabulary}, wanted one; "
            "compare models with the same tokenizer"
        )
    sessions = Session(base), Session(model)
    values, tops, losses = [], [], []
    for done, window in enumerate(windows, start=1):
        for session in sessions:
            check_window(session.executor, window)
            session.reset()
        first = len(window) // 2
        in_step = zip(*(session.logits(window, first) for session in sessions), strict=True)
        for (_, wanted), (at_first, found) in in_step:
            losses.append(losses_at(window, at_first, found))
            for at in range(0, len(wanted), ROWS):
                values.append(kl_rows(wanted[at : at + ROWS], found[at : at + ROWS]))
            tops.append(wanted.argmax(axis=1) == found.argmax(axis=1))
        if progress is not None:
            progress(done, len(windows))
    kl = np.concatenate(values)
    return Divergence(
        mean=float(kl.mean()),
        median=float(np.median(kl)),
        percentile_99=float(np.quantile(kl, 0.99)),
        maximum=float(kl.max()),
        same_top=float(np.concatenate(tops).mean()),
        n_scored=kl.size,
        perplexity=of_losses(np.concatenate(losses), len(windows)),
    )


def kl_rows(base: F32, model: F32) -> F64:
    """logits f32 [M, vocabulary] each -> f64 [M], sum of p * (log p - log q)."""
    log_p, log_q = _log_softmax(base), _log_softmax(model)
    kl: F64 = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return kl


def _log_softmax(logits: F32) -> F64:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide
