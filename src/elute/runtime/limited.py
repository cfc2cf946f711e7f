"""Weights within a budget of memory, read as the plan and the measured disk say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from elute import _native
from elute.errors import NOTE, BudgetError
from elute.flash.disk import measured
from elute.flash.weights import FlashWeights
from elute.formats.packed import PackedModel
from elute.formats.packed_layout import MatrixRecord
from elute.formats.page_sums import PageSums
from elute.kernels import registry
from elute.kernels.registry import Choice
from elute.model.ops import OpList
from elute.runtime import executor
from elute.runtime.memory import Fit, channels_read_less, fit, parse_size
from elute.runtime.store import can_reorder
from elute.runtime.threads import default_threads

if TYPE_CHECKING:
    from elute.runtime.npu_memory import NpuNeeds

log = logging.getLogger(__name__)


def limited_weights(
    packed: PackedModel,
    ops: OpList,
    memory: str | int,
    context: int | None,
    cache_type: str,
    threads: int | None,
    isa: str | None,
    kernel: str,
    folder: Path | None,
    score_bytes: int | None,
    sums: PageSums | None,
    sparsity: float,
    npu: NpuNeeds | None = None,
) -> tuple[FlashWeights, int, Mapping[int, Choice]]:
    """-> weights, context and kernels. Arguments are those of `api.load`, of whose errors it raises
    BudgetError and DeviceError. Says what was chosen.

    npu  what prompts through a device take; it keeps its weights where all else is in memory too,
         and then plan.fixed["npu"] is npu.kept
    """
    budget = parse_size(memory)
    # Raced before the weights are there: it takes memory of its own for a moment.
    widths = {r.bits for r in packed.records.values() if isinstance(r, MatrixRecord)}
    kernels = registry.choose(executor.chosen_isa(isa), widths, kernel, folder=folder)
    _native.return_freed_memory()
    process = psutil.Process().memory_info().rss

    def planned(npu_bytes: int, *, by_channel: bool = bool(packed.banks)) -> Fit:
        return fit(
            packed,
            ops,
            budget,
            process=process,
            context=context,
            cache_type=cache_type,
            chunk=executor.CHUNK,
            n_threads=default_threads() if threads is None else threads,
            logits=score_bytes or 0,
            by_channel=by_channel,
            sparsity=sparsity,
            npu=npu_bytes,
        )

    found = planned(0) if npu is None else _with_device(planned, npu)
    plan = found.plan
    if plan.places and sparsity and can_reorder(packed):
        npu_bytes = plan.fixed.get("npu", 0)
        less = channels_read_less(partial(planned, npu_bytes))
        log.log(
            NOTE,
            "%s: is in panel order, so weights that do not count are read all the same; %s",
            packed.path,
            "elute convert --order channels makes a folder that is read by channel"
            if less
            else "by channel its short rows would be read in more bytes still",
        )
    if plan.staging:
        log.info(
            "memory: %.0f MB hold %.0f %% of the layers; of the others, what a token needs is read",
            budget / 1e6,
            100 * plan.slot_bytes / sum(bank.total for bank in plan.banks),
        )
    if plan.places:
        log.info(
            "memory: %.0f MB hold %.0f %% of the layers; %.0f MB a token come from flash through "
            "a window of %.0f MB",
            budget / 1e6,
            100 * plan.pinned_bytes / (plan.pinned_bytes + plan.missed),
            plan.missed / 1e6,
            plan.window / 1e6,
        )
    if plan.staging:
        disk = measured(packed.largest_shard, folder=folder)
        weights = FlashWeights(
            packed,
            ops,
            plan,
            request_bytes=disk.request_bytes,
            gap_bytes=disk.gap_bytes,
            sums=sums,
        )
        return weights, found.context, kernels
    if not plan.places:  # read once: not worth a measurement
        return FlashWeights(packed, ops, plan, sums=sums), found.context, kernels
    disk = measured(packed.largest_shard, folder=folder)
    weights = FlashWeights(
        packed,
        ops,
        plan,
        depth=disk.depth_of(plan.missed // len(plan.places)),
        request_bytes=disk.request_bytes,
        gap_bytes=disk.gap_bytes,
        sums=sums,
    )
    return weights, found.context, kernels


def _with_device(planned: Callable[[int], Fit], npu: NpuNeeds) -> Fit:
    if npu.kept != npu.lean:
        with suppress(BudgetError):  # then the least budget is that of the other
            found = planned(npu.kept)
            if not found.plan.places and not found.plan.staging:
                return found
    return planned(npu.lean)


def wants_channels(
    packed: PackedModel,
    ops: OpList,
    memory: str | int,
    context: int | None,
    cache_type: str,
    threads: int | None,
    sparsity: float,
    *,
    process: int | None = None,
) -> bool:
    """Whether a model in panel order should be put in channel order for a run with `sparsity`.

    process  bytes that it holds before the weights; those of now when None
    """
    held = psutil.Process().memory_info().rss if process is None else process
    fitted = partial(
        fit,
        packed,
        ops,
        parse_size(memory),
        process=held,
        context=context,
        cache_type=cache_type,
        chunk=executor.CHUNK,
        n_threads=default_threads() if threads is None else threads,
        sparsity=sparsity,
    )
    return can_reorder(packed) and channels_read_less(fitted)
