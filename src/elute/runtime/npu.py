"""Puts a loaded model's prompts on a device: calibration, choices, compiled graphs, a trial."""

from __future__ import annotations

import logging
import statistics as stats
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from elute import _native
from elute.errors import NOTE, DeviceError, ShapeError, UnsupportedError
from elute.flash.fetch import Fetcher
from elute.flash.weights import FlashWeights
from elute.formats.packed import PackedModel
from elute.formats.sources import cache_dir
from elute.model.families import op_list
from elute.model.ops import Experts, Linear, OpList
from elute.npu import find, saved
from elute.npu.assemble import static_linears
from elute.npu.calibrate import WINDOW, SiteStatistics, calibrate
from elute.npu.choices import check_pruned, choose
from elute.npu.device import Device, Progress
from elute.npu.offline import Compiled, compile_for
from elute.npu.ort import PROFILES
from elute.npu.prompts import IN_FLIGHT, PromptExecutor
from elute.npu.soc import Soc
from elute.pack.reorder import dequantized
from elute.runtime import npu_memory
from elute.runtime.calibration import calibration_file, fingerprint
from elute.runtime.executor import CHUNK, Executor
from elute.runtime.flash_codes import codes_of, least_half
from elute.runtime.npu_memory import NpuNeeds
from elute.types import WeightSource

log = logging.getLogger(__name__)

DEFAULT_PRUNING = 0.35  # docs/npu.md has the table that says so
_TRIALS = 3
_NO_SITES = "the model has no linear layers outside of experts"


def npu_calibration_file(packed: PackedModel) -> Path:
    """Where the calibration is kept."""
    return calibration_file(packed).with_name(saved.FILE)


def chosen_for_budget(
    wanted: str,
    packed: PackedModel,
    ops: OpList,
    *,
    chunk: int = CHUNK,
    hot: float | str | None = None,
    folder: Path,
) -> tuple[find.Choice, NpuNeeds | None]:
    """What with_npu will use, and what of a budget it takes, which is to be known before the
    weights are there; None where prompts stay on the CPU, said why.

    Under a budget nothing is calibrated: that wants whole layers as floats. Raises as with_npu.
    """
    _check_chunk(chunk)
    records = packed.records
    int8 = npu_memory.int8_bytes(ops, records)
    hot_bytes = npu_memory.hot_bytes(hot, int8)
    chosen = find.choose(wanted, folder=folder)
    if chosen.open is None or chosen.found is None or not int8:
        return chosen, None
    if not npu_calibration_file(packed).is_file():
        why = _uncalibrated(packed)
        if wanted.startswith(find.REQUIRE):
            raise DeviceError(f"--npu {wanted}: {why}")
        log.log(NOTE, "npu: %s; prompts run on the CPU", why)
        return find.Choice(None, chosen.found, why), None
    return chosen, npu_memory.npu_needs(
        ops,
        records,
        device=chosen.found.name,
        emulated=chosen.found.emulated,
        chunk=chunk,
        hot=hot_bytes,
        half_bytes=least_half(packed, _widest(ops)),
    )


class OnNpu:
    """What was asked of a device for prompts, in the two steps in which a budget wants it."""

    def __init__(
        self,
        packed: PackedModel,
        ops: OpList,
        wanted: str,
        *,
        pruning: float | None,
        chunk: int | None,
        hot: float | str | None,
        folder: Path | None,
    ) -> None:
        self._packed, self._ops, self._wanted, self._pruning = packed, ops, wanted, pruning
        self._chunk = CHUNK if chunk is None else chunk
        self._hot = hot
        self._folder = (folder or cache_dir()) / "npu"
        self._chosen: find.Choice | None = None
        self.needs: NpuNeeds | None = None

    def choose_for_budget(self) -> None:
        """Before the weights are there."""
        self._chosen, self.needs = chosen_for_budget(
            self._wanted,
            self._packed,
            self._ops,
            chunk=self._chunk,
            hot=self._hot,
            folder=self._folder,
        )

    def executor(
        self,
        executor: Executor,
        weights: WeightSource,
        tokens: Callable[[], Sequence[int]],
        progress: Progress | None,
    ) -> PromptExecutor | None:
        return with_npu(
            executor,
            self._packed,
            weights,
            self._wanted,
            tokens,
            ops=self._ops,
            chosen=self._chosen,
            needs=self.needs,
            pruning=DEFAULT_PRUNING if self._pruning is None else self._pruning,
            chunk=self._chunk,
            hot=self._hot,
            folder=self._folder,
            progress=progress,
        )


def measured_for_npu(
    packed: PackedModel,
    executor: Executor,
    tokens: Callable[[], Sequence[int]],
    *,
    again: bool = False,
    progress: Progress | None = None,
) -> dict[str, SiteStatistics]:
    """The calibration that is kept with the model; made where there is none, or again, and kept
    unless the context is too short for it."""
    path = npu_calibration_file(packed)
    model = fingerprint(packed)
    found = None if again else saved.load(path, executor.sites, model=model)
    if found is None:
        if not again:
            log.log(NOTE, "npu: measuring the model on a text of elute's own, once")
        found = calibrate(
            executor, lambda name: dequantized(packed, name), tokens(), progress=progress
        )
        if executor.context >= min(op_list(packed.config).context, WINDOW):
            saved.save(path, found, model=model)
        else:  # of less than others would measure: theirs should not hang on this
            log.log(NOTE, "npu: not kept, since a context of %d is short", executor.context)
    return found


def compiled_for(
    executor: Executor,
    packed: PackedModel,
    soc: Soc,
    tokens: Callable[[], Sequence[int]],
    *,
    pruning: float = DEFAULT_PRUNING,
    chunk: int = CHUNK,
    folder: Path,
    progress: Progress | None = None,
) -> Compiled:
    """The graphs that with_npu of the same pruning and chunk would ask a chip's device for.

    Raises UnsupportedError for a model without products, DeviceError without the compiler or where
    the calibration cannot be kept.
    """
    _check_chunk(chunk)
    if not executor.sites:
        raise UnsupportedError(f"{packed.path}: {_NO_SITES}; there is nothing to compile")
    statistics = measured_for_npu(packed, executor, tokens, progress=progress)
    if not npu_calibration_file(packed).is_file():
        raise DeviceError(
            f"{packed.path}: cannot keep the calibration, wanted it beside the weights, since "
            "graphs are found by its scales; make the folder writable"
        )
    linears = static_linears(
        executor.sites,
        codes_of(packed, packed, None, isa=executor.isa),
        statistics,
        choose({name: found.effects for name, found in statistics.items()}, pruning),
        PROFILES["qnn"],
        chunk=chunk,
        identity=fingerprint(packed),
        isa=executor.isa,
        hot_share=0.0,
    )
    told = {"weights": fingerprint(packed), "chunk": chunk, "pruning": pruning}
    graphs = [linear.graph for linear in linears]
    return compile_for(graphs, soc, folder, told=told, progress=progress)


def _check_chunk(chunk: int) -> None:
    if not 1 <= chunk <= CHUNK:
        raise ShapeError(f"--npu-chunk: found {chunk}, wanted 1 to {CHUNK} tokens")


def with_npu(
    executor: Executor,
    packed: PackedModel,
    weights: WeightSource,
    wanted: str,
    tokens: Callable[[], Sequence[int]],
    *,
    ops: OpList,
    chosen: find.Choice | None = None,
    needs: NpuNeeds | None = None,
    pruning: float = DEFAULT_PRUNING,
    chunk: int = CHUNK,
    hot: float | str | None = None,
    folder: Path,
    progress: Progress | None = None,
) -> PromptExecutor | None:
    """The executor whose prompts a device multiplies; None: prompts stay on the CPU, said why.

    weights   the executor's own: the packed model, or what is in memory of it
    wanted    of --npu; see npu.find.choose
    tokens    of the text that a calibration takes, where there is none yet
    chosen, needs  of chosen_for_budget, where memory is limited
    hot       of the weight rows of outliers, what stays in memory: see npu_memory.hot_bytes
    folder    where compiled graphs are kept

    Raises DeviceError where a device is required and fails, or weights cannot be read,
    UnsupportedError for a name that is none, ShapeError for a chunk or share out of bounds.
    """
    check_pruned(pruning)
    _check_chunk(chunk)
    int8 = npu_memory.int8_bytes(ops, packed.records)
    hot_bytes = npu_memory.hot_bytes(hot, int8)
    if chosen is None:
        chosen = find.choose(wanted, folder=folder)
    if chosen.open is None:
        return None
    if not executor.sites:
        log.log(NOTE, "npu: %s; prompts run on the CPU", _NO_SITES)
        return None
    limited = weights if isinstance(weights, FlashWeights) else None
    device: Device | None = None
    try:
        statistics = _statistics(packed, executor, tokens, limited is not None, progress)
        choices = choose({name: found.effects for name, found in statistics.items()}, pruning)
        lean = limited is not None and limited.plan.fixed.get("npu") != (needs and needs.kept)
        device = chosen.open(lean=lean)
        linears = static_linears(
            executor.sites,
            codes_of(weights, packed, _fetcher(limited, ops), isa=executor.isa),
            statistics,
            choices,
            device.profile,
            chunk=chunk,
            identity=fingerprint(packed),
            isa=executor.isa,
            hot_share=hot_bytes / int8,
        )
        device.load([linear.graph for linear in linears], progress=progress)
        del statistics
        _native.return_freed_memory()  # megabytes of histograms
        in_flight = IN_FLIGHT if limited is None else npu_memory.IN_FLIGHT
        if limited is not None and not limited.all_in_memory and _has_experts(ops):
            in_flight = 1  # experts are read once for each chunk that meets them
        prompts = PromptExecutor(executor, linears, device, chunk=chunk, in_flight=in_flight)
        if wanted != "auto" or _is_faster(prompts, executor):
            return prompts
        device.close()
        return None
    except (DeviceError, UnsupportedError) as error:
        if device is not None:
            device.close()
        if wanted.startswith(find.REQUIRE):
            raise
        log.log(NOTE, "npu: %s; prompts run on the CPU", error)
        return None


def _statistics(
    packed: PackedModel,
    executor: Executor,
    tokens: Callable[[], Sequence[int]],
    limited: bool,
    progress: Progress | None,
) -> dict[str, SiteStatistics]:
    """Under a budget, what is kept with the model alone. Raises DeviceError where there is none."""
    if not limited:
        return measured_for_npu(packed, executor, tokens, progress=progress)
    file = npu_calibration_file(packed)
    found = saved.load(file, executor.sites, model=fingerprint(packed))
    if found is None:
        raise DeviceError(_uncalibrated(packed))
    return found


def _uncalibrated(packed: PackedModel) -> str:
    return (
        f"{packed.path}: found no calibration for an NPU, and --memory leaves no room to make one; "
        "run once without --memory"
    )


def _fetcher(limited: FlashWeights | None, ops: OpList) -> Fetcher | None:
    """For weights that are not in memory."""
    if limited is None or limited.all_in_memory:
        return None
    reader, direct, sums, gap_bytes = limited.reading
    return Fetcher(
        limited.packed,
        reader=reader,
        gap_bytes=gap_bytes,
        direct=direct,
        half_bytes=least_half(limited.packed, _widest(ops)),
        sums=sums,
    )


def _widest(ops: OpList) -> int:
    return max(ops.registers[op.input] for op in ops.ops if isinstance(op, Linear))


def _has_experts(ops: OpList) -> bool:
    return any(isinstance(op, Experts) for op in ops.ops)


def _is_faster(prompts: PromptExecutor, executor: Executor) -> bool:
    """Whether a chunk takes less by the device, both warm; says so where it does not."""
    n = min(prompts.chunk, executor.context)
    tokens = np.arange(n, dtype=np.int32) % executor.vocabulary
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for trial in range(_TRIALS + 1):
        for by_device, forward in ((False, executor.forward), (True, prompts.prompt)):
            began = time.perf_counter()
            forward(tokens, 0)
            if trial:
                seconds[by_device].append(time.perf_counter() - began)
    cpu, npu = (stats.median(seconds[by_device]) for by_device in (False, True))
    if npu < cpu:
        log.info("npu: %d tokens take %.0f ms, on the CPU %.0f", n, npu * 1e3, cpu * 1e3)
        return True
    log.log(
        NOTE,
        "npu: %d tokens take %.0f ms by the NPU and %.0f by the CPU; prompts run on the CPU",
        n,
        npu * 1e3,
        cpu * 1e3,
    )
    return False
