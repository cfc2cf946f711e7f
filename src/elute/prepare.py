"""What is done with a model before it answers, once: calibrating it, compiling it for a chip."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from elute.api import load

if TYPE_CHECKING:
    from elute.flash.sparsity import Scores
    from elute.formats.packed import PackedModel
    from elute.npu.calibrate import SiteStatistics
    from elute.npu.offline import Compiled
    from elute.quantize.recipe import Recipe
    from elute.runtime.executor import Executor as NativeExecutor

__all__ = ["calibrate", "calibrate_npu", "compile_npu"]


def calibrate(
    model: str | Path = "default",
    *,
    text: str | None = None,
    weighted: bool = False,
    bits: int | None = None,
    recipe: Recipe | str | Path | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    memory: str | int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Path, dict[str, Scores]]:
    """Measures a model for `load`'s sparsity, on a text or a small one of elute's own, and keeps
    the result with it in place of an earlier one. -> where, and what was measured. weighted: a
    channel matters by its value times the norm of its weights, instead of by its value alone.

    Other arguments and errors as in `load`; ShapeError for a text that is too short.
    """
    from elute.model.families import op_list
    from elute.runtime import calibration
    from elute.runtime.store import open_packed

    folder = None if cache_dir is None else Path(cache_dir)
    packed = open_packed(str(model), bits=bits, recipe=recipe, cache_dir=folder, progress=progress)
    ops = op_list(packed.config)
    # Before the weights are there: norms take memory of their own for a moment.
    found = calibration.importances(packed, ops, weighted=weighted, progress=progress)
    context = min(ops.context, calibration.WINDOW)
    with load(
        packed.path,
        context=context,
        threads=threads,
        cache_dir=cache_dir,
        memory=memory,
        score_bytes=None if memory is None else calibration.probe_bytes(ops.vocabulary),
        progress=progress,
    ) as loaded:
        tokens, _ = loaded.text_tokens(calibration.own_text() if text is None else text)
        executor = loaded.executor
        assert isinstance(executor, calibration.Executor)
        scores = calibration.calibrate(executor, ops, found, tokens, progress=progress)
    calibration.save(packed, scores)
    return calibration.calibration_file(packed), scores


def calibrate_npu(
    model: str | Path = "default",
    *,
    text: str | None = None,
    bits: int | None = None,
    recipe: Recipe | str | Path | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Path, dict[str, SiteStatistics]]:
    """Measures a model for `load`'s npu, on a text or a small one of elute's own, and keeps the
    result with it in place of an earlier one. -> where, and what was measured by site.

    Other arguments and errors as in `load`; ShapeError for a text that is too short.
    """
    from elute.runtime import npu

    with _for_npu(
        model, text, bits, recipe, threads=threads, cache_dir=cache_dir, progress=progress
    ) as (packed, executor, tokens):
        found = npu.measured_for_npu(packed, executor, tokens, again=True, progress=progress)
        return npu.npu_calibration_file(packed), found


def compile_npu(
    model: str | Path = "default",
    *,
    soc: str,
    npu_pruning: float | None = None,
    npu_chunk: int | None = None,
    out: str | Path | None = None,
    bits: int | None = None,
    recipe: Recipe | str | Path | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Path, Path, Compiled]:
    """Compiles a model's graphs for a chip that this machine need not have.

    soc  a name of npu.soc.SOCS
    out  where they go, a folder a chip; the cache's own when None, where `load` with
         npu="qnn:SOC" looks

    -> the packed folder, the calibration in it, what was compiled. Other arguments as in `load`;
    UnsupportedError for another chip, DeviceError without onnxruntime-qnn.
    """
    from elute.formats.sources import cache_dir as default_cache
    from elute.npu.ort import qnn_device
    from elute.npu.soc import soc_named
    from elute.runtime import npu
    from elute.runtime.executor import CHUNK

    chip = soc_named(soc)
    qnn_device()  # before the model is fetched and measured
    folder = (Path(cache_dir) if cache_dir else default_cache()) / "npu"
    with _for_npu(
        model, None, bits, recipe, threads=threads, cache_dir=cache_dir, progress=progress
    ) as (packed, executor, tokens):
        compiled = npu.compiled_for(
            executor,
            packed,
            chip,
            tokens,
            pruning=npu.DEFAULT_PRUNING if npu_pruning is None else npu_pruning,
            chunk=CHUNK if npu_chunk is None else npu_chunk,
            folder=folder if out is None else Path(out),
            progress=progress,
        )
        return packed.path, npu.npu_calibration_file(packed), compiled


@contextmanager
def _for_npu(
    model: str | Path,
    text: str | None,
    bits: int | None,
    recipe: Recipe | str | Path | None,
    *,
    threads: int | None,
    cache_dir: str | Path | None,
    progress: Callable[[str, int, int], None] | None,
) -> Generator[tuple[PackedModel, NativeExecutor, Callable[[], list[int]]]]:
    """A packed model, its executor for one window, and the tokens of the text."""
    from elute.model.families import op_list
    from elute.npu.calibrate import WINDOW
    from elute.runtime import calibration
    from elute.runtime.executor import Executor as NativeExecutor
    from elute.runtime.store import open_packed

    folder = None if cache_dir is None else Path(cache_dir)
    packed = open_packed(str(model), bits=bits, recipe=recipe, cache_dir=folder, progress=progress)
    with load(
        packed.path,
        context=min(op_list(packed.config).context, WINDOW),
        threads=threads,
        cache_dir=cache_dir,
        progress=progress,
    ) as loaded:
        executor = loaded.executor
        assert isinstance(executor, NativeExecutor)

        def tokens() -> list[int]:
            return loaded.text_tokens(calibration.own_text() if text is None else text)[0]

        yield packed, executor, tokens
