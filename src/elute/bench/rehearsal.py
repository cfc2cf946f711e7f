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
from elute.bench.pace import CONTEXT, Compute, cut, layer_matrices, recipe_of
from elute.bench.random_weights import RandomWeights, check_memory, side_by_side
from elute.errors import DeviceError
from elute.flash.disk import Disk
from elute.flash.plan import BLOCK, Plan, least_window, split
from elute.flash.sparsity import thresholds
from elute.flash.weights import FlashWeights, Recorded, pages, uses
from elute.formats.packed import PackedModel
from elute.formats.packed_layout import MatrixRecord, Records
from elute.formats.tokenizer import Tokenizer
from elute.model.families import op_list
from elute.model.ops import Experts, OpList
from elute.runtime import calibration
from elute.runtime.executor import Executor

# As many layers as take so much of reading and of memory. What stays is spread evenly to within a
# matrix, of which this holds many.
MOST_READ_S = 0.2
MOST_BYTES = 768 << 20
# Of banks fewer: what stays of them is found out over many tokens.
MOST_BANKS_S = 0.1
MOST_BANK_LAYERS = 8
PROMPT, BANKS_CONTEXT = 32, 256  # tokens, as a run has some in its cache when it generates
VOCABULARY = 256  # of random weights, at least CONTEXT: the head is no part of it
ENOUGH_S, MOST_S = 1.0, 5.0  # the rates of disks come and go by the second; nobody waits long
LEAST_TOKENS = 3
WARM_UP = 2  # tokens in which the stream comes into its stride


@dataclass(frozen=True)
class Rehearsed:
    """Of all layers, for a token: seconds that they compute, and that they wait for flash."""

    worked_s: float
    waited_s: float


def rehearse(
    packed: Recorded,
    config: Mapping[str, Any],
    plan: Plan,
    file: Path,
    disk: Disk,
    compute: Compute,
) -> Rehearsed | None:
    """Of a plan with a window.

    file  what is read: on the model's disk, at least as long as the largest matrix
    disk  that of `file`, as a run would use it

    None for a disk so slow that it would take long. Raises BudgetError when the memory is not
    there, DeviceError when the file cannot be read.
    """
    whole = op_list(config)
    order = uses(whole, _Alike(packed.records))
    least = max(
        plan.missed / disk.sequential_bytes_s / MOST_READ_S,
        sum(use.total for use in order) / MOST_BYTES,
    )
    n_layers = max(1, min(whole.n_layers, int(whole.n_layers / least)))
    config = {**cut(config, n_layers, whole.n_layers), "vocab_size": VOCABULARY}
    ops = op_list(config)
    if _is_long(plan.missed * n_layers / whole.n_layers, 0, disk):
        return None
    weights = _Streamed(packed, ops, plan, file, disk)
    executor = compute.executor(ops, weights, context=CONTEXT)
    token_s, waited_s = _timed(executor, range(CONTEXT), weights.stream.figures)
    return Rehearsed(
        (token_s - waited_s) * whole.n_layers / n_layers,
        waited_s * plan.missed / weights.plan.missed,
    )


def rehearse_banks(
    packed: PackedModel,
    plan: Plan,
    disk: Disk,
    compute: Compute,
    *,
    sparsity: float,
    cache_aware: float = 0.0,
) -> Rehearsed | None:
    """Of a plan with staging memory, on the model's own weights, since what a token wants of them
    is up to the values: tokens of elute's own text run through its first layers.

    None for a sparsity of a model that was not calibrated, and as `rehearse`, which has the errors.
    """
    whole = op_list(packed.config)
    scores = calibration.saved(packed, whole) if sparsity else {}
    if scores is None:
        return None
    tokens = [token for token in _own_tokens(packed) if token < whole.vocabulary][:BANKS_CONTEXT]
    wanted = sum(bank.wanted * bank.total for bank in plan.banks)
    most = min(
        MOST_BANK_LAYERS, int(whole.n_layers * MOST_BANKS_S * disk.sequential_bytes_s / wanted)
    )
    for n_layers in range(max(1, min(most, whole.n_layers)), whole.n_layers + 1):
        ops = op_list(cut(packed.config, n_layers, whole.n_layers))
        within = _cut_banks(packed, plan, ops)
        if within is not None:  # else its layers have none, or only a part of one
            break
    assert within is not None  # of all layers
    kept = within.slot_bytes + _loaded_bytes(packed, ops)
    if _is_long(within.missed, kept, disk):
        return None
    check_memory(kept + within.staging, "the weights")
    weights = FlashWeights(
        packed,
        ops,
        within,
        request_bytes=disk.request_bytes,
        gap_bytes=disk.gap_bytes,
        tell=False,  # a run does
    )
    executor = compute.executor(ops, weights, context=BANKS_CONTEXT)
    found = thresholds(scores, sparsity) if sparsity else {}
    found = {name: at for name, at in found.items() if name in executor.inputs}
    executor.sparsify(found, cache_aware=cache_aware)
    token_s, waited_s = _timed(executor, tokens, weights.figures, n_prompt=PROMPT)
    return Rehearsed(
        (token_s - waited_s) * whole.n_layers / n_layers, waited_s * plan.missed / within.missed
    )


def _cut_banks(packed: PackedModel, plan: Plan, ops: OpList) -> Plan | None:
    """The plan for what the ops use of the banks; None without any, or with a part of one."""
    names = set(layer_matrices(ops))
    members: dict[str, set[str]] = {}
    for name, record in packed.records.items():
        if isinstance(record, MatrixRecord) and record.bank is not None:
            members.setdefault(record.bank, set()).add(name)
    banks = []
    for bank in plan.banks:
        used = members.get(bank.name, {bank.name}) & names
        if used and used != members.get(bank.name, {bank.name}):
            return None
        if used:
            banks.append(bank)
    if not banks:
        return None
    slots = {bank.name: plan.slots[bank.name] for bank in banks}
    missed = sum(
        bank.wanted * (bank.n_blocks - slots[bank.name]) * bank.block_bytes for bank in banks
    )
    slot_bytes = sum(slots[bank.name] * bank.block_bytes for bank in banks)
    return replace(
        plan, banks=tuple(banks), slots=slots, slot_bytes=slot_bytes, missed=round(missed)
    )


def _loaded_bytes(packed: PackedModel, ops: OpList) -> int:
    """What FlashWeights reads at once: all but banks of channels, which hold no parts of a matrix
    but its planes, and experts."""
    names = {*ops.matrices(), *ops.vectors()}
    if not packed.banks:
        names -= {name for op in ops.ops if isinstance(op, Experts) for name in op.matrices()}
    return sum(part.stored_bytes for name in names for part in packed.records[name].parts())


def _own_tokens(packed: PackedModel) -> list[int]:
    tokenizer = Tokenizer.from_files(packed.tokenizer_files())
    tokens, _ = text_tokens(tokenizer, calibration.own_text())
    del tokenizer
    _native.return_freed_memory()  # a vocabulary takes ten times its size while it is read
    return tokens


def _is_long(missed: float, kept: int, disk: Disk) -> bool:
    """Whether the fewest tokens, each reading `missed` bytes, take too long after `kept` bytes."""
    return ((WARM_UP + LEAST_TOKENS) * missed + kept) / disk.sequential_bytes_s > MOST_S


def _timed(
    executor: Executor,
    tokens: Sequence[int],
    figures: Callable[[], tuple[int, float]],
    *,
    n_prompt: int = 0,
) -> tuple[float, float]:
    """-> seconds of the layers for a token, and seconds that they wait, one after the other.

    figures   whose second is the seconds that all threads waited so far
    n_prompt  that are computed together before
    """
    with executor.cut([]) as segments:

        def forward(first: int, n: int = 1) -> None:
            segments.run(0, np.array(tokens[first : first + n], np.int32), first)  # without a head

        if n_prompt:
            forward(0, n_prompt)
        for i in range(WARM_UP):
            forward(n_prompt + i)
        first, n_tokens = n_prompt + WARM_UP, 0
        waited_before, begun = figures()[1], time.perf_counter()
        while (took := time.perf_counter() - begun) < ENOUGH_S or n_tokens < LEAST_TOKENS:
            if took > MOST_S and n_tokens:
                break
            forward(first + n_tokens % (len(tokens) - first))
            n_tokens += 1
        waited_s = (figures()[1] - waited_before) / executor.n_threads
    return took / n_tokens, min(took, waited_s) / n_tokens


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
