"""An NPU in numpy: exact, and it refuses what real ones refuse. Knows no runtime of anyone."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import UnsupportedError
from elute.npu import checks
from elute.npu.device import Graph, Outputs, Product, Profile, Progress, requantized
from elute.types import F32, I8, I32

# sim: what an NPU could do at best. htp: as Qualcomm's. one-scale: as those that have one scale a
# tensor and nothing else.
PROFILES = {
    "sim": Profile("sim", per_channel=True, outputs=Outputs.INT32),
    "htp": Profile("htp", per_channel=True, outputs=Outputs.INT8),
    "one-scale": Profile("one-scale", per_channel=False, outputs=Outputs.INT8),
}
SLICE = 1024  # outputs at a time: their weights are widened to 4 MiB of f32
EXACT_K = 1024  # 128 * 127 * 1024 < 2**24: every sum of so many products is an f32, in any order


class Keep(StrEnum):
    """What is kept of the weights between two runs."""

    NOTHING = "nothing"  # made anew each time
    INT8 = "int8"  # 1 byte a weight, widened each time
    FLOAT = "float"  # 4 bytes a weight, as BLAS wants them


def integer_product(x: I8, w: I8 | F32) -> I32:
    """x i8 [M, K] @ w.T -> i32 [M, N], exact up to checks.MAX_K channels.

    w  i8 [N, K], or the same numbers as f32

    By float BLAS, block after block of channels in which it is exact.
    """
    acc = np.zeros((x.shape[0], w.shape[0]), np.int32)
    for start in range(0, x.shape[1], EXACT_K):
        block = slice(start, start + EXACT_K)
        left = x[:, block].astype(np.float32)
        for first in range(0, w.shape[0], SLICE):
            outputs = slice(first, first + SLICE)
            right = w[outputs, block].astype(np.float32, copy=False)
            acc[:, outputs] += (left @ right.T).astype(np.int32)
    return acc


class Sim:
    """The device `sim`.

    profile  one of PROFILES by name, or any other
    """

    def __init__(self, profile: Profile | str = "sim", *, keep: Keep = Keep.INT8) -> None:
        if isinstance(profile, str):
            if profile not in PROFILES:
                raise UnsupportedError(
                    f"npu sim: found the profile {profile}, wanted one of {', '.join(PROFILES)}"
                )
            profile = PROFILES[profile]
        self._profile, self._keep = profile, keep
        self._graphs: dict[str, Graph] = {}
        self._weights: dict[str, list[I8 | F32]] = {}

    @property
    def profile(self) -> Profile:
        return self._profile

    def load(self, graphs: Sequence[Graph], *, progress: Progress | None = None) -> None:
        """Adds to those that it has. Raises UnsupportedError, of weights too if it keeps them."""
        checks.accept(graphs, self._profile, loaded=self._graphs)
        for done, graph in enumerate(graphs, 1):
            if self._keep is not Keep.NOTHING:
                self._weights[graph.name] = [self._widened(product) for product in graph.products]
            self._graphs[graph.name] = graph
            if progress is not None:
                progress("npu: compile", done, len(graphs))

    def _widened(self, product: Product) -> I8 | F32:
        w = checks.weights(product)
        return w.astype(np.float32) if self._keep is Keep.FLOAT else w

    def run(self, graph: str, x: I8) -> list[npt.NDArray[Any]]:
        """As the protocol has it."""
        loaded = checks.graph_named(self._graphs, graph, self._profile.name)
        checks.check_input(loaded, x)
        kept = self._weights.get(graph)
        outputs = []
        for i, product in enumerate(loaded.products):
            w = checks.weights(product) if kept is None else kept[i]
            outputs.append(self._output(integer_product(x, w), product))
        return outputs

    def _output(self, acc: I32, product: Product) -> npt.NDArray[Any]:
        if self._profile.outputs is Outputs.INT8:
            return requantized(acc, product)
        if self._profile.outputs is Outputs.INT32:
            return acc
        scales = product.weight_scales * np.float32(product.input_scale)
        return acc.astype(np.float32) * scales.astype(np.float32)

    def close(self) -> None:
        self._graphs.clear()
        self._weights.clear()
