"""A model's weights in as much memory as they are given: some stay, the others pass through."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from elute import _native
from elute.errors import NOTE, DeviceError, UnsupportedError
from elute.flash import banks
from elute.flash.banks import Predictor
from elute.flash.page_cache import forget
from elute.flash.plan import BLOCK, Plan, Use
from elute.formats.packed import PackedModel
from elute.formats.packed_layout import MatrixRecord, Part, Records
from elute.formats.page_sums import PageSums
from elute.model.ops import Experts, Linear, OpList
from elute.types import F32, PANEL, U8, Affine, InBank, PackedMatrix

log = logging.getLogger(__name__)

# Where no disk was measured (flash/disk.py).
DEPTH = 8  # requests in flight
REQUEST_BYTES = 1 << 20


class FlashWeights:
    """The WeightSource of a plan. Everything but the streamed planes is read when it is opened.

    Nothing is mapped, so what the process holds is what the plan counts. With sums, every page is
    checked when it has been read and before it is used. tell: a line where the system refuses how
    reads are best made. Raises DeviceError when a file cannot be read, or not as it was written.
    """

    def __init__(
        self,
        packed: PackedModel,
        ops: OpList,
        plan: Plan,
        *,
        reader: str = "auto",
        depth: int = DEPTH,
        request_bytes: int = REQUEST_BYTES,
        direct: bool = True,
        sums: PageSums | None = None,
        predictor: Predictor = Predictor.MODEL,
        bank_depth: int = banks.DEPTH,
        gap_bytes: int = banks.GAP_BYTES,
        tell: bool = True,
    ) -> None:
        self._packed = packed
        self._sums = sums
        self._options = (reader, depth, request_bytes, direct)
        self._files = list(packed.shards)
        self._parts: dict[str, tuple[int, Part]] = {}  # what stays: its place and its kind
        self.plan = plan
        # Where not all fit, experts and channels come by banks.
        self._rows = banks.channel_rows(packed)
        if plan.staging and not self._rows:
            self._rows = banks.expert_rows(packed, ops)
        self._slots = pages(plan.slot_bytes if plan.staging else 0)
        self._staging = pages(plan.staging)
        self._in_row = self._expert_parts(ops) if plan.staging else {}
        pieces, size = [], 0
        for name in (*ops.matrices(), *ops.vectors()):
            for part in packed.records[name].parts():
                if part.suffix == ".planes" and name in plan.places:
                    continue
                if name + part.suffix in self._in_row:
                    continue
                self._parts[name + part.suffix] = (size, part)
                pieces.append(self._piece(name, part, size))
                size += part.stored_bytes
        # Where all fit, banks are read at once, and whole.
        self._bank_at: dict[str, int] = {}
        for name, bank in packed.banks.items():
            if plan.staging == 0:
                self._bank_at[name] = size
                pieces.append(self._piece(name, bank.part(), size))
                size += bank.part().stored_bytes
        self._predictor, self._bank_depth, self._gap_bytes = predictor, bank_depth, gap_bytes
        self._banks: _native.BankCache | None = None
        self._n_uses = 0
        self._claimed = False
        self._memory = pages(size)
        self._window = pages(plan.window) if plan.places else None
        loading = self._open(pieces, self._memory)
        loading.load()
        if loading.failure:
            raise DeviceError(loading.failure)
        self.reader = loading.reader
        if tell and reader == "auto" and self.reader != "io_uring":
            log.log(NOTE, "this system refuses io_uring; weights are read by threads instead")
        if tell and direct and not loading.direct:
            log.warning(
                "%s: the file system refuses O_DIRECT; reading through the page cache and "
                "emptying it behind, which is slower",
                packed.path,
            )
        forget(packed.path / file for file in self._files)  # reads go past it
        self._stream: _native.WeightStream | None = None

    @property
    def packed(self) -> PackedModel:
        return self._packed

    def matrix(self, name: str) -> PackedMatrix:
        record = self._packed.records[name]
        assert isinstance(record, MatrixRecord)
        group_shape = (record.n_panels, record.n_groups, PANEL)
        symmetric = record.affine is Affine.SYMMETRIC
        if name in self.plan.places:
            assert self._window is not None
            (planes,) = (part for part in record.parts() if part.suffix == ".planes")
            at = self.plan.places[name]
            planes_bytes = self._window[at : at + planes.n_bytes]
        else:
            planes_bytes = self._array(name + ".planes")
        return PackedMatrix(
            shape=record.shape,
            planes=planes_bytes,
            scales=self._array(name + ".scales").reshape(group_shape),
            offsets=None if symmetric else self._array(name + ".offsets").reshape(group_shape),
            affine=record.affine,
            zero=record.zero,
            bits=record.bits,
            group_size=record.group_size,
            columns=self._array(name + ".columns") if record.columns else None,
        )

    def vector(self, name: str) -> F32:
        values: F32 = self._array(name).reshape(self._packed.records[name].shape)
        return values

    def in_bank(self, name: str) -> InBank | None:
        """As PackedModel.in_bank, from memory."""
        record = self._packed.records[name]
        if not isinstance(record, MatrixRecord) or record.bank is None:
            return None
        group_shape = (record.n_panels, record.n_groups, PANEL)
        symmetric = record.affine is Affine.SYMMETRIC
        return InBank(
            shape=record.shape,
            scales=self._array(name + ".scales").reshape(group_shape),
            offsets=None if symmetric else self._array(name + ".offsets").reshape(group_shape),
            affine=record.affine,
            zero=record.zero,
            bits=record.bits,
            group_size=record.group_size,
            bank=record.bank,
            offset=record.bank_offset,
        )

    def planes_at(self, name: str) -> tuple[str, int]:
        """File and offset of the planes of a matrix in panels."""
        record = self._packed.records[name]
        planes = next(iter(record.parts()))
        return record.file, self._packed.shards[record.file].offset(name + planes.suffix)

    def bank_blocks(self, name: str) -> U8 | None:
        """Blocks u8 [n_blocks, block_bytes] of a bank that is in memory whole, else None."""
        if name not in self._bank_at:
            return None
        bank, at = self._packed.banks[name], self._bank_at[name]
        return self._memory[at : at + bank.n_bytes].reshape(bank.n_blocks, bank.block_bytes)

    @property
    def all_in_memory(self) -> bool:
        return not self.plan.staging and not self.plan.places

    @property
    def reading(self) -> tuple[str, bool, PageSums | None, int]:
        """How it reads: reader, direct, sums, gap_bytes."""
        reader, _, _, direct = self._options
        return reader, direct, self._sums, self._gap_bytes

    def open_banks(self, uses: Sequence[banks.BankUse]) -> _native.BankCache:
        """For an executor whose linears use banks so. One executor at a time."""
        packed, plan = self._packed, self.plan
        if plan.staging == 0:
            arrays = [
                self._memory[self._bank_at[name] :][: bank.part().stored_bytes]
                for name, bank in packed.banks.items()
            ]
            self._banks = banks.loaded_banks(packed, uses, arrays)
            return self._banks
        self._claim()
        self._n_uses = len(uses)
        reader, _, request_bytes, direct = self._options
        self._banks = banks.cached_banks(
            packed,
            self._rows,
            uses,
            plan,
            slots=self._slots,
            staging=self._staging,
            reader=reader,
            depth=self._bank_depth,
            request_bytes=request_bytes,
            gap_bytes=self._gap_bytes,
            direct=direct,
            predictor=self._predictor,
            sums=self._sums,
        )
        return self._banks

    def _claim(self) -> None:
        """Window and slots are one executor's: a second one would overwrite what the first reads.

        Raises UnsupportedError for a second.
        """
        if self._claimed:
            raise UnsupportedError(
                f"{self._packed.path}: found a second executor on weights that come from flash, "
                "wanted one; open the weights again for it"
            )
        self._claimed = True

    @property
    def banks(self) -> _native.BankCache | None:
        """What open_banks gave last, for its figures."""
        return self._banks

    def attach(self, native: _native.Executor, names: Sequence[str]) -> None:
        """Lets the executor, whose matrices have these names, use what streams."""
        if not self.plan.places:
            return
        assert self._window is not None
        self._claim()
        order = list(self.plan.places)
        pieces = []
        for name in order:
            record = self._packed.records[name]
            planes = next(iter(record.parts()))
            pieces.append(self._piece(name, planes, self.plan.places[name]))
        self._stream = self._open(pieces, self._window)
        index = {name: i for i, name in enumerate(order)}
        native.stream(self._stream, [index.get(name, -1) for name in names])

    def figures(self) -> tuple[int, float]:
        """(bytes read from flash since it was opened, seconds that threads waited for them)."""
        if self._banks is not None:
            found = self._banks.figures()
            return found["read_bytes"], found["waited_s"]
        return self._stream.figures() if self._stream is not None else (0, 0.0)

    def found_in_memory(self) -> float | None:
        """The share of the blocks wanted from banks that were there when they were; None where
        none are fetched.
        """
        if self._banks is None or not self.plan.staging:
            return None
        told = self._banks.figures()
        return float(told["cached"] / max(told["blocks"], 1))

    def events(self) -> npt.NDArray[np.int64]:
        """What the stream did of late, i64 [n, 4]: see WeightStream.events in _native.pyi."""
        nothing = np.zeros((0, 4), np.int64)
        if self._banks is not None:
            return self._banks.events()
        return self._stream.events() if self._stream is not None else nothing

    @property
    def pieces(self) -> int:
        """Of a forward, as events count them."""
        return self._n_uses if self.plan.staging else len(self.plan.places)

    def _piece(self, name: str, part: Part, at: int) -> tuple[int, int, int, int]:
        whole_bank = part.suffix == ".channels"
        file = (self._packed.banks if whole_bank else self._packed.records)[name].file
        offset = self._packed.shards[file].offset(name + part.suffix)
        return self._files.index(file), offset, part.stored_bytes, at

    def _open(self, pieces: list[tuple[int, int, int, int]], memory: U8) -> _native.WeightStream:
        reader, depth, request_bytes, direct = self._options
        paths = [str(self._packed.path / file) for file in self._files]
        sums, first = None, []
        if self._sums is not None:
            sums, first = self._sums.values, [self._sums.first[file] for file in self._files]
        try:
            return _native.open_stream(
                paths, pieces, memory, reader, depth, request_bytes, direct, sums, first
            )
        except RuntimeError as error:  # std::system_error: a file that is gone, a reader refused
            raise DeviceError(f"flash: {error}; check the model's files, or the reader") from None

    def has_expert_banks(self) -> bool:
        """Whether experts are fetched when they are picked; their arrays are then placeholders."""
        return bool(self._in_row)

    def _expert_parts(self, ops: OpList) -> dict[str, tuple[int, Part]]:
        """Where in the row of its expert each part of an expert's matrices lies."""
        found: dict[str, tuple[int, Part]] = {}
        for op in (op for op in ops.ops if isinstance(op, Experts)):
            for names in zip(op.gates, op.ups, op.downs, strict=True):
                at = 0
                for name in names:
                    for part in self._packed.records[name].parts():
                        found[name + part.suffix] = at, part
                        at += part.stored_bytes
        return found

    def _array(self, key: str) -> npt.NDArray[Any]:
        in_row = key in self._in_row
        at, part = (self._in_row if in_row else self._parts)[key]
        memory = self._staging if in_row else self._memory
        dtype = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I32": np.int32}[part.dtype]
        return memory[at : at + part.n_bytes].view(dtype)


@runtime_checkable
class Streamed(Protocol):
    """A WeightSource, part of which comes through a window."""

    def attach(self, native: _native.Executor, names: Sequence[str]) -> None:
        """As FlashWeights.attach."""


class Recorded(Protocol):
    """A packed model, or what one is going to be."""

    @property
    def records(self) -> Records: ...

    def column_order(self, name: str) -> bytes | None:
        """As types.StoredCodes.order."""


def uses(ops: OpList, packed: Recorded) -> list[Use]:
    """The uses of a forward, in order: linears, cut as the executor cuts them (by column order),
    and the experts of a layer, all at once: which of them a token picks is not known before.
    """
    found: list[Use] = []
    for op in ops.ops:
        if isinstance(op, Experts):
            found.append(_use(packed, op.matrices()))
        if not isinstance(op, Linear):
            continue
        by_order: dict[bytes, list[str]] = {}
        for name in op.weights:
            record = packed.records[name]
            if not isinstance(record, MatrixRecord) or record.bank is None:
                by_order.setdefault(packed.column_order(name) or b"", []).append(name)
        for names in by_order.values():
            found.append(_use(packed, names))
    return found


def _use(packed: Recorded, names: Sequence[str]) -> Use:
    sizes = tuple(next(iter(packed.records[name].parts())).stored_bytes for name in names)
    return Use(tuple(names), sizes)


def resident_bytes(ops: OpList, packed: Recorded) -> int:
    """Of all that stays under any plan: everything but the planes of linears and experts."""
    linear = {name for use in uses(ops, packed) for name in use.names}
    return sum(
        part.stored_bytes
        for name in (*ops.matrices(), *ops.vectors())
        for part in packed.records[name].parts()
        if not (part.suffix == ".planes" and name in linear)
    )


def pages(n_bytes: int) -> U8:
    """Zeroed pages of this process alone, aligned to them, and as huge ones where possible."""
    memory = mmap.mmap(-1, max(n_bytes, BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
