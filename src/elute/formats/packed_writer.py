"""Writes a packed model directory, tensor by tensor. Packs nothing: it is handed quads."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import EluteError, FormatError, ShapeError
from elute.formats import packed_layout as layout
from elute.formats.atomic_directory import atomic_directory, disk_errors
from elute.formats.page_sums import PageSummer
from elute.types import F16, F32, PANEL, U8, U32, Affine, InBank, PackedMatrix, TokenizerFiles

MAX_SHARD_BYTES = 4_000_000_000  # below 4 GiB, the largest file that some file systems hold
_ENTRY_BYTES = 128  # a header entry apart from its name: keys, a dtype, one size and two offsets


class PackedWriter:
    """A context manager; leaving it without an exception publishes the directory.

        with PackedWriter(out, names=[...], config=..., tokenizer=..., source="...") as writer:
            writer.add_matrix("lm_head.weight", (N, K), [packed])

    Tensors go to disk as they are added; nothing of them is kept. Not thread safe.
    """

    def __init__(
        self,
        out: Path,
        *,
        names: Sequence[str],
        config: Mapping[str, Any],
        tokenizer: TokenizerFiles,
        source: str,
        recipe: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        runs: Sequence[Sequence[str]] = (),
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """names: every tensor that may be added; room in the file headers is kept for them.
        runs: names that are added one after the other, of about one size, and go into one file.

        Raises EluteError when `out` exists and may not be replaced: a packed model without
        `overwrite`, or anything else that is not an empty directory.
        """
        self._out = Path(os.path.realpath(out))
        self._names = frozenset(names)
        self._run_lengths = {run[0]: len(run) for run in runs}
        self._in_runs = frozenset(name for run in runs for name in run[1:])
        self._config = config
        self._tokenizer = tokenizer
        self._source = source
        self._recipe = recipe
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        self._records: dict[str, layout.MatrixRecord | layout.VectorRecord] = {}
        self._banks: dict[str, layout.BankRecord] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._sums: dict[str, U32] = {}  # of the pages of the weight files
        self._shard: _Shard | None = None
        self._stack = ExitStack()
        with disk_errors(self._out):
            _check_replaceable(self._out, overwrite=overwrite)

    def __enter__(self) -> PackedWriter:
        self._directory = self._stack.enter_context(
            atomic_directory(self._out, replace=self._overwrite)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # The stack must see an exception of _finish, or it would publish what is not finished.
            if error is None:
                with disk_errors(self._out):
                    self._finish()
        except BaseException as late:
            self._stack.__exit__(type(late), late, late.__traceback__)
            raise
        else:
            self._stack.__exit__(kind, error, trace)
        finally:
            if self._shard is not None:
                self._shard.abandon()

    def add_matrix(self, name: str, shape: tuple[int, int], pieces: Iterable[PackedMatrix]) -> None:
        """Writes w[N, K], given whole or as consecutive runs of rows.

        Every piece but the last holds a multiple of PANEL rows; all share bits, group_size, affine,
        zero and columns. Raises ShapeError when they do not make up `shape`, BudgetError when the
        disk is full.
        """
        first: PackedMatrix | None = None
        scales: list[F16] = []
        offsets: list[F16] = []
        rows = planes_bytes = 0
        for piece in pieces:
            if first is None:
                first = piece
                record, shard = self._begin_matrix(name, shape, piece)
            if _traits(piece) != _traits(first) or rows % PANEL:
                raise ShapeError(
                    f"{name}: rows {rows}.. are packed unlike the rows before, wanted one bits, "
                    f"group_size and affine, and whole panels; pack the matrix again"
                )
            with disk_errors(self._out):
                shard.write(piece.planes)
            planes_bytes += piece.planes.nbytes
            rows += piece.shape[0]
            scales.append(piece.scales)
            if piece.offsets is not None:
                offsets.append(piece.offsets)
        if first is None or rows != shape[0]:
            raise ShapeError(f"{name}: found {rows} packed rows, wanted {shape[0]}; pack them all")
        bodies: dict[str, npt.NDArray[Any]] = {".scales": np.concatenate(scales)}
        if offsets:
            bodies[".offsets"] = np.concatenate(offsets)
        if first.columns is not None:
            bodies[".columns"] = first.columns
        with disk_errors(self._out):
            for part in record.parts():
                if part.suffix == ".planes":
                    shard.close_tensor(name, part, written=planes_bytes)
                else:
                    shard.write_tensor(name, part, bodies[part.suffix])
        self._records[name] = record

    def add_bank(self, name: str, row_bytes: int, rows: U8) -> None:
        """Writes rows u8 [K, row_bytes] of input channels, in blocks. name: of a matrix in it.

        Raises BudgetError when the disk is full.
        """
        per_block = layout.rows_per_block(row_bytes)
        record = layout.BankRecord(rows.shape[0], row_bytes, per_block, "")
        blocks = np.zeros((record.n_blocks, record.block_bytes), np.uint8)
        whole = np.zeros((record.n_blocks * per_block, row_bytes), np.uint8)
        whole[: rows.shape[0]] = rows
        blocks[:, : per_block * row_bytes] = whole.reshape(record.n_blocks, -1)
        shard = self._shard_for(name, record.part().stored_bytes)
        with disk_errors(self._out):
            shard.write_tensor(name, record.part(), blocks)
        self._banks[name] = replace(record, file=shard.name)

    def add_in_bank(self, name: str, matrix: InBank) -> None:
        """Writes the scales and offsets of a matrix whose codes lie in a bank that was added."""
        record = layout.MatrixRecord(
            shape=matrix.shape,
            bits=matrix.bits,
            group_size=matrix.group_size,
            affine=matrix.affine,
            zero=matrix.zero,
            columns=False,
            file="",
            bank=matrix.bank,
            bank_offset=matrix.offset,
        )
        shard = self._shard_for(name, sum(part.stored_bytes for part in record.parts()))
        bodies = {".scales": matrix.scales, ".offsets": matrix.offsets}
        with disk_errors(self._out):
            for part in record.parts():
                body = bodies[part.suffix]
                assert body is not None
                shard.write_tensor(name, part, body)
        self._records[name] = replace(record, file=shard.name)

    def add_vector(self, name: str, values: F32) -> None:
        """Writes f32 [L], or [N, K] as it is. Raises ShapeError for other ranks and no values."""
        if values.ndim not in (1, 2) or not values.size:
            raise ShapeError(f"{name}: found shape {values.shape}, wanted [L] or [N, K]")
        record = layout.VectorRecord(shape=values.shape, file="")
        (part,) = record.parts()
        shard = self._shard_for(name, part.stored_bytes)
        with disk_errors(self._out):
            shard.write_tensor(name, part, values.astype("<f4", copy=False))
        self._records[name] = replace(record, file=shard.name)

    def _begin_matrix(
        self, name: str, shape: tuple[int, int], piece: PackedMatrix
    ) -> tuple[layout.MatrixRecord, _Shard]:
        record = layout.MatrixRecord(
            shape=shape,
            bits=piece.bits,
            group_size=piece.group_size,
            affine=piece.affine,
            zero=piece.zero if piece.affine is Affine.SYMMETRIC else 0,
            columns=piece.columns is not None,
            file="",
        )
        shard = self._shard_for(name, sum(part.stored_bytes for part in record.parts()))
        return replace(record, file=shard.name), shard

    def _shard_for(self, name: str, stored_bytes: int) -> _Shard:
        if name not in self._names or name in self._records:
            raise ShapeError(f"{name}: added twice or missing from the writer's names")
        shard = self._shard
        wanted = 0 if name in self._in_runs else stored_bytes * self._run_lengths.get(name, 1)
        if shard is not None and wanted and shard.n_bytes + wanted > self._max_shard_bytes:
            with disk_errors(self._out):
                self._close_shard()
            shard = None
        if shard is None:
            number = 1 + sum(file.endswith(".safetensors") for file in self._files)
            path = self._directory / shard_name(number)
            with disk_errors(self._out):
                shard = self._shard = _Shard(path, self._names)
        return shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._sums[self._shard.name] = self._shard.finish()
            self._list_file(self._shard.name)
            self._shard = None

    def _finish(self) -> None:
        self._close_shard()
        tokenizer = self._tokenizer
        self._add_file(layout.CONFIG, _json(self._config))
        self._add_file(layout.TOKENIZER, tokenizer.tokenizer_json)
        self._add_file(layout.TOKENIZER_CONFIG, _json(tokenizer.tokenizer_config))
        self._add_file(layout.GENERATION_CONFIG, _json(tokenizer.generation_config))
        if tokenizer.chat_template is not None:
            self._add_file(layout.CHAT_TEMPLATE, tokenizer.chat_template)
        sums = b"".join(self._sums[name].astype("<u4").tobytes() for name in sorted(self._sums))
        _write_synced(self._directory / layout.PAGE_SUMS, sums)
        self._list_file(layout.PAGE_SUMS)
        manifest = {
            "format": layout.FORMAT,
            "layout": layout.CHANNEL_LAYOUT if self._banks else layout.LAYOUT,
            "source": self._source,
            "recipe": self._recipe,
            "files": self._files,
            "tensors": {name: record.to_json() for name, record in self._records.items()},
        }
        if self._banks:
            manifest["banks"] = {name: bank.to_json() for name, bank in self._banks.items()}
        _write_synced(self._directory / layout.MANIFEST, _utf8(layout.MANIFEST, _json(manifest)))

    def _add_file(self, name: str, text: str) -> None:
        _write_synced(self._directory / name, _utf8(name, text))
        self._list_file(name)

    def _list_file(self, name: str) -> None:
        with (self._directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._files[name] = {"size": file.seek(0, os.SEEK_END), "sha256": digest}


def shard_name(number: int) -> str:
    """Numbers count from 1."""
    return f"model-{number:05}.safetensors"


def data_start(names: Iterable[str]) -> int:
    """Where the data of every file begins, behind room for a header of all `names`."""
    most_parts = 4  # planes or channels, scales, offsets, columns
    room = sum(
        most_parts * (len(json.dumps(name)) + len(".offsets") + _ENTRY_BYTES) for name in names
    )
    return layout.align(8 + room + _ENTRY_BYTES)


class _Shard:
    """One safetensors file: data is streamed behind room for the header, which is written last."""

    def __init__(self, path: Path, names: frozenset[str]) -> None:
        self.name = path.name
        self._data_start = data_start(names)
        # Unbuffered: a buffered file writes when it is closed, and fails again on a full disk.
        self._file = io.FileIO(path, "x")
        self._file.seek(self._data_start)
        self._at = 0
        self._summer = PageSummer()  # of the data
        self._entries: dict[str, Any] = {"__metadata__": {"format": layout.FORMAT}}

    @property
    def n_bytes(self) -> int:
        return self._data_start + self._at

    def write(self, values: npt.NDArray[Any]) -> None:
        values = np.ascontiguousarray(values)
        self._summer.add(values)
        self._write(values)

    def _write(self, values: npt.NDArray[Any]) -> None:
        view = values.data.cast("B")
        while view:  # a raw write may be short, above all just before the disk is full
            written = self._file.write(view)
            assert written, "a blocking file wrote nothing"
            view = view[written:]

    def write_tensor(self, name: str, part: layout.Part, values: npt.NDArray[Any]) -> None:
        self.write(values)
        self.close_tensor(name, part, written=values.nbytes)

    def close_tensor(self, name: str, part: layout.Part, *, written: int) -> None:
        """Pads what was written since the last tensor and lists it.

        Raises ShapeError unless that is the size of the part, FormatError for a name in use.
        """
        if name + part.suffix in self._entries:  # such as a vector that is called w.scales
            raise FormatError(
                f"{name}{part.suffix}: is the name of two tensors; rename one in the checkpoint"
            )
        if written != part.n_bytes:
            raise ShapeError(
                f"{name}{part.suffix}: found {written} bytes, wanted {part.n_bytes}; pack it again"
            )
        self.write(np.zeros(part.stored_bytes - written, np.uint8))
        end = self._at + part.stored_bytes
        self._entries[name + part.suffix] = {
            "dtype": part.dtype,
            "shape": [part.stored_items],
            "data_offsets": [self._at, end],
        }
        self._at = end

    def finish(self) -> U32:
        """Writes the header. -> the sums of the file's pages"""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        room = self._data_start - 8
        assert len(header) <= room, "the header outgrew the room kept for it"
        self._file.seek(0)
        prefix = np.frombuffer(room.to_bytes(8, "little") + header.ljust(room), np.uint8)
        self._write(prefix)
        os.fsync(self._file.fileno())
        self._file.close()
        of_header = PageSummer()
        of_header.add(prefix)
        return np.concatenate([of_header.sums(), self._summer.sums()])

    def abandon(self) -> None:
        self._file.close()


def _traits(piece: PackedMatrix) -> tuple[Any, ...]:
    has_offsets = piece.offsets is not None
    return piece.bits, piece.group_size, piece.affine, piece.zero, piece.shape[1], has_offsets


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    if out.is_symlink():  # of a real path, that is only one that leads to itself
        raise EluteError(f"{out}: is a symbolic link to itself; choose another name")
    if not out.exists():
        return
    if not out.is_dir():
        raise EluteError(f"{out}: is a file, wanted a directory; choose another name")
    if not any(out.iterdir()):
        return
    manifest = out / layout.MANIFEST
    # Only what elute wrote is ever deleted, however hard it is forced.
    if not manifest.is_file() or layout.FORMAT.encode() not in manifest.read_bytes()[:1024]:
        raise EluteError(
            f"{out}: holds something other than a packed model; choose another directory"
        )
    if not overwrite:
        raise EluteError(f"{out}: holds a packed model already; force the conversion to replace it")


def _json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, indent=1, allow_nan=False, default=_plain)
    except ValueError as error:
        raise FormatError(f"config.json: cannot be written ({error}); repair the source") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{name}: cannot be written ({error.reason}); repair the source's text"
        ) from None


def _write_synced(path: Path, body: bytes) -> None:
    with path.open("xb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
