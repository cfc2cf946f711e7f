"""A linear op as int8 products with static scales, and what the CPU adds to them: the shadow.

x is rounded once, q = round(x / scale). The device gets clip(q), the CPU keeps r = q - clip(q),
which is 0 nearly everywhere, and adds r @ w.T from the few rows of w.T that it needs. Those are
made from the packed codes that decoding uses; there is no other copy of a weight on the CPU.

Source: llm.npu (arXiv 2407.05858), section 3.3. Its equation 1 is no identity and gives the device
values that int8 lacks; this is. Where a device rounds its outputs to int8 as well, those that it
saturates are computed again, whole: the paper leaves that out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elute.npu.device import Q_MAX, Graph, Outputs
from elute.npu.rows import Rows
from elute.npu.sites import Site
from elute.types import F32, I8


@dataclass
class Counts:
    """Of values of inputs and outputs since the start."""

    inputs: int = 0
    clipped: int = 0  # and added back, or lost where there is no shadow
    outputs: int = 0
    saturated: int = 0  # and computed again


@dataclass(eq=False)
class Pending:
    """A product of a chunk under way: q i8 [rows, K] of the device, r as n outliers."""

    q: I8
    rows: npt.NDArray[np.int64]  # [n]
    channels: npt.NDArray[np.int64]  # [n]
    residuals: npt.NDArray[np.int64]  # [n]
    n_tokens: int
    results: list[npt.NDArray[np.generic]] | None = None
    shadow: npt.NDArray[np.int64] | None = None  # [n_tokens, N of all products]


class StaticLinear:
    """One site's products. Not for two chunks' same call at once; calls of different chunks may mix.

    outputs  of the device's profile
    shadow   whether what the device clips is added back
    """

    def __init__(
        self, site: Site, graph: Graph, outputs: Outputs, rows: Rows, *, shadow: bool
    ) -> None:
        self.site = site
        self.graph = graph
        self.shadow = shadow
        self.counts = Counts()
        self._outputs = outputs
        self._rows = rows
        self._scale = np.float32(graph.products[0].input_scale)
        # of the sums of each output, as floats
        self._factors = [
            np.broadcast_to(p.weight_scales * self._scale, p.shape[:1]).astype(np.float32)
            for p in graph.products
        ]

    @property
    def name(self) -> str:
        return self.graph.name

    def split(self, x: F32) -> Pending:
        """x f32 [M, K] -> what the device gets, padded with zeros to its rows, and what not."""
        if self.site.columns is not None:
            x = x[:, self.site.columns]
        whole = np.rint(x / self._scale)
        clipped = np.clip(whole, -Q_MAX - 1, Q_MAX)
        q = np.zeros((self.graph.rows, x.shape[1]), np.int8)
        q[: len(x)] = clipped
        rows, channels = np.nonzero(whole != clipped)
        residuals = (whole - clipped)[rows, channels].astype(np.int64)
        self.counts.inputs += x.size
        self.counts.clipped += rows.size
        return Pending(q, rows, channels, residuals, len(x))

    def add_shadow(self, pending: Pending) -> None:
        """What the device clipped, times the weights."""
        if not self.shadow or not pending.residuals.size:
            return
        wanted, slots = np.unique(pending.channels, return_inverse=True)
        rows = self._rows.of(wanted)
        compact = np.zeros((pending.n_tokens, wanted.size), np.int64)
        compact[pending.rows, slots] = pending.residuals
        pending.shadow = compact @ rows.astype(np.int64)

    def finish(self, pending: Pending, outputs: Sequence[F32]) -> None:
        """Writes y f32 [M, N] of each product, bias included, into `outputs`."""
        assert pending.results is not None
        at = 0
        for i, product in enumerate(self.graph.products):
            n = product.shape[0]
            result = pending.results[i][: pending.n_tokens]
            shadow = None if pending.shadow is None else pending.shadow[:, at : at + n]
            y = self._product(i, result, shadow)
            if self._outputs is Outputs.INT8:
                self._repair(i, pending, result, y)
            bias = self.site.biases[i]
            outputs[i][: pending.n_tokens] = y if bias is None else y + bias
            at += n

    def _product(
        self, i: int, result: npt.NDArray[np.generic], shadow: npt.NDArray[np.int64] | None
    ) -> F32:
        factors = self._factors[i]
        if self._outputs is Outputs.INT32:
            sums = result.astype(np.int64) if shadow is None else result.astype(np.int64) + shadow
            exact: F32 = sums.astype(np.float32) * factors
            return exact
        y = result.astype(np.float32)
        if self._outputs is Outputs.INT8:
            y *= np.float32(self.graph.products[i].output_scale or 0)
        return y if shadow is None else y + shadow.astype(np.float32) * factors

    def _repair(self, i: int, pending: Pending, result: npt.NDArray[np.generic], y: F32) -> None:
        """Elements that the device saturated, whole from all their inputs."""
        tokens, outputs = np.nonzero((result >= Q_MAX) | (result <= -Q_MAX - 1))  # type: ignore[operator]
        self.counts.outputs += result.size
        self.counts.saturated += tokens.size
        if not tokens.size:
            return
        wanted, slots = np.unique(outputs, return_inverse=True)
        weights = self._rows.outputs(i, wanted).astype(np.float64)
        whole = pending.q[: pending.n_tokens].astype(np.float64)
        if self.shadow:
            whole[pending.rows, pending.channels] += pending.residuals
        for slot, output in enumerate(wanted):
            at = tokens[slots == slot]
            y[at, output] = (whole[at] @ weights[slot]).astype(np.float32) * self._factors[i][
                output
            ]
