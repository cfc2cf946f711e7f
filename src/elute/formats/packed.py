"""Opens a packed model directory: see docs/packed-format.md. Multiplies nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import FormatError, UnsupportedError
from elute.formats import packed_layout as layout
from elute.formats.packed_layout import BankRecord, MatrixRecord, VectorRecord
from elute.formats.packed_writer import PackedWriter
from elute.formats.page_sums import PageSums
from elute.formats.safetensors import SafetensorsFile, parse_json
from elute.types import F32, I32, PANEL, U8, Affine, InBank, PackedMatrix, TokenizerFiles

__all__ = ["PackedModel", "PackedWriter"]

_CONVERT = "convert the model again"


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """elute.json, checked in itself and against the sizes of the files that it lists."""

    source: str
    recipe: Mapping[str, Any]
    records: Mapping[str, MatrixRecord | VectorRecord]
    banks: Mapping[str, BankRecord]
    files: Mapping[str, FileRecord]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises FormatError, and UnsupportedError for a layout newer than this version's."""
        where = f"{path / layout.MANIFEST}"
        manifest = _object(path / layout.MANIFEST)
        _check_layout(manifest, where=where)
        files = _file_records(manifest.get("files"), path, where=f"{where}: files")
        for name in (layout.CONFIG, layout.TOKENIZER, layout.TOKENIZER_CONFIG):
            if name not in files:
                raise FormatError(f"{where}: files lists no {name}; {_CONVERT}")
        tensors = layout.mapping(manifest.get("tensors"), where=f"{where}: tensors")
        records = {
            name: layout.record_from_json(value, where=f"{where}: {name}")
            for name, value in tensors.items()
        }
        banks = {
            name: layout.bank_from_json(value, where=f"{where}: {name}")
            for name, value in layout.mapping(
                manifest.get("banks") or {}, where=f"{where}: banks"
            ).items()
        }
        for name, listed in (*records.items(), *banks.items()):
            if listed.file not in files:
                raise FormatError(f"{where}: {name}: files lists no {listed.file}; {_CONVERT}")
        layout.check_banks(records, banks, where=where)
        return cls(
            source=_string(manifest.get("source"), where=f"{where}: source"),
            recipe=layout.mapping(manifest.get("recipe") or {}, where=f"{where}: recipe"),
            records=records,
            banks=banks,
            files=files,
        )


@dataclass(frozen=True, eq=False)
class PackedModel:
    """An opened directory. Weights are read-only views of mapped files; none is read before use."""

    path: Path
    source: str  # what it was converted from, for messages
    recipe: Mapping[str, Any]
    config: Mapping[str, Any]
    records: Mapping[str, MatrixRecord | VectorRecord]  # by tensor name, in the order written
    banks: Mapping[str, BankRecord]  # of channels, by name
    files: Mapping[str, FileRecord]
    shards: Mapping[str, SafetensorsFile]

    @classmethod
    def open(cls, path: str | Path) -> PackedModel:
        """Checks everything but the contents of the weights, which `verify` hashes.

        Raises FormatError unless the manifest, the sizes of all files and the headers, types and
        sizes of all tensors agree; UnsupportedError for a layout newer than this version's.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        shards = {
            file: SafetensorsFile.open(path / file)
            for file in dict.fromkeys(
                record.file for record in (*manifest.records.values(), *manifest.banks.values())
            )
        }
        for name, bank in manifest.banks.items():
            _check_part(name, bank.part(), shards[bank.file])
        for name, record in manifest.records.items():
            _check_tensors(name, record, shards[record.file])
        return cls(
            path=path,
            source=manifest.source,
            recipe=manifest.recipe,
            config=_object(path / layout.CONFIG),
            records=manifest.records,
            banks=manifest.banks,
            files=manifest.files,
            shards=shards,
        )

    def verify(self) -> None:
        """Hashes every file. Raises FormatError at the first that differs from the manifest."""
        for name, record in self.files.items():
            try:
                with (self.path / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _unreadable(self.path / name, error) from None
            if found != record.sha256:
                raise FormatError(
                    f"{self.path / name}: sha256 is {found}, wanted {record.sha256}; {_CONVERT}"
                )

    def page_sums(self) -> PageSums:
        """What every page of the weight files must sum to.

        Raises UnsupportedError for a folder without them, FormatError when their file is damaged.
        """
        if layout.PAGE_SUMS not in self.files:
            raise UnsupportedError(
                f"{self.path}: found no {layout.PAGE_SUMS}, the checksums of its pages; {_CONVERT}"
            )
        return read_page_sums(self.path, self.files, self.shards)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.records)

    def tokenizer_files(self) -> TokenizerFiles:
        """Raises FormatError when one of them is not what its name promises."""
        generation = layout.GENERATION_CONFIG
        template = layout.CHAT_TEMPLATE
        return TokenizerFiles(
            tokenizer_json=_text(self.path / layout.TOKENIZER),
            tokenizer_config=_object(self.path / layout.TOKENIZER_CONFIG),
            chat_template=_text(self.path / template) if template in self.files else None,
            generation_config=_object(self.path / generation) if generation in self.files else {},
        )

    def matrix(self, name: str) -> PackedMatrix:
        """Views of the mapped file; at least OVER_READ readable bytes follow the planes.

        Raises FormatError when there is no such matrix or its columns are no permutation,
        UnsupportedError for one in channel order, of which `in_bank` tells.
        """
        record = self.records.get(name)
        if not isinstance(record, MatrixRecord):
            raise FormatError(f"{self.path}: found no matrix {name!r}; {_CONVERT}")
        if record.bank is not None:
            raise UnsupportedError(
                f"{self.path}: {name} is stored in channel order, wanted panels; use the folder "
                "that it was made from"
            )
        parts = {part.suffix: self._part(name, part) for part in record.parts()}
        group_shape = (record.n_panels, record.n_groups, PANEL)
        columns: I32 | None = parts.get(".columns")
        if columns is not None and not _is_permutation(columns):
            raise FormatError(
                f"{self.path}: {name}.columns does not hold each of 0..{columns.size - 1} once; "
                f"{_CONVERT}"
            )
        symmetric = record.affine is Affine.SYMMETRIC
        return PackedMatrix(
            shape=record.shape,
            planes=parts[".planes"],
            scales=parts[".scales"].reshape(group_shape),
            offsets=None if symmetric else parts[".offsets"].reshape(group_shape),
            affine=record.affine,
            zero=record.zero,
            bits=record.bits,
            group_size=record.group_size,
            columns=columns,
        )

    def in_bank(self, name: str) -> InBank | None:
        """A matrix in channel order, its scales as views of the mapped file; None for others."""
        record = self.records.get(name)
        if not isinstance(record, MatrixRecord) or record.bank is None:
            return None
        parts = {part.suffix: self._part(name, part) for part in record.parts()}
        group_shape = (record.n_panels, record.n_groups, PANEL)
        symmetric = record.affine is Affine.SYMMETRIC
        return InBank(
            shape=record.shape,
            scales=parts[".scales"].reshape(group_shape),
            offsets=None if symmetric else parts[".offsets"].reshape(group_shape),
            affine=record.affine,
            zero=record.zero,
            bits=record.bits,
            group_size=record.group_size,
            bank=record.bank,
            offset=record.bank_offset,
        )

    def bank(self, name: str) -> U8:
        """Blocks u8 [n_blocks, block_bytes] of a bank, a view of the mapped file."""
        record = self.banks[name]
        stored: U8 = self.shards[record.file].tensor(name + record.part().suffix)
        return stored[: record.n_bytes].reshape(record.n_blocks, record.block_bytes)

    def column_order(self, name: str) -> bytes | None:
        """As types.StoredCodes.order."""
        record = self.records[name]
        if not isinstance(record, MatrixRecord) or not record.columns:
            return None
        columns = self.matrix(name).columns
        return None if columns is None else columns.tobytes()

    def vector(self, name: str) -> F32:
        """A view f32 [L] or [N, K] of the mapped file. Raises FormatError when there is none."""
        record = self.records.get(name)
        if not isinstance(record, VectorRecord):
            raise FormatError(f"{self.path}: found no vector {name!r}; {_CONVERT}")
        (part,) = record.parts()
        values: F32 = self._part(name, part).reshape(record.shape)
        return values

    @property
    def largest_shard(self) -> Path:
        """The largest weight file."""
        return self.path / max(self.shards, key=lambda name: self.files[name].size)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all weights, padding apart."""
        return layout.weight_bytes(self.records)

    @cached_property
    def bits_per_weight(self) -> float:
        """Bits that the matrices take, scales, offsets and column orders included, per weight."""
        return layout.bits_per_weight(self.records)

    def _part(self, name: str, part: layout.Part) -> npt.NDArray[Any]:
        stored = self.shards[self.records[name].file].tensor(name + part.suffix)
        return stored[: part.n_bytes // part.item_bytes]


def read_page_sums(
    path: Path, files: Mapping[str, FileRecord], shards: Collection[str]
) -> PageSums:
    """Of the weight files `shards`. Raises FormatError when their file is damaged."""
    file = path / layout.PAGE_SUMS
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from None
    found, wanted = hashlib.sha256(data).hexdigest(), files[layout.PAGE_SUMS].sha256
    if found != wanted:
        raise FormatError(f"{file}: sha256 is {found}, wanted {wanted}; {_CONVERT}")
    return PageSums.parse(data, {name: files[name].size for name in shards}, where=str(file))


def _check_layout(manifest: Mapping[str, Any], *, where: str) -> None:
    if manifest.get("format") != layout.FORMAT:
        raise FormatError(
            f"{where}: format is {manifest.get('format')!r}, wanted {layout.FORMAT!r}; {_CONVERT}"
        )
    version = manifest.get("layout")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"{where}: layout is {version!r}, wanted an integer from 1; {_CONVERT}")
    if version > layout.NEWEST_LAYOUT:
        raise UnsupportedError(
            f"{where}: layout is {version}, newer than the {layout.NEWEST_LAYOUT} that this "
            f"version reads; upgrade elute"
        )


def _file_records(value: Any, path: Path, *, where: str) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    for name, entry in layout.mapping(value, where=where).items():
        layout.plain_name(name, where=where)
        fields = layout.mapping(entry, where=f"{where}: {name}")
        wanted, sha256 = fields.get("size"), fields.get("sha256")
        if not isinstance(wanted, int) or not isinstance(sha256, str):
            raise FormatError(f"{where}: {name}: wanted a size and a sha256; {_CONVERT}")
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise _unreadable(path / name, error) from None
        if found != wanted:
            raise FormatError(f"{path / name}: found {found} bytes, wanted {wanted}; {_CONVERT}")
        records[name] = FileRecord(size=wanted, sha256=sha256)
    return records


def _check_tensors(name: str, record: MatrixRecord | VectorRecord, shard: SafetensorsFile) -> None:
    for part in record.parts():
        _check_part(name, part, shard)


def _check_part(name: str, part: layout.Part, shard: SafetensorsFile) -> None:
    entry = shard.entry(name + part.suffix)
    found = (entry.dtype, entry.shape, entry.offset % layout.ALIGNMENT)
    if found != (part.dtype, (part.stored_items,), 0):
        raise FormatError(
            f"{shard.path}: {name}{part.suffix} is {entry.dtype} {list(entry.shape)} at byte "
            f"{entry.offset}, wanted {part.dtype} [{part.stored_items}] at a multiple of "
            f"{layout.ALIGNMENT}; {_CONVERT}"
        )


def _is_permutation(columns: I32) -> bool:
    return bool(np.array_equal(np.sort(columns), np.arange(columns.size)))


def _unreadable(path: Path, error: OSError) -> FormatError:
    return FormatError(f"{path}: cannot be read ({error.strerror}); {_CONVERT}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start} is not UTF-8; {_CONVERT}") from None


def _object(path: Path) -> Mapping[str, Any]:
    return layout.mapping(parse_json(_text(path), where=str(path)), where=str(path))


def _string(value: Any, *, where: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{where}: found {value!r}, wanted a string; {_CONVERT}")
    return value
