"""Tiny models of every family with prompts on a device, calibrated once for all tests of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from test_executor import InMemory
from tiny import MIXTURES, tiny_checkpoint

from elute.model.families import op_list
from elute.model.ops import OpList
from elute.npu.assemble import static_linears
from elute.npu.calibrate import SiteStatistics, calibrate
from elute.npu.choices import SHADOWED, Choice
from elute.npu.codes import PanelCodes
from elute.npu.device import Device
from elute.npu.linear import StaticLinear
from elute.npu.policies import InOrder
from elute.npu.prompts import PromptExecutor
from elute.npu.ranges import Range
from elute.npu.schedule import Policy
from elute.npu.sim import Sim
from elute.quantize.rtn import quantize
from elute.runtime.executor import Executor
from elute.types import F32, I32

CONTEXT = 400  # beyond a chunk of 256
__all__ = ["CONTEXT", "MIXTURES", "Fixed", "Tiny", "at_the_edge", "prompts", "some_tokens", "tiny"]


@dataclass(frozen=True, eq=False)
class Tiny:
    """floats: of the codes, columns as the input's channels are"""

    ops: OpList
    source: InMemory
    floats: dict[str, F32]
    statistics: dict[str, SiteStatistics]

    def executor(self, **options: object) -> Executor:
        return Executor(self.ops, self.source, **{"n_threads": 1, **options})


@dataclass(frozen=True)
class Fixed(Choice):
    """A bound of `times` the largest value that the calibration saw."""

    times: float = 1.0

    def bound(self, seen: Range) -> float:
        return seen.maximum * self.times or 1.0


@cache
def tiny(family: str, columns: bool = False, seed: int = 0) -> Tiny:
    """columns: of all linears but experts, in an order of their own (act-order)"""
    config, weights = tiny_checkpoint(family, seed=seed, max_position_embeddings=CONTEXT)
    ops = op_list(config)
    rng = np.random.default_rng(5)
    matrices, floats = {}, dict(weights)
    for i, name in enumerate(ops.matrices()):
        w = weights[name]
        order = None
        if columns and "proj" in name and "expert" not in name:
            order = rng.permutation(w.shape[1]).astype(np.int32)
            w = w[:, order]
        bits = (4, 8, 3, 5)[i % 4]
        matrix = quantize(w, bits=bits, group_size=32, symmetric=bits % 2 == 0)
        object.__setattr__(matrix, "columns", order)
        matrices[name], floats[name] = matrix, matrix.dequantize()
    source = InMemory(matrices, {name: weights[name] for name in ops.vectors()})
    executor = Executor(ops, source, n_threads=1)
    text = some_tokens(300, ops.vocabulary)
    return Tiny(ops, source, floats, calibrate(executor, floats.__getitem__, text))


def some_tokens(n: int, vocabulary: int, seed: int = 0) -> I32:
    return np.random.default_rng([n, seed]).integers(0, vocabulary, n).astype(np.int32)


def at_the_edge(model: Tiny, times: float, *, shadow: bool = True) -> dict[str, Fixed]:
    return dict.fromkeys(model.statistics, Fixed(times, shadow, times))


def mixed(model: Tiny) -> dict[str, Choice]:
    """Of each three sites one with few outliers, one with many, and one that clips."""
    kinds = (SHADOWED[0], Fixed(0.3, True, 0.3), Fixed(0.5, False, 0.5))
    return {name: kinds[i % 3] for i, name in enumerate(model.statistics)}


def linears(
    model: Tiny,
    host: Executor,
    device: Device,
    choices: dict[str, Choice] | None = None,
    *,
    chunk: int = 32,
    isa: str | None = None,
    hot_share: float = 0.03,
) -> list[StaticLinear]:
    choices = mixed(model) if choices is None else choices
    counted = {
        name: replace(found, outliers={choices[name]: found.outliers[SHADOWED[1]]})
        for name, found in model.statistics.items()
    }
    linears = static_linears(
        host.sites,
        lambda site: PanelCodes([model.source.matrix(n) for n in site.weights], isa=host.isa),
        counted,
        choices,
        device.profile,
        chunk=chunk,
        identity="tiny",
        isa=host.isa if isa is None else isa,
        hot_share=hot_share,
    )
    device.load([linear.graph for linear in linears])
    return linears


def prompts(
    model: Tiny,
    choices: dict[str, Choice] | None = None,
    *,
    profile: str = "sim",
    device: Device | None = None,
    chunk: int = 32,
    isa: str | None = None,
    linear_isa: str | None = None,
    n_threads: int = 1,
    hot_share: float = 0.03,
    policy: Policy | None = None,
    in_flight: int = 4,
) -> PromptExecutor:
    host = model.executor(n_threads=n_threads, isa=isa)
    device = Sim(profile) if device is None else device
    made = linears(model, host, device, choices, chunk=chunk, isa=linear_isa, hot_share=hot_share)
    return PromptExecutor(host, made, device, chunk=chunk, policy=policy, in_flight=in_flight)


def plain(
    model: Tiny, choices: dict[str, Choice] | None = None, **options: object
) -> PromptExecutor:
    """One chunk, one thread, in order."""
    return prompts(model, choices, **{"chunk": 256, "policy": InOrder(), "in_flight": 1, **options})


def by_cuts(run: Callable[..., F32], tokens: I32, cuts: Sequence[int], *, position: int = 0) -> F32:
    """All logits, computed by a call for each part."""
    ends = [*cuts, tokens.size]
    parts, at = [], 0
    for end in ends:
        parts.append(run(tokens[at:end], position + at, all_logits=True))
        at = end
    return np.concatenate(parts)
