"""Measures what contextual sparsity needs to know of a model, and keeps it with the model.

Two passes over a text: one counts the scores of all inputs (histograms, no activation is kept), one
makes single inputs sparse and compares the output with the dense one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from elute import _native
from elute.errors import FormatError, ShapeError
from elute.flash.sparsity import BINS, Scores, Threshold, kind, with_sensitivities
from elute.formats import kept
from elute.formats.packed_layout import CONFIG, MANIFEST, MatrixRecord
from elute.model.ops import Linear, OpList
from elute.pack.reorder import dequantized_channels
from elute.types import F32, I32, I64

if TYPE_CHECKING:
    from elute.formats.packed import PackedModel

log = logging.getLogger(__name__)

FILE = "sparsity.safetensors"
VERSION = "1"
BY_CHANNEL = "-channels"  # what folders of the cache that were written anew by channel end in
Progress = Callable[[str, int, int], None]

WINDOW = 512  # tokens of a pass, from an empty cache; or what the context holds
MOST_WINDOWS = 8
MIN_TOKENS = 128
# One input alone is made this sparse: enough to stand out of the noise of rounding.
_PROBE = 0.6
_PROBE_TOKENS = 256
_SCORED = 64  # predictions at their end that are compared
_PROBES_OF_A_KIND = 12
# Dequantized at a time; each takes some 24 bytes for a moment.
_BLOCK_WEIGHTS = 1 << 18


@runtime_checkable
class Executor(Protocol):
    """The part of runtime.executor.Executor that a calibration needs."""

    @property
    def context(self) -> int: ...

    @property
    def inputs(self) -> Sequence[str]: ...

    def sparsify(self, thresholds: Mapping[str, Threshold]) -> None: ...

    def observed(self) -> contextlib.AbstractContextManager[None]: ...

    def histogram(self, name: str) -> I64: ...

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32: ...


def probe_bytes(vocabulary: int) -> int:
    """Of the logits that a calibration compares at a time."""
    return _SCORED * vocabulary * 4


def own_text() -> str:
    """A small text of many kinds, for models whose owner gives none."""
    return resources.files("elute.runtime").joinpath("calibration_text.txt").read_text("utf-8")


def calibrate(
    executor: Executor,
    ops: OpList,
    importances: Mapping[str, F32],
    tokens: Sequence[int],
    *,
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """Scores of every input of a linear op. Leaves the executor dense, its cache empty.

    importances  as `importances` makes them
    tokens       of the text: MIN_TOKENS or more; the first MOST_WINDOWS windows are used

    Raises ShapeError for fewer.
    """
    if executor.context < MIN_TOKENS:
        raise ShapeError(
            f"context: found {executor.context} tokens, wanted {MIN_TOKENS} or more to measure "
            "what --sparsity needs; use more, or run elute calibrate first"
        )
    windows = _windows(tokens, executor.context)
    inputs = _inputs(ops)
    try:
        executor.sparsify({name: Threshold(importances[name], 0.0) for name in inputs})
        with executor.observed():
            for i, window in enumerate(windows):
                _tell(progress, "calibrate: scores", i, len(windows))
                executor.forward(window, 0)
            histograms = {name: executor.histogram(name) for name in inputs}
        scores = {
            name: Scores(importances[name], histograms[name], outputs)
            for name, outputs in inputs.items()
        }
        errors = _probe(executor, scores, windows[0][:_PROBE_TOKENS], progress)
    finally:
        executor.sparsify({})
    return with_sensitivities(scores, errors)


def importances(
    packed: PackedModel,
    ops: OpList,
    *,
    weighted: bool = False,
    progress: Progress | None = None,
) -> dict[str, F32]:
    """Of the channels of each input of a linear op, by its first weight: 1, or with `weighted` the
    norms of the columns of its weights, which are then read once.
    """
    found: dict[str, F32] = {}
    linears = [op for op in ops.ops if isinstance(op, Linear)]
    for i, op in enumerate(linears):
        if not weighted:
            found[op.weights[0]] = np.ones(ops.registers[op.input], np.float32)
            continue
        _tell(progress, "calibrate: weights", i, len(linears))
        squares = sum(_column_squares(packed, name) for name in op.weights)
        found[op.weights[0]] = np.sqrt(squares).astype(np.float32)
    return found


def _column_squares(packed: PackedModel, name: str) -> npt.NDArray[np.float64]:
    in_bank = packed.in_bank(name)
    if in_bank is not None:
        n, k = in_bank.shape
        # Of several channels, so that numpy adds up each column in order, whatever the block.
        step = max(64, _BLOCK_WEIGHTS // n // 64 * 64)
        found = np.empty(k)
        for begin in range(0, k, step):
            end = min(k, begin + step)
            weights = dequantized_channels(packed, name, begin, end).astype(np.float64)
            found[begin:end] = np.square(weights, out=weights).sum(axis=0)
        return found
    matrix = packed.matrix(name)
    stored = _native.column_squares(
        _native.best_isa(),
        matrix.planes,
        matrix.scales,
        matrix.offsets,
        *matrix.shape,
        matrix.bits,
        matrix.group_size,
        matrix.zero,
        str(matrix.affine),
    )
    if matrix.columns is None:
        return stored
    squares = np.empty_like(stored)
    squares[matrix.columns] = stored
    return squares


def _inputs(ops: OpList) -> dict[str, int]:
    """Inputs, and the outputs of all weights that read them."""
    return {
        op.weights[0]: sum(ops.registers[output] for output in op.outputs)
        for op in ops.ops
        if isinstance(op, Linear)
    }


def _windows(tokens: Sequence[int], context: int) -> list[I32]:
    if len(tokens) < MIN_TOKENS:
        raise ShapeError(
            f"text: found {len(tokens)} tokens, wanted {MIN_TOKENS} or more; use a longer text"
        )
    size = min(WINDOW, context, len(tokens))
    starts = range(0, len(tokens) - size + 1, size)[:MOST_WINDOWS]
    return [np.asarray(tokens[start : start + size], np.int32) for start in starts]


def _probe(
    executor: Executor, scores: Mapping[str, Scores], tokens: I32, progress: Progress | None
) -> dict[str, tuple[float, float]]:
    """(threshold, divergence from the dense output in nats a token) of inputs sparse alone."""
    scored = min(_SCORED, tokens.size // 2)

    def output() -> F32:
        executor.forward(tokens[:-scored], 0)
        logits = executor.forward(tokens[-scored:], tokens.size - scored, all_logits=True)
        for row in logits:  # by row: beside these logits there may be little memory
            row -= row.max()
            row -= np.log(np.exp(row).sum())
        return logits

    executor.sparsify({})
    dense = output()
    probed = list(_chosen(scores))
    errors = {}
    for i, name in enumerate(probed):
        _tell(progress, "calibrate: errors", i, len(probed))
        entry = scores[name]
        threshold = entry.threshold(_PROBE)
        executor.sparsify({name: Threshold(entry.importance, threshold)})
        sparse = output()
        rows = zip(dense, sparse, strict=True)
        divergence = sum(float((np.exp(p) * (p - q)).sum()) for p, q in rows) / scored
        errors[name] = (threshold, divergence if math.isfinite(divergence) else 0.0)
    return errors


def _chosen(scores: Mapping[str, Scores]) -> Iterator[str]:
    """Of each kind, inputs spread evenly over the layers, the first and the last among them."""
    kinds: dict[str, list[str]] = {}
    for name in scores:
        kinds.setdefault(kind(name), []).append(name)
    for members in kinds.values():
        count = min(_PROBES_OF_A_KIND, len(members))
        for i in sorted({round(at) for at in np.linspace(0, len(members) - 1, count)}):
            yield members[i]


def _tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)


def save(packed: PackedModel, scores: Mapping[str, Scores]) -> None:
    """Beside the model's files, whole or not at all. A folder that cannot be written: a warning."""
    from safetensors.numpy import save as to_bytes

    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, entry in scores.items():
        arrays[name + ".importance"] = entry.importance
        arrays[name + ".histogram"] = entry.histogram
        arrays[name + ".outputs_and_sensitivity"] = np.array([entry.outputs, entry.sensitivity])
    content = to_bytes(arrays, {"version": VERSION, "model": fingerprint(packed)})
    target = calibration_file(packed)
    try:
        kept.replace(target, content)
    except OSError as error:
        log.warning(
            "%s: cannot be written (%s); the calibration is done again at the next start",
            target,
            error.strerror,
        )


def saved(packed: PackedModel, ops: OpList) -> dict[str, Scores] | None:
    """None where there is none for this model. Raises FormatError for a broken file."""
    from safetensors import SafetensorError, safe_open

    path = calibration_file(packed)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("version") != VERSION or metadata.get("model") != fingerprint(packed):
                log.warning("%s: was made for another model or version; made anew", path)
                return None
            found = {name: _entry(file, name) for name in _names(file.keys())}
            widths = {
                op.weights[0]: ops.registers[op.input] for op in ops.ops if isinstance(op, Linear)
            }
            if {name: entry.importance.size for name, entry in found.items()} != widths:
                raise ValueError("it is of other inputs")
            return {name: found[name] for name in widths}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FormatError(
            f"{path}: found a file that cannot be read ({error}), wanted a calibration; remove it, "
            "and it is made again"
        ) from None


def _names(keys: Sequence[str]) -> list[str]:
    return [key.removesuffix(".importance") for key in keys if key.endswith(".importance")]


def _entry(file: object, name: str) -> Scores:
    importance = file.get_tensor(name + ".importance")  # type: ignore[attr-defined]
    histogram = file.get_tensor(name + ".histogram")  # type: ignore[attr-defined]
    outputs, sensitivity = file.get_tensor(  # type: ignore[attr-defined]
        name + ".outputs_and_sensitivity"
    ).tolist()
    if (
        importance.ndim != 1
        or importance.dtype != np.float32
        or histogram.shape != (BINS,)
        or histogram.dtype != np.int64
        or not (np.isfinite(importance).all() and importance.min() >= 0)
        or histogram.min() < 0
        or not (outputs >= 1 and sensitivity > 0 and math.isfinite(sensitivity))
    ):
        raise ValueError(f"{name} has other shapes, types or values")
    return Scores(importance, histogram, int(outputs), sensitivity)


def fingerprint(packed: PackedModel) -> str:
    """Of what is computed, not of how it is stored: both orders of a model share a calibration."""
    matrices = {
        name: [*record.shape, record.bits, record.group_size, str(record.affine), record.zero]
        for name, record in packed.records.items()
        if isinstance(record, MatrixRecord)
    }
    told = [packed.source, packed.recipe, packed.files[CONFIG].sha256, matrices]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def calibration_file(packed: PackedModel) -> Path:
    """Where `save` keeps it: of a folder that was written anew by channel into the cache, beside
    the weights that it was made from, so that there is one of both.
    """
    origin = packed.path.with_name(packed.path.name.removesuffix(BY_CHANNEL))
    return (origin if (origin / MANIFEST).is_file() else packed.path) / FILE
