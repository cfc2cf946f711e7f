"""Other ways to make a model's products in int8, for npu.py: rounded as they would, in float BLAS.

A product of rounded values in f32 is that of int8 within f32's own rounding, far below the int8
step; so these say what a method's rounding costs, and nothing of its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from elute.npu.calibrate import SiteStatistics
from elute.npu.choices import Choice
from elute.npu.device import Q_MAX
from elute.npu.reference import quantize_weights
from elute.npu.rows import weight_scales
from elute.npu.sites import Host, Site
from elute.types import F32, I32

OUTLIER = np.float32(6)  # LLM.int8's threshold of |x|
CHUNK = 256

Weights = Callable[[str], F32]


class Method:
    """Products of a site; columns in the order of the input's channels.

    seen, clipped  values of inputs so far, and those that int8 did not hold
    """

    def __init__(self, sites: Sequence[Site], weights: Weights) -> None:
        self.seen = self.clipped = 0
        self._w = {
            site.name: self.prepared(site, [weights(n) for n in site.weights]) for site in sites
        }

    def prepared(self, site: Site, weights: list[F32]) -> list[F32]:
        return weights

    def products(self, site: Site, x: F32) -> list[F32]:
        """x f32 [M, K] -> y f32 [M, N] of each weight, without bias."""
        self.seen += x.size
        x = self.rounded(site, x)
        return [x @ w.T for w in self._w[site.name]]

    def rounded(self, site: Site, x: F32) -> F32:
        return x

    def _static(self, x: F32, scale: np.float32, *, clip: bool = True) -> F32:
        q = np.rint(x / scale)
        self.clipped += int((np.abs(q + np.float32(0.5)) > 128).sum())
        return (np.clip(q, -Q_MAX - 1, Q_MAX) if clip else q) * scale


def int8_weights(w: F32, *, per_channel: bool) -> F32:
    """The values that int8 holds."""
    scales = weight_scales(np.abs(w).max(axis=1), per_channel=per_channel)
    return quantize_weights(w, scales).astype(np.float32) * scales[:, None]


class Float(Method):
    """Nothing is rounded."""


class RoundedWeights(Method):
    """Weights are; inputs are not."""

    def __init__(self, sites: Sequence[Site], weights: Weights, *, per_channel: bool) -> None:
        self._per_channel = per_channel
        super().__init__(sites, weights)

    def prepared(self, site: Site, weights: list[F32]) -> list[F32]:
        return [int8_weights(w, per_channel=self._per_channel) for w in weights]


class Static(Method):
    """int8 steps of a choice's bound, but nothing is clipped: what the shadows' sums must give."""

    def __init__(
        self,
        sites: Sequence[Site],
        weights: Weights,
        statistics: Mapping[str, SiteStatistics],
        choices: Mapping[str, Choice],
    ) -> None:
        self._scales = {
            name: np.float32(choices[name].bound(found.input) / Q_MAX)
            for name, found in statistics.items()
        }
        super().__init__(sites, weights)

    def prepared(self, site: Site, weights: list[F32]) -> list[F32]:
        return [int8_weights(w, per_channel=True) for w in weights]

    def rounded(self, site: Site, x: F32) -> F32:
        return self._static(x, self._scales[site.name], clip=False)


class SmoothQuant(Method):
    """Channels are divided by max|x|^alpha / max|w|^(1 - alpha), weights multiplied by it; one
    static scale for the input.

    Of all linear layers, also those where no op before them could take the division over, which
    the released code leaves alone. Source: SmoothQuant (arXiv 2211.10438), equation 4.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        weights: Weights,
        statistics: Mapping[str, SiteStatistics],
        *,
        alpha: float,
        per_channel: bool,
    ) -> None:
        self._alpha, self._per_channel = alpha, per_channel
        self._statistics = statistics
        self._smooth: dict[str, F32] = {}
        self._scales: dict[str, np.float32] = {}
        super().__init__(sites, weights)

    def prepared(self, site: Site, weights: list[F32]) -> list[F32]:
        largest = self._statistics[site.name].input.channels
        of_w = np.max([np.abs(w).max(axis=0) for w in weights], axis=0)
        smooth = largest**self._alpha / np.maximum(of_w, 1e-5) ** (1 - self._alpha)
        smooth = np.maximum(smooth, np.float32(1e-5)).astype(np.float32)
        self._smooth[site.name] = smooth
        self._scales[site.name] = np.float32((largest / smooth).max() / Q_MAX)
        return [int8_weights(w * smooth, per_channel=self._per_channel) for w in weights]

    def rounded(self, site: Site, x: F32) -> F32:
        return self._static(x / self._smooth[site.name], self._scales[site.name])


class LlmInt8(Method):
    """Columns with a value beyond OUTLIER in float, the rest in int8, a scale for each token.

    Source: LLM.int8 (arXiv 2208.07339), section 3.2.
    """

    def __init__(self, sites: Sequence[Site], weights: Weights, *, per_channel: bool) -> None:
        self._per_channel = per_channel
        self._whole: dict[str, list[F32]] = {}
        super().__init__(sites, weights)

    def prepared(self, site: Site, weights: list[F32]) -> list[F32]:
        self._whole[site.name] = weights
        return [int8_weights(w, per_channel=self._per_channel) for w in weights]

    def products(self, site: Site, x: F32) -> list[F32]:
        self.seen += x.size
        columns = np.flatnonzero((np.abs(x) > OUTLIER).any(axis=0))
        self.clipped += columns.size * len(x)
        rest = x.copy()
        rest[:, columns] = 0
        scales = np.abs(rest).max(axis=1, keepdims=True) / np.float32(Q_MAX)
        scales[scales == 0] = 1
        rest = np.rint(rest / scales) * scales
        outliers = np.ascontiguousarray(x[:, columns])
        pairs = zip(self._w[site.name], self._whole[site.name], strict=True)
        return [rest @ w.T + outliers @ whole[:, columns].T for w, whole in pairs]


class MethodExecutor:
    """The host with a method's products."""

    def __init__(self, host: Host, method: Method) -> None:
        self._host, self._method = host, method
        self.context, self.vocabulary = host.context, host.vocabulary
        self.logits_bytes = host.logits_bytes

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        tokens = self._host.checked(tokens, position)
        assert tokens.size <= CHUNK
        sites = self._host.sites
        with self._host.cut(sites) as segments:
            for i, site in enumerate(sites):
                segments.run(i, tokens, position)
                x = segments.register(site.input)[: tokens.size]
                products = self._method.products(site, x)
                for y, output, bias in zip(products, site.outputs, site.biases, strict=True):
                    segments.register(output)[: tokens.size] = y if bias is None else y + bias
            logits = segments.run(
                len(sites), tokens, position, all_logits=all_logits, want_logits=True
            )
            segments.cached(position + tokens.size)
        assert logits is not None
        return logits
