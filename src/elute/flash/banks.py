"""Banks of a model in channel order: what lies in them, who uses them, how they reach memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from elute import _native
from elute.errors import DeviceError, FormatError
from elute.flash.plan import BankSize, Plan
from elute.flash.sparsity import kind
from elute.formats.packed import PackedModel
from elute.formats.packed_layout import MatrixRecord, Records, align, rows_per_block
from elute.formats.page_sums import PageSums
from elute.model.ops import Experts, Linear, OpList, RmsNorm
from elute.types import U8

DEPTH = 64  # small requests: measured disks need more of them in flight than large ones
REQUEST_BYTES = 1 << 20
# Reading this much more costs what a request costs by itself (some 9 us at 1.3 GB/s).
GAP_BYTES = 12 << 10


class Predictor(StrEnum):
    """Where it is known from what to read ahead. None changes an answer.

    MODEL    inputs that follow a norm: the channels of the same input a layer before, since
             the residual stream changes little; others: those of the token before
    NONE     nothing is read ahead
    RANDOM, INVERSE  half of the blocks, and those that MODEL would not read; for tests
    """

    MODEL = "model"
    NONE = "none"
    RANDOM = "random"
    INVERSE = "inverse"


@dataclass(frozen=True)
class Rows:
    """A bank as it lies in a file: equal blocks of whole pages, and in them equal rows."""

    name: str
    file: str
    offset: int
    n_rows: int
    row_bytes: int
    rows_per_block: int
    block_bytes: int

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.rows_per_block)

    @property
    def n_bytes(self) -> int:
        return self.n_blocks * self.block_bytes


def channel_rows(packed: PackedModel) -> list[Rows]:
    """The banks of channels."""
    return [
        Rows(
            name,
            bank.file,
            packed.shards[bank.file].offset(name + bank.part().suffix),
            bank.n_rows,
            bank.row_bytes,
            bank.rows_per_block,
            bank.block_bytes,
        )
        for name, bank in packed.banks.items()
    ]


@dataclass(frozen=True)
class Sized:
    """A bank to be, and the matrices in it."""

    names: tuple[str, ...]
    size: BankSize


def channel_sizes(ops: OpList, records: Records, sparsity: float = 0.0) -> list[Sized]:
    """Banks of a model in channel order, or to be put in it one layer at a time."""
    by_bank: dict[str, list[str]] = {}
    for op in (op for op in ops.ops if isinstance(op, Linear)):
        found = [records[name] for name in op.weights]
        if not any(isinstance(record, MatrixRecord) and record.columns for record in found):
            bank = _bank(records, op.weights[0]) or op.weights[0]
            by_bank.setdefault(bank, []).extend(op.weights)
    sized = []
    for bank, names in by_bank.items():
        members = [r for name in names if isinstance(r := records[name], MatrixRecord)]
        row_bytes = sum(record.row_bytes for record in members)
        per_block = rows_per_block(row_bytes)
        n_blocks = -(-members[0].shape[1] // per_block)
        size = BankSize(bank, n_blocks, align(per_block * row_bytes), 1 - sparsity**per_block)
        sized.append(Sized(tuple(names), size))
    return sized


def expert_sizes(ops: OpList, records: Records) -> list[Sized]:
    """A bank for each layer of experts. [] where there is none, or experts of a layer differ in
    size or lie in several files: then they cannot be fetched one by one.
    """
    sized = []
    for op in (op for op in ops.ops if isinstance(op, Experts)):
        sizes: set[tuple[int, ...]] = set()
        files: set[str] = set()
        for names in zip(op.gates, op.ups, op.downs, strict=True):
            sizes.add(tuple(p.stored_bytes for name in names for p in records[name].parts()))
            files.update(records[name].file for name in names)
        if len(sizes) != 1 or len(files) != 1:
            return []
        n = len(op.gates)
        size = BankSize(op.gates[0], n, sum(sizes.pop()), op.top_k / n)
        sized.append(Sized(op.matrices(), size))
    return sized


def expert_rows(packed: PackedModel, ops: OpList) -> list[Rows]:
    """The same as they lie in their files, of one row an expert: gate, up and down with their
    scales, one expert behind the other. Raises FormatError where they do not.
    """
    found = []
    for sized in expert_sizes(ops, packed.records):
        name, size = sized.size.name, sized.size.block_bytes
        file = packed.records[name].file
        gates = sized.names[::3]
        starts = [packed.shards[file].offset(gate + ".planes") for gate in gates]
        if starts != [starts[0] + i * size for i in range(len(starts))]:
            raise FormatError(
                f"{packed.path / file}: the experts of {name} do not lie one behind the other; "
                "convert the model again"
            )
        found.append(Rows(name, file, starts[0], len(starts), size, 1, size))
    return found


@dataclass(frozen=True)
class BankUse:
    """An input of linears whose weights lie in a bank; like: the use that predicts it."""

    bank: str
    like: int


def banks_of(ops: OpList, layer_group: int = 1) -> list[tuple[str, ...]]:
    """What pack.reorder takes: weights that read one input, of layer_group layers side by side."""
    kinds: dict[str, list[tuple[str, ...]]] = {}
    for op in ops.ops:
        if isinstance(op, Linear):
            kinds.setdefault(kind(op.weights[0]), []).append(op.weights)
    found: dict[str, tuple[str, ...]] = {}
    for members in kinds.values():
        for first in range(0, len(members), layer_group):
            group = members[first : first + layer_group]
            found[group[0][0]] = tuple(name for names in group for name in names)
    return list(found.values())


def bank_uses(ops: OpList, records: Records) -> list[BankUse]:
    """In the order of the linears. Raises DeviceError for a linear only some of whose weights are
    in its bank.
    """
    after_norm: set[str] = set()
    found: list[BankUse] = []
    last: dict[str, int] = {}  # of each kind
    for op in ops.ops:
        if isinstance(op, RmsNorm):
            after_norm.add(op.output)
        elif isinstance(op, Linear):
            banks = {_bank(records, name) for name in op.weights}
            if banks != {None}:
                if len(banks) != 1:
                    raise DeviceError(
                        f"{op.weights[0]}: found weights of one input in {len(banks)} banks, "
                        "wanted one; convert the model again"
                    )
                (bank,) = banks
                assert bank is not None
                this = len(found)
                of_kind = kind(op.weights[0])
                like = last.get(of_kind, this) if op.input in after_norm else this
                found.append(BankUse(bank, like))
                last[of_kind] = this
            after_norm -= set(op.outputs)
    return found


def _bank(records: Records, name: str) -> str | None:
    record = records[name]
    return record.bank if isinstance(record, MatrixRecord) else None


def resident_banks(packed: PackedModel, uses: Sequence[BankUse]) -> _native.BankCache:
    """Of a mapped folder: nothing is read before it is used, and all of it may stay."""
    arrays = [packed.bank(name).reshape(-1) for name in packed.banks]
    return loaded_banks(packed, uses, arrays)


def loaded_banks(
    packed: PackedModel, uses: Sequence[BankUse], arrays: Sequence[U8]
) -> _native.BankCache:
    """Of banks that were read into memory, in the order of packed.banks."""
    rows = channel_rows(packed)
    return _native.resident_banks(list(arrays), _described(packed, rows, {}), _indexed(rows, uses))


def cached_banks(
    packed: PackedModel,
    rows: Sequence[Rows],
    uses: Sequence[BankUse],
    plan: Plan,
    *,
    slots: U8,
    staging: U8,
    reader: str,
    depth: int,
    request_bytes: int,
    gap_bytes: int,
    direct: bool,
    predictor: Predictor,
    sums: PageSums | None,
) -> _native.BankCache:
    """slots, staging: memory of the plan's sizes. Raises DeviceError for files that are gone."""
    files = list(packed.shards)
    try:
        return _native.open_banks(
            [str(packed.path / file) for file in files],
            _described(packed, rows, plan.slots),
            _indexed(rows, uses),
            slots,
            staging,
            reader,
            depth,
            request_bytes,
            gap_bytes,
            direct,
            str(predictor),
            None if sums is None else sums.values,
            [] if sums is None else [sums.first[file] for file in files],
        )
    except RuntimeError as error:  # std::system_error: a file that is gone, a reader refused
        raise DeviceError(f"flash: {error}; check the model's files, or the reader") from None


def active_rows(cache: _native.BankCache, use: int, n_rows: int) -> npt.NDArray[np.bool_]:
    """Which rows a use wanted last: bool [n_rows]."""
    return _rows(cache.last(use), n_rows)


def present_rows(cache: _native.BankCache, use: int, n_rows: int) -> npt.NDArray[np.bool_]:
    """Which rows a use found in memory or on their way; use 0: which it will find. bool [n_rows].
    For executors whose choice of channels is cache-aware.
    """
    return _rows(cache.present(use), n_rows)


def _rows(words: npt.NDArray[np.uint64], n_rows: int) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return bits[:n_rows].astype(bool)


def _described(
    packed: PackedModel, rows: Sequence[Rows], slots: Mapping[str, int]
) -> list[tuple[int, int, int, int, int, int, int]]:
    files = list(packed.shards)
    return [
        (
            files.index(bank.file),
            bank.offset,
            bank.block_bytes,
            bank.row_bytes,
            bank.n_rows,
            bank.rows_per_block,
            slots.get(bank.name, 0),
        )
        for bank in rows
    ]


def _indexed(rows: Sequence[Rows], uses: Sequence[BankUse]) -> list[tuple[int, int]]:
    index = {bank.name: i for i, bank in enumerate(rows)}
    return [(index[use.bank], use.like) for use in uses]
