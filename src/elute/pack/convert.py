"""Any checkpoint into a packed directory, tensor by tensor. Knows no kernel and no architecture."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import FormatError, UnsupportedError
from elute.formats.packed import PackedModel, PackedWriter
from elute.formats.packed_writer import MAX_SHARD_BYTES
from elute.pack.quads import check_groups, pack
from elute.quantize import rtn, ternary
from elute.quantize.recipe import HEAD, Recipe, Rule, Scheme
from elute.types import F32, PANEL, Checkpoint, PackedMatrix, QuantizedMatrix

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
_CHUNK_WEIGHTS = (
    1 << 22
)  # 4 MB of codes, 16 MB of f32: large against the cost of a call, else small


def convert(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    *,
    tensors: Sequence[str] | None = None,
    floats: Collection[str] = (),
    runs: Sequence[Sequence[str]] = (),
    progress: Progress | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> PackedModel:
    """Quantizes what is not yet codes, packs everything into the directory `out` and opens it.

    tensors   the names wanted, in the order in which they are to lie; by default all of the
              checkpoint's matrices and vectors, without the head when it is tied to the embedding
    floats    matrices among them that stay f32, whatever the recipe says
    runs      of names that follow one another in `tensors`: each goes into one file
    progress  called with (weights done, weights in all, tensor just written)
    force     replaces a packed model that `out` holds already

    Memory: one tensor as the checkpoint reads it, its scales, and chunks of a few rows.
    `out` appears when it is complete, or not at all.

    Raises FormatError for missing tensors and weights that are not finite, UnsupportedError for
    tensors of other ranks, ShapeError for matrices that no group packs, BudgetError when the disk
    is full, EluteError when `out` may not be written.
    """
    names = _wanted(checkpoint, tensors)
    shapes = {name: checkpoint.shape(name) for name in names}
    check_ranks(checkpoint.source, shapes)
    done, total = 0, sum(int(np.prod(shape)) for shape in shapes.values())
    report = _Report()
    with PackedWriter(
        out,
        names=names,
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer_files(),
        source=checkpoint.source,
        recipe=recipe.to_json(),
        overwrite=force,
        runs=runs,
        max_shard_bytes=max_shard_bytes,
    ) as writer:
        for name, shape in shapes.items():
            if len(shape) == 2 and name not in floats:
                pieces = _packed_pieces(checkpoint.read(name), name, recipe, report)
                writer.add_matrix(name, (shape[0], shape[1]), pieces)
            else:
                values = checkpoint.read(name)
                if isinstance(values, QuantizedMatrix) and name in floats:
                    values = values.dequantize()
                writer.add_vector(name, _vector(values, name))
            done += int(np.prod(shape))
            if progress is not None:
                progress(done, total, name)
    report.write(checkpoint.source)
    return PackedModel.open(out)


def check_ranks(source: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UnsupportedError for what is neither a matrix nor a vector."""
    for name, shape in shapes.items():
        if len(shape) not in (1, 2) or 0 in shape:
            raise UnsupportedError(
                f"{source}: {name} has shape {list(shape)}, wanted a matrix or a "
                f"vector; this model cannot be packed"
            )


class _Report:
    """What happened to the matrices, gathered so that each kind of event is one line."""

    def __init__(self) -> None:
        self.kept: Counter[int] = Counter()  # by bits
        self.requantized = 0
        self.regrouped: Counter[tuple[int, int | None, int]] = Counter()  # by K, wanted, used

    def write(self, source: str) -> None:
        if self.kept:
            widths = ", ".join(f"{n} at {bits} bits" for bits, n in sorted(self.kept.items()))
            log.info(
                "%s: kept the codes of %d quantized matrices (%s); the recipe is not applied to "
                "them unless it says requantize",
                source,
                self.kept.total(),
                widths,
            )
        if self.requantized:
            log.warning("%s: quantized %d quantized matrices again", source, self.requantized)
        for (k, wanted, used), n in self.regrouped.items():
            log.warning(
                "%s: %d matrices with K=%d take group_size=%d, because %s does not fit",
                source,
                n,
                k,
                used,
                wanted,
            )


def _wanted(checkpoint: Checkpoint, tensors: Sequence[str] | None) -> list[str]:
    available = dict.fromkeys(checkpoint.names())
    if tensors is None:
        names = [name for name in available if len(checkpoint.shape(name)) in (1, 2)]
        if checkpoint.config.get("tie_word_embeddings") and HEAD in names:
            names.remove(HEAD)
    else:
        names = list(dict.fromkeys(tensors))
    missing = [name for name in names if name not in available]
    if missing:
        raise FormatError(
            f"{checkpoint.source}: found no {_listing(missing)}; wanted by the model that "
            f"config.json describes, so complete the checkpoint or correct config.json"
        )
    unused = [name for name in available if name not in set(names)]
    if unused:
        log.info(
            "%s: leaves out %s, which the model does not use", checkpoint.source, _listing(unused)
        )
    return names


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _vector(values: npt.NDArray[Any] | QuantizedMatrix, name: str) -> F32:
    if isinstance(values, QuantizedMatrix):
        raise UnsupportedError(f"{name}: is a quantized vector, wanted floats; keep it in float")
    wide = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(wide).all():
        at = np.argwhere(~np.isfinite(wide))[0].tolist()
        raise FormatError(
            f"{name}: weight {at} is {wide[tuple(at)]}, wanted a finite number; repair or "
            f"re-download the checkpoint"
        )
    return wide


def packing_rule(
    name: str, n_columns: int, recipe: Recipe, *, stored_group: int | None
) -> Rule | None:
    """The rule that a matrix is quantized by, its group fitted to the row; None: codes are kept.

    stored_group  group_size of the codes that the checkpoint holds, None where it holds floats

    Raises ShapeError when no group packs the row, UnsupportedError when the recipe keeps floats.
    """
    rule = recipe.rule_for(name)
    if stored_group is not None and (rule.scheme is Scheme.KEEP or not recipe.requantize):
        check_groups(n_columns, stored_group, where=name)
        return None
    if rule.scheme is Scheme.KEEP:
        raise UnsupportedError(
            f"{name}: the recipe keeps it, but the checkpoint holds floats; give it bits=8"
        )
    return rule.for_columns(n_columns, where=name)


def _packed_pieces(
    w: npt.NDArray[Any] | QuantizedMatrix, name: str, recipe: Recipe, report: _Report
) -> Iterator[PackedMatrix]:
    """Runs of whole panels of w, quantized by the recipe where they are not codes already."""
    n, k = w.shape
    stored_group = w.group_size if isinstance(w, QuantizedMatrix) else None
    fitted = packing_rule(name, k, recipe, stored_group=stored_group)
    keep = fitted is None
    rule = recipe.rule_for(name) if fitted is None else fitted
    if isinstance(w, QuantizedMatrix) and keep:
        report.kept[w.bits] += 1
    else:
        wanted = recipe.rule_for(name).group_size
        if wanted is not None and rule.group_size != wanted:
            report.regrouped[k, wanted, rule.group_size or k] += 1
        report.requantized += stored_group is not None
    step = max(1, _CHUNK_WEIGHTS // (PANEL * k)) * PANEL
    for first in range(0, n, step):
        rows = slice(first, first + step)
        if isinstance(w, QuantizedMatrix):
            part = _rows(w, rows)
            if not keep:
                part = _quantize(part.dequantize(), rule, name, first)
        else:
            part = _quantize(w[rows], rule, name, first)
        yield pack(part, where=name)


def _quantize(w: npt.NDArray[Any], rule: Rule, name: str, first_row: int) -> QuantizedMatrix:
    group_size = rule.group_size or w.shape[1]
    if rule.scheme is Scheme.TERNARY:
        return ternary.quantize(w, group_size=group_size, where=name, first_row=first_row)
    return rtn.quantize(
        w,
        bits=rule.bits,
        group_size=group_size,
        symmetric=rule.scheme is Scheme.SYMMETRIC,
        where=name,
        first_row=first_row,
    )


def _rows(matrix: QuantizedMatrix, rows: slice) -> QuantizedMatrix:
    offsets = None if matrix.offsets is None else matrix.offsets[:, rows]
    return replace(matrix, codes=matrix.codes[rows], scales=matrix.scales[:, rows], offsets=offsets)
