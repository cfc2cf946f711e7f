"""What packing a checkpoint would give, from headers alone: records and sizes, no weight read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elute.formats import packed_layout as layout
from elute.formats.packed_layout import MatrixRecord, Records, VectorRecord
from elute.formats.packed_writer import MAX_SHARD_BYTES, data_start, shard_name
from elute.pack.convert import check_ranks, packing_rule
from elute.quantize.recipe import Recipe
from elute.types import Affine, Checkpoint


@dataclass(frozen=True)
class Foreseen:
    """A packed model that is not there yet; orders: StoredCodes.order of matrices that have one."""

    source: str
    config: Mapping[str, Any]
    records: Records
    orders: Mapping[str, bytes]

    def column_order(self, name: str) -> bytes | None:
        return self.orders.get(name)

    @property
    def nbytes(self) -> int:
        return layout.weight_bytes(self.records)

    @property
    def bits_per_weight(self) -> float:
        return layout.bits_per_weight(self.records)


def foresee(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    tensors: Sequence[str],
    floats: Collection[str] = (),
    headers_only: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Foreseen:
    """The records of pack.convert.convert with the same arguments, file names included.

    headers_only  as types.Checkpoint.codes: no byte of a tensor is there

    Raises UnsupportedError and ShapeError as convert does.
    """
    names = list(dict.fromkeys(tensors))
    shapes = {name: checkpoint.shape(name) for name in names}
    check_ranks(checkpoint.source, shapes)
    records: dict[str, MatrixRecord | VectorRecord] = {}
    orders: dict[str, bytes] = {}
    number, start = 1, data_start(names)
    end = start
    for name, shape in shapes.items():
        record: MatrixRecord | VectorRecord
        if len(shape) == 2 and name not in floats:
            record, order = _matrix(checkpoint, name, (shape[0], shape[1]), recipe, headers_only)
            if order is not None:
                orders[name] = order
        else:
            record = VectorRecord(tuple(shape), "")
        stored_bytes = sum(part.stored_bytes for part in record.parts())
        if records and end + stored_bytes > max_shard_bytes:
            number, end = number + 1, start
        end += stored_bytes
        records[name] = replace(record, file=shard_name(number))
    return Foreseen(checkpoint.source, checkpoint.config, records, orders)


def column_order(checkpoint: Checkpoint, name: str, recipe: Recipe) -> bytes | None:
    """Foreseen.column_order of one matrix."""
    n, k = checkpoint.shape(name)
    return _matrix(checkpoint, name, (n, k), recipe, headers_only=False)[1]


def _matrix(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, int],
    recipe: Recipe,
    headers_only: bool,
) -> tuple[MatrixRecord, bytes | None]:
    codes = checkpoint.codes(name, headers_only=headers_only)
    stored_group = None if codes is None else codes.group_size
    rule = packing_rule(name, shape[1], recipe, stored_group=stored_group)
    if rule is not None:
        codes = rule.stored(shape[1])
    assert codes is not None
    zero = codes.zero if codes.affine is Affine.SYMMETRIC else 0
    ordered = codes.order is not None
    record = MatrixRecord(shape, codes.bits, codes.group_size, codes.affine, zero, ordered, "")
    return record, codes.order
