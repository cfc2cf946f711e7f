"""Puts a loaded model's prompts on a device: calibration, choices, compiled graphs, a trial."""

from __future__ import annotations

import logging
import statistics as stats
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from elute.errors import NOTE, DeviceError, ShapeError, UnsupportedError
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.npu import find, saved
from elute.npu.assemble import HOT_SHARE, assemble, static_linears
from elute.npu.calibrate import WINDOW, SiteStatistics, calibrate
from elute.npu.choices import check_pruned, choose
from elute.npu.device import Device, Progress
from elute.npu.offline import Compiled, compile_for
from elute.npu.ort import PROFILES
from elute.npu.prompts import PromptExecutor
from elute.npu.soc import Soc
from elute.pack.reorder import dequantized
from elute.runtime.calibration import calibration_file, fingerprint
from elute.runtime.executor import CHUNK, Executor
from elute.types import PackedMatrix

log = logging.getLogger(__name__)

DEFAULT_PRUNING = 0.35  # docs/npu.md has the table that says so
_TRIALS = 3
_NO_SITES = "the model has no linear layers outside of experts"


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


def npu_calibration_file(packed: PackedModel) -> Path:
    """Where the calibration is kept."""
    return calibration_file(packed).with_name(saved.FILE)


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
        packed.matrix,
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
    matrices: Callable[[str], PackedMatrix],
    wanted: str,
    tokens: Callable[[], Sequence[int]],
    *,
    pruning: float = DEFAULT_PRUNING,
    chunk: int = CHUNK,
    hot_share: float = HOT_SHARE,
    lacking: str = "",
    folder: Path,
    progress: Progress | None = None,
) -> PromptExecutor | None:
    """The executor whose prompts a device multiplies; None: prompts stay on the CPU, said why.

    wanted    of --npu; see npu.find.choose
    matrices  of the packed model, in memory or mapped
    tokens    of the text that a calibration takes, where there is none yet
    lacking   why the matrices are not all there, so that no device can take them; empty: they are
    folder    where compiled graphs are kept

    Raises DeviceError where a device is required and fails, UnsupportedError for a name that is
    none or for what is lacking where a device is required, ShapeError for a chunk or share out of
    bounds.
    """
    check_pruned(pruning)
    _check_chunk(chunk)
    chosen = find.choose(wanted, folder=folder)
    if chosen.open is None:
        return None
    if lacking and wanted.startswith(find.REQUIRE):
        raise UnsupportedError(f"--npu {wanted}: {lacking}; use --npu off")
    if lacking:
        log.log(NOTE, "--npu %s: %s; prompts run on the CPU", wanted, lacking)
        return None
    if not executor.sites:
        log.log(NOTE, "npu: %s; prompts run on the CPU", _NO_SITES)
        return None
    statistics = measured_for_npu(packed, executor, tokens, progress=progress)
    choices = choose({name: found.effects for name, found in statistics.items()}, pruning)
    device: Device | None = None
    try:
        device = chosen.open()
        linears = assemble(
            executor.sites,
            matrices,
            statistics,
            choices,
            device,
            chunk=chunk,
            identity=fingerprint(packed),
            isa=executor.isa,
            hot_share=hot_share,
            progress=progress,
        )
        prompts = PromptExecutor(executor, linears, device, chunk=chunk)
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
