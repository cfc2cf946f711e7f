"""How fast this machine computes a model whose weights are all in memory, without having them.

A few layers of its shape with random weights, as many as fill memory beyond the caches, run tokens;
half as many run them too, and the difference is a layer's time. Measured, not derived: threads,
attention, norms and the turns between steps are all in it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elute.bench.random_weights import RANDOM_BYTES, RandomWeights, side_by_side
from elute.flash.weights import Recorded
from elute.formats.packed_layout import MatrixRecord, align
from elute.kernels.registry import Choice
from elute.model.families import op_list
from elute.model.ops import Embed, Experts, Head, Linear, OpList
from elute.model.rope import FREQUENCY_FACTORS
from elute.quantize.recipe import Recipe, Rule, Scheme
from elute.runtime.executor import Executor
from elute.types import OVER_READ, Affine, WeightSource

ENOUGH_BYTES = 192 << 20  # of layers: caches of some 32 MiB hold no part of them
CONTEXT = 64
ENOUGH_S = 0.4  # other programs come and go; a median of less would be of one moment
LEAST_ROUNDS, MOST_ROUNDS = 9, CONTEXT - 3
WARM_UP = 3


@dataclass(frozen=True)
class Pace:
    """Seconds of a token: in all layers together, and in what comes after them."""

    layers_s: float
    rest_s: float

    @property
    def token_s(self) -> float:
        return self.layers_s + self.rest_s


@dataclass(frozen=True)
class Compute:
    """How a run computes; see Executor."""

    n_threads: int
    cache_type: str
    isa: str | None = None
    kernels: Mapping[int, Choice] | None = None

    def executor(self, ops: OpList, weights: WeightSource, *, context: int) -> Executor:
        return Executor(
            ops,
            weights,
            context=context,
            n_threads=self.n_threads,
            cache_type=self.cache_type,
            isa=self.isa,
            kernels=self.kernels,
        )


def measured_pace(
    packed: Recorded, config: Mapping[str, Any], compute: Compute, *, room: int | None = None
) -> Pace:
    """room: bytes that the weights may take; None: as many as are good for the measurement.

    Raises BudgetError when the memory is not there.
    """
    whole = op_list(config)
    layers = sum(_held(packed, name) for name in layer_matrices(whole))
    head = sum(_held(packed, op.weight) for op in whole.ops if isinstance(op, Head))
    most = ENOUGH_BYTES
    if room is not None:
        rows = sum(math.prod(packed.records[name].shape) // 8 for name in _rows(whole))
        most = min(ENOUGH_BYTES, room - head - rows - RANDOM_BYTES)
    n_layers = max(1, min(whole.n_layers, most * whole.n_layers // max(1, layers)))
    counts = sorted({max(1, n_layers // 2), n_layers})
    lists = [op_list(cut(config, n, whole.n_layers)) for n in counts]
    # As panels have them, also of a model by channel.
    sizes = {name: align(_planes(packed, name) + OVER_READ) for name in layer_matrices(lists[-1])}
    weights = RandomWeights(lists[-1], recipe_of(lists[-1], packed), planes=side_by_side(sizes))
    seconds = []
    for ops in lists:  # one after the other: threads of the one that waits would take processors
        executor = compute.executor(ops, weights, context=CONTEXT)
        seconds.append(_token_s(executor))
        del executor
    read = sum(_held(packed, name) for name in layer_matrices(whole, picked=True))
    share = read * counts[-1] / whole.n_layers
    layer_s = seconds[-1] * share / (share + head) / counts[-1]  # by bytes
    if len(counts) > 1:  # else a model of one layer, or no room for two
        measured_s = (seconds[-1] - seconds[0]) / (counts[-1] - counts[0])
        # A difference of two disturbed times may be anything; bytes tell what it can be.
        layer_s = min(max(measured_s, layer_s / 2), seconds[-1] / counts[-1])
    rest_s = max(0.0, seconds[-1] - counts[-1] * layer_s)
    return Pace(layer_s * whole.n_layers, rest_s)


def _token_s(executor: Executor) -> float:
    """The median of tokens one after the other."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < MOST_ROUNDS and (
        len(times) < LEAST_ROUNDS or time.perf_counter() - begun < ENOUGH_S
    ):
        position = len(times)
        started = time.perf_counter()
        executor.forward(np.array([position], np.int32), position)
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


def layer_matrices(ops: OpList, *, picked: bool = False) -> list[str]:
    """Of linears, and of all experts or of as many as a token picks."""
    names: list[str] = []
    for op in ops.ops:
        if isinstance(op, Linear):
            names.extend(op.weights)
        elif isinstance(op, Experts):
            names.extend(op.matrices()[: 3 * op.top_k] if picked else op.matrices())
    return names


def _planes(packed: Recorded, name: str) -> int:
    record = packed.records[name]
    assert isinstance(record, MatrixRecord)
    return record.planes_bytes


def _held(packed: Recorded, name: str) -> int:
    """Bytes of a matrix in memory, wherever its planes lie in files."""
    parts = packed.records[name].parts()
    scales = sum(part.stored_bytes for part in parts if part.suffix in (".scales", ".offsets"))
    return _planes(packed, name) + scales


def _rows(ops: OpList) -> set[str]:
    """Embeddings that no head shares."""
    heads = {op.weight for op in ops.ops if isinstance(op, Head)}
    return {op.weight for op in ops.ops if isinstance(op, Embed)} - heads


def cut(config: Mapping[str, Any], n_layers: int, of: int) -> dict[str, Any]:
    """The config of the first layers: lists with an entry a layer are cut too."""
    cut = {
        key: value[:n_layers]
        if isinstance(value, list) and len(value) == of and key != FREQUENCY_FACTORS
        else value
        for key, value in config.items()
    }
    return {**cut, "num_hidden_layers": n_layers}


def recipe_of(ops: OpList, packed: Recorded) -> Recipe:
    """Random matrices as the model stores its own, but an embedding of its own in one bit: of it a
    token reads a row."""
    rows = _rows(ops)
    rules = []
    for name in ops.matrices():
        record = packed.records[name]
        assert isinstance(record, MatrixRecord)
        if name in rows:
            rules.append(Rule(name, bits=1, group_size=None))
            continue
        symmetric = record.affine is Affine.SYMMETRIC
        scheme = Scheme.SYMMETRIC if symmetric else Scheme.ASYMMETRIC
        if symmetric and (record.bits, record.zero) == (2, 1):
            scheme = Scheme.TERNARY
        rules.append(Rule(name, record.bits, record.group_size, scheme))
    return Recipe(tuple(rules))
