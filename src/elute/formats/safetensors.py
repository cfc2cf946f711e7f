"""Reads the safetensors container: a checked header, lazy views of the bytes. Knows no model.

The `safetensors` library checks headers too, but does not say where a tensor's bytes lie, which
direct reads need. Layout: u64 little-endian header length, JSON header, data; offsets in the
header count from the first data byte.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from elute.errors import FormatError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 62  # numpy refuses shapes whose size overflows a signed 64-bit integer

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# Types that the format defines and that elute has no use for.
KNOWN_UNSUPPORTED = frozenset(
    {
        *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
        *("F6_E2M3", "F6_E3M2", "F4", "C64"),
    }
)
KNOWN_DTYPES = KNOWN_UNSUPPORTED | DTYPES.keys()


def parse_json(text: str | bytes, *, where: str, allow_nan: bool = False) -> Any:
    """JSON without its traps.

    Duplicate keys, endless nesting and endless integers raise FormatError, and so do NaN and
    Infinity unless allowed (Python writers put them into configs).
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key, value in pairs:
            if key in members:
                raise FormatError(
                    f"{where}: found the key {key!r} twice, wanted each key once"
                    "; fetch the file again"
                )
            members[key] = value
        return members

    def constant(name: str) -> float:
        if allow_nan:
            return float(name)
        raise FormatError(f"{where}: found {name}, wanted a JSON number; fetch the file again")

    try:
        # Decoded here: json.loads would guess UTF-16 and UTF-32 from bytes.
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        raise FormatError(
            f"{where}: found JSON nested too deeply to read; fetch the file again"
        ) from None
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{where}: found bytes that are not UTF-8 ({error.reason}); fetch the file again"
        ) from None
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{where}: found invalid JSON at character {error.pos} ({error.msg}); "
            f"fetch the file again"
        ) from None
    except ValueError as error:  # an integer of thousands of digits
        raise FormatError(
            f"{where}: found a number that cannot be read ({error}); fetch the file again"
        ) from None


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """An opened file: entries by tensor name. Bytes are mapped on first use and never copied."""

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SafetensorsFile:
        """Reads and checks the header.

        Raises FormatError when the header breaks the format or disagrees with the file's size,
        UnsupportedError for an element type that elute cannot read.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                file_bytes = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                if len(prefix) < 8:
                    raise FormatError(
                        f"{path}: found {len(prefix)} bytes, wanted at least the header length"
                        "; fetch the file again"
                    )
                (header_bytes,) = struct.unpack("<Q", prefix)
                if header_bytes > MAX_HEADER_BYTES:
                    raise FormatError(
                        f"{path}: found a header length of {header_bytes} bytes, wanted at most "
                        f"{MAX_HEADER_BYTES}; this is not a safetensors file"
                    )
                if header_bytes > file_bytes - 8:
                    raise FormatError(
                        f"{path}: found a header length of {header_bytes} bytes in a file of "
                        f"{file_bytes}; fetch the file again"
                    )
                header = file.read(header_bytes)
        except OSError as error:
            raise FormatError(
                f"{path}: cannot be read ({error.strerror}); check that it may be read"
            ) from None
        members = parse_json(header, where=str(path))
        if not isinstance(members, dict):
            raise FormatError(
                f"{path}: found a {type(members).__name__} as header, wanted a JSON object"
                "; fetch the file again"
            )
        metadata = _metadata(members.pop("__metadata__", {}), path)
        entries = {
            name: _entry(name, value, path, first_byte=8 + header_bytes)
            for name, value in members.items()
        }
        _check_cover(entries, path, first_byte=8 + header_bytes, file_bytes=file_bytes)
        return cls(path=path, entries=entries, metadata=metadata)

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return np.memmap(self.path, np.uint8, mode="r")

    def entry(self, name: str) -> TensorEntry:
        """Raises FormatError when the file has no such tensor."""
        try:
            return self.entries[name]
        except KeyError:
            raise FormatError(
                f"{self.path}: found no tensor {name!r} among {len(self.entries)}"
                "; fetch the file again"
            ) from None

    def offset(self, name: str) -> int:
        """The tensor's first byte, counted from the start of the file."""
        return self.entry(name).offset

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of the mapped file in the stored dtype; BF16 as ml_dtypes.bfloat16.

        The view is unaligned where the file is; numpy copes, native code must copy.
        """
        entry = self.entry(name)
        dtype = DTYPES[entry.dtype]
        if entry.n_bytes == 0:
            return np.zeros(entry.shape, dtype)
        raw = self._bytes[entry.offset : entry.offset + entry.n_bytes]
        return np.asarray(raw).view(dtype).reshape(entry.shape)


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(
            f"{path}: found a __metadata__ that is not an object of strings; fetch the file again"
        )
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(name: str, value: Any, path: Path, *, first_byte: int) -> TensorEntry:
    where = f"{path}: tensor {_short(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"{where}: wanted an object of exactly dtype, shape and data_offsets"
            "; fetch the file again"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in KNOWN_DTYPES:
        raise FormatError(
            f"{where}: found dtype {_short(dtype)}, wanted one of {', '.join(DTYPES)}"
            "; fetch the file again"
        )
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"{where}: found dtype {dtype}, which elute does not read; use a checkpoint in BF16, "
            f"F16 or F32, or a GPTQ, AWQ or GGUF one"
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise FormatError(
            f"{where}: found shape {_short(shape)}, wanted a list of sizes from 0 up"
            "; fetch the file again"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(
            f"{where}: found {len(shape)} dimensions, wanted at most {MAX_DIMENSIONS}"
            "; fetch the file again"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise FormatError(
            f"{where}: found data_offsets {_short(offsets)}, wanted a list of begin and end"
            "; fetch the file again"
        )
    begin, end = offsets
    n_elements, extent = 1, 1
    for size in shape:
        n_elements *= size
        extent *= max(size, 1)
    if extent > MAX_ELEMENTS:
        raise FormatError(
            f"{where}: found shape {_short(shape)}, whose size overflows 64 bits"
            "; fetch the file again"
        )
    n_bytes = n_elements * DTYPES[dtype].itemsize
    if end - begin != n_bytes:
        raise FormatError(
            f"{where}: found data_offsets {_short(offsets)}, wanted a range of {n_bytes} bytes for "
            f"{dtype} {shape}; fetch the file again"
        )
    return TensorEntry(dtype=dtype, shape=tuple(shape), offset=first_byte + begin, n_bytes=n_bytes)


def _check_cover(
    entries: Mapping[str, TensorEntry], path: Path, *, first_byte: int, file_bytes: int
) -> None:
    """Tensors must tile the data section: no overlap, no hole, nothing beyond the end."""
    at = first_byte
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if entry.offset != at:
            overlaps = entry.offset < at
            kind = "overlaps the tensor before it" if overlaps else "leaves a hole before it"
            raise FormatError(
                f"{path}: tensor {_short(name)} begins at byte {entry.offset} and {kind}, wanted "
                f"byte {at}; fetch the file again"
            )
        at += entry.n_bytes
    if at != file_bytes:
        cause = "the file is cut off" if at > file_bytes else "there are bytes that no tensor owns"
        raise FormatError(
            f"{path}: tensors end at byte {at} of {file_bytes}: {cause}; fetch the file again"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
