"""How fast a model runs under a plan, by a rehearsal: some of its layers, as the plan has them.

Random weights of the model's shape stay or pass through the plan's window as its own would, read
from the same disk by the same stream, multiplied by the same kernels. So whatever a run waits for
is in it: a disk that shares the processors, small windows, threads that wake each other. Only the
values are not the model's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elute import _native
from elute.bench.pace import CONTEXT, cut, recipe_of
from elute.bench.random_weights import RandomWeights, check_memory, side_by_side
from elute.errors import DeviceError
from elute.flash.disk import Disk
from elute.flash.plan import BLOCK, Plan, least_window, split
from elute.flash.weights import Recorded, pages, uses
from elute.formats.packed_layout import Records
from elute.kernels.registry import Choice
from elute.model.families import op_list
from elute.model.ops import OpList
from elute.runtime.executor import Executor

# As many layers as take so much of reading and of memory. What stays is spread evenly to within a
# matrix, of which this holds many.
MOST_READ_S = 0.2
MOST_BYTES = 768 << 20
ENOUGH_S = 1.0
LEAST_TOKENS = 3
WARM_UP = 2


@dataclass(frozen=True)
class Rehearsed:
    """Of a token of the whole model."""

    token_s: float
    waited_s: float


def rehearse(
    packed: Recorded,
    config: Mapping[str, Any],
    plan: Plan,
    file: Path,
    disk: Disk,
    *,
    rest_s: float,
    n_threads: int,
    cache_type: str,
    kernels: Mapping[int, Choice] | None = None,
) -> Rehearsed:
    """Of a plan with a window.

    file    what is read: on the model's disk, at least as long as the largest matrix
    disk    that of `file`, as a run would use it
    rest_s  what follows the layers (bench/pace.py), which a few layers have as the whole model has

    Raises BudgetError when the memory is not there, DeviceError when the file cannot be read.
    """
    whole = op_list(config)
    order = uses(whole, _Alike(packed.records))
    least = max(
        plan.missed / disk.sequential_bytes_s / MOST_READ_S,
        sum(use.total for use in order) / MOST_BYTES,
    )
    n_layers = max(1, min(whole.n_layers, int(whole.n_layers / least)))
    ops = op_list(cut(config, n_layers, whole.n_layers))
    weights = _Streamed(packed, ops, plan, file, disk)
    executor = Executor(
        ops,
        weights,
        context=CONTEXT,
        n_threads=n_threads,
        cache_type=cache_type,
        kernels=kernels,
    )
    stream, n_tokens = weights.stream, 0
    for i in range(WARM_UP):
        executor.forward(np.array([i], np.int32), i)
    waited_before, begun = stream.figures()[1], time.perf_counter()
    while (took := time.perf_counter() - begun) < ENOUGH_S or n_tokens < LEAST_TOKENS:
        position = WARM_UP + n_tokens % (CONTEXT - WARM_UP)
        executor.forward(np.array([position], np.int32), position)
        n_tokens += 1
    if stream.failure:
        raise DeviceError(stream.failure)
    waited_s = (stream.figures()[1] - waited_before) / n_threads / n_tokens
    worked_s = max(0.0, took / n_tokens - waited_s - rest_s) * whole.n_layers / n_layers
    waited_s *= plan.missed / weights.plan.missed
    return Rehearsed(worked_s + waited_s + rest_s, waited_s)


class _Streamed(RandomWeights):
    """Random weights, of which as many come from the file as do under the plan."""

    def __init__(self, packed: Recorded, ops: OpList, whole: Plan, file: Path, disk: Disk) -> None:
        order = uses(ops, _Alike(packed.records))
        window = max(whole.window, least_window(order))
        share = whole.pinned_bytes / (whole.pinned_bytes + whole.missed)
        kept = int(share * sum(use.total for use in order))
        self.plan = split(window + kept, {}, order, window)
        self._sizes = {
            name: size for use in order for name, size in zip(use.names, use.n_bytes, strict=True)
        }
        planes = side_by_side({name: self._sizes[name] for name in self.plan.pinned})
        check_memory(window, "the window")
        self._window = pages(window)
        for name, at in self.plan.places.items():
            planes[name] = self._window[at : at + self._sizes[name]]
        super().__init__(ops, recipe_of(ops, packed), planes=planes)
        self.stream = self._opened(file, disk, disk.depth_of(whole.missed // len(whole.places)))

    def _opened(self, file: Path, disk: Disk, depth: int) -> _native.WeightStream:
        """Of the file, all over it, as a model's matrices lie: a read of what lies beside the last
        read is a cheaper one."""
        try:
            blocks = file.stat().st_size // BLOCK
            pieces, block = [], 0
            for name, size in self._sizes.items():
                n_blocks = size // BLOCK
                if block + n_blocks > blocks:
                    block = 0
                if name in self.plan.places:
                    at = self.plan.places[name]
                    pieces.append((0, block * BLOCK, n_blocks * BLOCK, at))
                block += n_blocks
            return _native.open_stream(
                [str(file)], pieces, self._window, "auto", depth, disk.request_bytes, True
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: the native std::system_error
            raise DeviceError(f"flash: {error}; check the model's files") from None

    def attach(self, native: _native.Executor, names: Sequence[str]) -> None:
        """As FlashWeights.attach."""
        index = {name: i for i, name in enumerate(self.plan.places)}
        native.stream(self.stream, [index.get(name, -1) for name in names])


@dataclass(frozen=True)
class _Alike:
    """Recorded, without column orders: random weights have none."""

    records: Records

    def column_order(self, name: str) -> bytes | None:
        return None
