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
from typing import Any

import numpy as np
import numpy.typing as npt

from elute import _native
from elute.errors import DeviceError
from elute.npu.device import Q_MAX, Graph, Outputs
from elute.npu.rows import Rows, Wanted
from elute.npu.sites import Site
from elute.types import F32, I8, I32, I64


@dataclass
class Counts:
    """Of values of inputs and outputs since the start."""

    inputs: int = 0
    clipped: int = 0  # and added back, or lost where there is no shadow
    outputs: int = 0
    saturated: int = 0  # and computed again


@dataclass(eq=False)
class Pending:
    """A product of a chunk under way; see npu/reference.py for what was clipped.

    q          i8 [rows, K], beyond the tokens 0
    starts     i32 [n_tokens + 1], channels, residuals i32 [n]
    slots      i32 [n], which of the wanted rows each residual is multiplied by
    wanted     rows of the weights, on their way; None: there is nothing to add
    results    of the device, for each product [rows, N]
    shadow     i32 or i64 [n_tokens, N of all products]
    """

    n_tokens: int
    q: I8
    starts: I32
    channels: I32
    residuals: I32
    slots: I32 | None = None
    wanted: Wanted | None = None
    results: Sequence[npt.NDArray[Any]] = ()
    shadow: I32 | I64 | None = None

    def close(self) -> None:
        """It is not gone on with."""
        if self.wanted is not None:
            self.wanted.close()


class StaticLinear:
    """One site's products. Chunks may be at different calls at the same time.

    outputs  of the device's profile
    shadow   whether what the device clips is added back
    """

    def __init__(
        self, site: Site, graph: Graph, outputs: Outputs, rows: Rows, *, shadow: bool, isa: str
    ) -> None:
        self.site = site
        self.graph = graph
        self.rows = rows
        self.shadow = shadow
        self.counts = Counts()
        self._isa = isa
        self._outputs = outputs
        self._scale = np.float32(graph.products[0].input_scale)
        # what a step of each output's sum is worth
        self._factors = [(p.weight_scales * self._scale).astype(np.float32) for p in graph.products]

    @property
    def name(self) -> str:
        return self.graph.name

    def split(self, x: F32) -> Pending:
        """x f32 [M, K] -> what the device gets, and what not, whose weights are read from now on.

        Raises DeviceError for values that are not finite.
        """
        if self.site.columns is not None:
            x = x[:, self.site.columns]
        try:
            clipped, starts, channels, residuals = _native.split_outliers(
                self._isa, np.ascontiguousarray(x), float(self._scale)
            )
        except ValueError as error:
            raise DeviceError(f"{self.name}: {error}; run without --npu") from None
        q = np.zeros((self.graph.rows, x.shape[1]), np.int8)
        q[: len(x)] = clipped
        self.counts.inputs += x.size
        self.counts.clipped += residuals.size
        pending = Pending(len(x), q, starts, channels, residuals)
        if self.shadow and residuals.size:
            seen = np.zeros(x.shape[1], np.bool_)
            seen[channels] = True
            pending.slots = (np.cumsum(seen, dtype=np.int32) - 1)[channels]
            pending.wanted = self.rows.ask(np.flatnonzero(seen))
        return pending

    def add_shadow(self, pending: Pending) -> None:
        """What the device clipped, times weights. Raises DeviceError where they cannot be read."""
        if pending.wanted is None:
            return
        assert pending.slots is not None
        total: I64 | None = None
        for cut, rows in pending.wanted.parts():
            whole = len(pending.wanted.cuts) == 1
            starts, slots, residuals = (
                (pending.starts, pending.slots, pending.residuals)
                if whole
                else _of_slots(cut, pending.starts, pending.slots, pending.residuals)
            )
            product = _native.shadow_product(self._isa, starts, slots, residuals, rows)
            if whole:
                pending.shadow = product
                return
            if total is None:
                total = product.astype(np.int64)
            else:
                total += product
        pending.shadow = total

    def finish(self, pending: Pending, outputs: Sequence[F32]) -> None:
        """Writes y f32 [M, N] of each product, bias included, into `outputs`."""
        at = 0
        for i, product in enumerate(self.graph.products):
            n = product.shape[0]
            shadow: Any = None
            if pending.shadow is not None:
                shadow = np.ascontiguousarray(pending.shadow[:, at : at + n])
            result = pending.results[i][: pending.n_tokens]
            y = outputs[i][: pending.n_tokens]
            _native.finish_product(
                self._isa,
                result,
                shadow,
                self._factors[i],
                self.site.biases[i],
                y,
                product.output_scale or 0.0,
            )
            if self._outputs is Outputs.INT8:
                self._repair(i, pending, result, y)
            at += n

    def _repair(self, i: int, pending: Pending, result: I8, y: F32) -> None:
        """Elements that the device saturated, whole from all their inputs."""
        # 127 and -128 are neighbours as bytes: one comparison, where most of the time would go
        found = np.flatnonzero(result.view(np.uint8) - np.uint8(Q_MAX) < 2)
        tokens, outputs = np.divmod(found, result.shape[1])
        self.counts.outputs += result.size
        self.counts.saturated += tokens.size
        if not tokens.size:
            return
        wanted, slots = np.unique(outputs, return_inverse=True)
        starts, channels, residuals = pending.starts, pending.channels, pending.residuals
        if not self.shadow:
            starts, channels, residuals = np.zeros_like(starts), channels[:0], residuals[:0]
        sums = _native.saturated_products(
            self._isa,
            pending.q[: pending.n_tokens],
            starts,
            channels,
            residuals,
            self.rows.outputs(i, wanted),
            tokens.astype(np.int32),
            slots.astype(np.int32),
        )
        factors, bias = self._factors[i], self.site.biases[i]
        exact = sums.astype(np.float32) * (factors if factors.size == 1 else factors[outputs])
        y[tokens, outputs] = exact if bias is None else exact + bias[outputs]


def _of_slots(cut: slice, starts: I32, slots: I32, residuals: I32) -> tuple[I32, I32, I32]:
    """The residuals of some slots alone, counted from the first of them."""
    mine = (slots >= cut.start) & (slots < cut.stop)
    before = np.concatenate([[0], np.cumsum(mine, dtype=np.int32)]).astype(np.int32)
    return before[starts], slots[mine] - np.int32(cut.start), residuals[mine]
