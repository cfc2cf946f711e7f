"""Measures what static int8 scales need to know of a model, with the model itself on the CPU.

Two passes over a text: magnitudes of the inputs and outputs of all products, then how often each
channel is beyond the bounds that may be chosen. And a third over a few of its tokens: what happens
to the model's predictions when one site alone is rounded, for each choice that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elute.errors import ShapeError
from elute.npu.choices import CHOICES, SHADOWED, Choice
from elute.npu.device import Q_MAX
from elute.npu.ranges import Observed, Range, check_finite
from elute.npu.reference import quantize_weights
from elute.npu.rows import weight_scales
from elute.npu.sites import Host, Segments, Site
from elute.types import F32, I32, I64

Progress = Callable[[str, int, int], None]
Weights = Callable[[str], F32]  # name -> f32 [N, K], columns in the order of the input's channels

WINDOW = 256  # tokens of a pass: one chunk, from an empty cache
MOST_WINDOWS = 16
MIN_TOKENS = 128
_SCORED = 64  # predictions at the end of a window that are compared
# Effects take some five forwards a site: of a window of a small model, of less where that is long.
_LARGE = 1 << 30  # weights
_LARGE_TOKENS = 96
_COARSE = Q_MAX / 16  # steps up to the bound of a rounding that stands out of the noise
_LEAST = 1e-30
OUTPUT_SHARE = 0.997  # of an output's values that int8 holds; those beyond are computed again


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Of one site.

    input     of its input; outputs of its products
    outliers  i64 [K] for each choice with a shadow: values of the text beyond its bound
    tokens    of the text
    peaks     f32 [N] for each product: the largest |w| of each output
    effects   for each of CHOICES: divergence of the predictions, nats a token
    """

    input: Range
    outputs: tuple[Range, ...]
    outliers: Mapping[Choice, I64]
    tokens: int
    peaks: tuple[F32, ...]
    effects: Mapping[Choice, float]

    @property
    def output_scales(self) -> tuple[float, ...]:
        """Of each product, where a device rounds its outputs to int8."""
        return tuple((o.quantile(OUTPUT_SHARE) or 1.0) / Q_MAX for o in self.outputs)


def calibrate(
    host: Host,
    weights: Weights,
    tokens: Sequence[int],
    *,
    progress: Progress | None = None,
) -> dict[str, SiteStatistics]:
    """By the site's name. The host's cache is empty afterwards.

    Raises ShapeError for fewer than MIN_TOKENS tokens, or values that are not finite.
    """
    windows = _windows(tokens, host.context)
    inputs, outputs = _ranges(host, windows, progress)
    bounds = {
        site.name: {c: c.bound(inputs[site.name]) for c in CHOICES if c.shadow}
        for site in host.sites
    }
    outliers = _outliers(host, windows, bounds, progress)
    statistics = {}
    n_weights = sum(
        inputs[site.name].channels.size * outputs[name].channels.size
        for site in host.sites
        for name in site.weights
    )
    probe = windows[0] if n_weights < _LARGE else windows[0][:_LARGE_TOKENS]
    dense = _dense(host, probe)
    for i, site in enumerate(host.sites):
        if progress is not None:
            progress("npu: effects", i, len(host.sites))
        made = [weights(name) for name in site.weights]
        effects = _effects(host, site, made, inputs[site.name], probe, dense)
        statistics[site.name] = SiteStatistics(
            inputs[site.name],
            tuple(outputs[name] for name in site.weights),
            outliers[site.name],
            sum(w.size for w in windows),
            tuple(np.abs(w).max(axis=1) for w in made),
            effects,
        )
    return statistics


def _windows(tokens: Sequence[int], context: int) -> list[I32]:
    for what, found in (("text", len(tokens)), ("context", context)):
        if found < MIN_TOKENS:
            raise ShapeError(
                f"{what}: found {found} tokens, wanted {MIN_TOKENS} or more to measure what --npu "
                f"needs; use a longer {what}"
            )
    size = min(WINDOW, context, len(tokens))
    starts = range(0, len(tokens) - size + 1, size)[:MOST_WINDOWS]
    return [np.asarray(tokens[start : start + size], np.int32) for start in starts]


def _watch(host: Host, window: I32, see: Callable[[Site, F32, Sequence[F32]], None]) -> None:
    """One forward; see(site, x [M, K], y [M, N] of each product) after each of its products."""
    with host.cut(host.sites) as segments:
        for i, site in enumerate(host.sites):
            segments.run(i, window, 0, whole=True)
            outputs = [segments.register(output)[: window.size] for output in site.outputs]
            see(site, segments.register(site.input)[: window.size], outputs)
        segments.cached(0)


def _ranges(
    host: Host, windows: Sequence[I32], progress: Progress | None
) -> tuple[dict[str, Range], dict[str, Range]]:
    inputs: dict[str, Observed] = {}
    outputs: dict[str, Observed] = {}

    def see(site: Site, x: F32, ys: Sequence[F32]) -> None:
        inputs.setdefault(site.name, Observed(x.shape[1])).add(x, name=site.name)
        for name, y in zip(site.weights, ys, strict=True):
            outputs.setdefault(name, Observed(y.shape[1])).add(y, name=name)

    for i, window in enumerate(windows):
        if progress is not None:
            progress("npu: ranges", i, len(windows))
        _watch(host, window, see)
    return (
        {name: observed.range() for name, observed in inputs.items()},
        {name: observed.range() for name, observed in outputs.items()},
    )


def _outliers(
    host: Host,
    windows: Sequence[I32],
    bounds: Mapping[str, Mapping[Choice, float]],
    progress: Progress | None,
) -> dict[str, dict[Choice, I64]]:
    counts: dict[str, dict[Choice, I64]] = {}

    def see(site: Site, x: F32, _: Sequence[F32]) -> None:
        own = counts.setdefault(
            site.name, {c: np.zeros(x.shape[1], np.int64) for c in bounds[site.name]}
        )
        magnitudes = np.abs(x)
        for choice, bound in bounds[site.name].items():
            own[choice] += (magnitudes > np.float32(bound)).sum(axis=0)

    for i, window in enumerate(windows):
        if progress is not None:
            progress("npu: outliers", i, len(windows))
        _watch(host, window, see)
    return counts


def _dense(host: Host, tokens: I32) -> npt.NDArray[np.float64]:
    """log p f64 [_SCORED, vocabulary] at the end of `tokens`"""
    logits = host.forward(tokens, 0, all_logits=True)
    check_finite(logits, "the logits")
    return _log_softmax(logits[-_SCORED:])


def _effects(
    host: Host,
    site: Site,
    weights: Sequence[F32],
    seen: Range,
    tokens: I32,
    dense: npt.NDArray[np.float64],
) -> dict[Choice, float]:
    """What each choice does to the predictions while all else is as it was.

    Most of them do less than the re-rounding of int8 activations in all later products, which any
    change sets off: some 5e-3 nats. So one coarse rounding is measured, which does more, and what
    finer ones do follows from the squares of their errors. Clipped values are no such noise: that
    is measured directly, where it does more than the rounding.
    """
    rounded = []
    for w in weights:
        scales = weight_scales(np.abs(w).max(axis=1), per_channel=True)
        rounded.append(quantize_weights(w, scales).astype(np.float32) * scales[:, None])
    with host.cut([site]) as segments:
        segments.run(0, tokens, 0)
        held = _Registers(segments, host, tokens.size)
        x = segments.register(site.input)[: tokens.size].copy()

        def error(rounded_x: F32) -> float:
            """Mean square of what it does to a token's outputs; the first one is like no other."""
            off = (rounded_x - x)[1:]
            return sum(float(np.square(off @ w.T).sum()) for w in rounded) / len(off)

        def divergence(rounded_x: F32) -> float:
            held.restore()
            for w, output, bias in zip(rounded, site.outputs, site.biases, strict=True):
                y = rounded_x @ w.T
                segments.register(output)[: tokens.size] = y if bias is None else y + bias
            logits = segments.run(1, tokens, 0, all_logits=True, want_logits=True)
            assert logits is not None
            found = _log_softmax(logits[-_SCORED:])
            return float((np.exp(dense) * (dense - found)).sum() / len(dense))

        coarse = _rounded(x, SHADOWED[0], seen, steps=_COARSE)
        nothing = divergence(x)
        sensitivity = max(divergence(coarse) - nothing, 0.0) / max(error(coarse), _LEAST)
        effects = {}
        for choice in CHOICES:
            rounded_x = _rounded(x, choice, seen)
            effects[choice] = sensitivity * error(rounded_x)
            if not choice.shadow:
                direct = divergence(rounded_x) - nothing
                if direct > nothing:
                    effects[choice] = max(effects[choice], direct)
        segments.cached(0)
    return effects


def _rounded(x: F32, choice: Choice, seen: Range, *, steps: float = Q_MAX) -> F32:
    """As the device and the shadow compute it; `steps` from 0 to the bound."""
    scale = np.float32(choice.bound(seen) / steps)
    q: F32 = np.rint(x / scale)
    return (q if choice.shadow else np.clip(q, -steps - 1, steps)) * scale


class _Registers:
    """Copies of all registers, so that the rest of a forward can run more than once."""

    def __init__(self, segments: Segments, host: Host, n_tokens: int) -> None:
        self._views = [segments.register(i)[:n_tokens] for i in range(host.n_registers)]
        self._copies = [view.copy() for view in self._views]

    def restore(self) -> None:
        for view, copy in zip(self._views, self._copies, strict=True):
            view[:] = copy


def _log_softmax(logits: F32) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide
