"""How fast a model runs under a plan, by a rehearsal: some of its layers, as the plan has them.

Random weights of the model's shape stay or pass through the plan's window as its own would, read
from the same disk by the same stream, multiplied by the same kernels. So whatever a run waits for
is in it: a disk that shares the processors, small windows, threads that wake each other. Only the
values are not the model's. Of banks, where values decide what is read, the model's own are taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elute import _native
from elute.api import text_tokens
from elute.bench.pace import CONTEXT, cut, recipe_of
from elute.bench.random_weights import RandomWeights, check_memory, side_by_side
from elute.errors import DeviceError
from elute.flash.disk import Disk
from elute.flash.plan import BLOCK, Plan, least_window, split
from elute.flash.sparsity import thresholds
from elute.flash.weights import FlashWeights, Recorded, pages, uses
from elute.formats.packed import PackedModel
from elute.formats.packed_layout import Records
from elute.formats.tokenizer import Tokenizer
from elute.kernels.registry import Choice
from elute.model.families import op_list
from elute.model.ops import Experts, Linear, OpList
from elute.runtime import calibration
from elute.runtime.executor import Executor

# As many layers as take so much of reading and of memory. What stays is spread evenly to within a
# matrix, of which this holds many.
MOST_READ_S = 0.2
MOST_BYTES = 768 << 20
# Of banks fewer: what stays of them is found out over many tokens.
MOST_BANKS_S = 0.1
LEAST_BANK_LAYERS, MOST_BANK_LAYERS = 2, 8
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
    token_s, waited_s = _timed(executor, [*range(CONTEXT)], weights.stream.figures)
    if weights.stream.failure:
        raise DeviceError(weights.stream.failure)
    worked_s = max(0.0, token_s - waited_s - rest_s) * whole.n_layers / n_layers
    waited_s *= plan.missed / weights.plan.missed
    return Rehearsed(worked_s + waited_s + rest_s, waited_s)


def rehearse_banks(
    packed: PackedModel,
    plan: Plan,
    disk: Disk,
    *,
    sparsity: float,
    rest_s: float,
    n_threads: int,
    cache_type: str,
    kernels: Mapping[int, Choice] | None = None,
) -> Rehearsed | None:
    """Of a plan with staging memory, on the model's own weights, since what a token wants of them
    is up to the values: tokens of elute's own text run through its first layers.

    None for a sparsity of a model that was not calibrated. Raises as `rehearse`.
    """
    whole = op_list(packed.config)
    scores = calibration.saved(packed, whole) if sparsity else {}
    if scores is None:
        return None
    n_bytes = sum(bank.wanted * bank.total for bank in plan.banks)
    least = max(n_bytes / disk.sequential_bytes_s / MOST_BANKS_S, whole.n_layers / MOST_BANK_LAYERS)
    n_layers = max(1, min(whole.n_layers, int(whole.n_layers / least)))
    n_layers = max(n_layers, min(whole.n_layers, LEAST_BANK_LAYERS))
    ops = op_list(cut(packed.config, n_layers, whole.n_layers))
    names = {name for op in ops.ops if isinstance(op, Linear) for name in op.weights}
    names.update(name for op in ops.ops if isinstance(op, Experts) for name in op.matrices())
    banks = tuple(bank for bank in plan.banks if bank.name in names)
    slots = {bank.name: plan.slots[bank.name] for bank in banks}
    slot_bytes = sum(bank.block_bytes * slots[bank.name] for bank in banks)
    weights = FlashWeights(
        packed,
        ops,
        replace(plan, banks=banks, slots=slots, slot_bytes=slot_bytes),
        request_bytes=disk.request_bytes,
        gap_bytes=disk.gap_bytes,
    )
    executor = Executor(
        ops,
        weights,
        context=CONTEXT,
        n_threads=n_threads,
        cache_type=cache_type,
        kernels=kernels,
    )
    found = thresholds(scores, sparsity) if sparsity else {}
    executor.sparsify({name: at for name, at in found.items() if name in executor.inputs})
    tokenizer = Tokenizer.from_files(packed.tokenizer_files())
    tokens, _ = text_tokens(tokenizer, calibration.own_text())
    token_s, waited_s = _timed(executor, tokens[:CONTEXT], weights.figures)
    if weights.banks is not None and weights.banks.failure:
        raise DeviceError(weights.banks.failure)
    times = whole.n_layers / n_layers
    layers_s = max(token_s - rest_s, waited_s)
    return Rehearsed(layers_s * times + rest_s, waited_s * times)


def _timed(
    executor: Executor, tokens: Sequence[int], figures: Callable[[], tuple[int, float]]
) -> tuple[float, float]:
    """-> seconds of a token and seconds that it waited, one token after the other.

    figures  whose second is the seconds that all threads waited so far
    """

    def forward(i: int) -> None:
        position = i % len(tokens)
        executor.forward(np.array([tokens[position]], np.int32), position)

    for i in range(WARM_UP):
        forward(i)
    n_tokens = 0
    waited_before, begun = figures()[1], time.perf_counter()
    while (took := time.perf_counter() - begun) < ENOUGH_S or n_tokens < LEAST_TOKENS:
        forward(WARM_UP + n_tokens)
        n_tokens += 1
    waited_s = (figures()[1] - waited_before) / executor.n_threads
    return took / n_tokens, waited_s / n_tokens


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
