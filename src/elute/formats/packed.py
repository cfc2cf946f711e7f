"""Opens a packed model directory: see docs/packed-format.md. Multiplies nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import FormatError, UnsupportedError
from elute.formats import packed_layout as layout
from elute.formats.packed_layout import MatrixRecord, VectorRecord
from elute.formats.packed_writer import PackedWriter
from elute.formats.safetensors import SafetensorsFile, parse_json
from elute.types import F32, I32, PANEL, Affine, PackedMatrix, TokenizerFiles

__all__ = ["PackedModel", "PackedWriter"]

_CONVERT = "convert the model again"


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True, eq=False)
class PackedModel:
    """An opened directory. Weights are read-only views of mapped files; none is read before use."""

    path: Path
    source: str  # what it was converted from, for messages
    recipe: Mapping[str, Any]
    config: Mapping[str, Any]
    records: Mapping[str, MatrixRecord | VectorRecord]  # by tensor name, in the order written
    files: Mapping[str, FileRecord]
    shards: Mapping[str, SafetensorsFile]

    @classmethod
    def open(cls, path: str | Path) -> PackedModel:
        """Checks everything but the contents of the weights, which `verify` hashes.

        Raises FormatError unless the manifest, the sizes of all files and the headers, types and
        sizes of all tensors agree; UnsupportedError for a layout newer than this version's.
        """
        path = Path(path)
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
        shards: dict[str, SafetensorsFile] = {}
        for name, record in records.items():
            if record.file not in files:
                raise FormatError(f"{where}: {name}: files lists no {record.file}; {_CONVERT}")
            if record.file not in shards:
                shards[record.file] = SafetensorsFile.open(path / record.file)
            _check_tensors(name, record, shards[record.file])
        return cls(
            path=path,
            source=_string(manifest.get("source"), where=f"{where}: source"),
            recipe=layout.mapping(manifest.get("recipe") or {}, where=f"{where}: recipe"),
            config=_object(path / layout.CONFIG),
            records=records,
            files=files,
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

        Raises FormatError when there is no such matrix or its columns are no permutation.
        """
        record = self.records.get(name)
        if not isinstance(record, MatrixRecord):
            raise FormatError(f"{self.path}: found no matrix {name!r}; {_CONVERT}")
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

    def column_order(self, name: str) -> bytes | None:
        """As types.StoredCodes.order."""
        record = self.records[name]
        if not isinstance(record, MatrixRecord) or not record.columns:
            return None
        columns = self.matrix(name).columns
        return None if columns is None else columns.tobytes()

    def vector(self, name: str) -> F32:
        """A view f32 [L] of the mapped file. Raises FormatError when there is no such vector."""
        record = self.records.get(name)
        if not isinstance(record, VectorRecord):
            raise FormatError(f"{self.path}: found no vector {name!r}; {_CONVERT}")
        (part,) = record.parts()
        values: F32 = self._part(name, part)
        return values

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


def _check_layout(manifest: Mapping[str, Any], *, where: str) -> None:
    if manifest.get("format") != layout.FORMAT:
        raise FormatError(
            f"{where}: format is {manifest.get('format')!r}, wanted {layout.FORMAT!r}; {_CONVERT}"
        )
    version = manifest.get("layout")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"{where}: layout is {version!r}, wanted an integer from 1; {_CONVERT}")
    if version > layout.LAYOUT:
        raise UnsupportedError(
            f"{where}: layout is {version}, newer than the {layout.LAYOUT} that this version "
            f"reads; upgrade elute"
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
