"""The header of a GGUF file, every count, length and offset checked. Knows no architecture.

The gguf library's own reader trusts the header, so it is not used: here a hostile file can neither
allocate more than a small multiple of its own header, nor loop, nor point outside itself.

    magic "GGUF" | version u32 | n_tensors u64 | n_keys u64
    n_keys    x  key string | value type u32 | value
    n_tensors x  name string | n_dims u32 | dims u64[n_dims] | type u32 | offset u64
    padding to `general.alignment` | tensor data, offsets counted from here; dims innermost first

A string is length u64 + UTF-8 bytes; an array is element type u32 | count u64 | elements.
All little-endian.
Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from elute.errors import FormatError, UnsupportedError
from elute.types import U8

VERSIONS = (2, 3)  # 3 differs from 2 only in allowing big-endian files
MAX_ENTRIES = 1 << 17  # keys, and tensors; the largest models have about 2,000 tensors in a file
MAX_ELEMENTS = 1 << 22  # of all arrays together; a vocabulary of 262,144 needs about 1,000,000
MAX_STRING_BYTES = 1 << 26  # a tokenizer.json kept as one key is about 30 MB
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ALIGNMENT = 1 << 20
MIN_KEY_BYTES = 8 + 4 + 1  # an empty key with a one-byte value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name with one dimension
AGAIN = "download or convert the file again"

_SCALARS: Mapping[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape in numpy order (rows first), offset from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class GgufHeader:
    """metadata holds str, int, float, bool and lists of them; tensors are in file order."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def show(value: str) -> str:
    """A name from a file, safe and short enough for one line."""
    return repr(value if len(value) <= 80 else value[:77] + "...")


def read_header(path: Path, data: U8, *, file_bytes: int | None = None) -> GgufHeader:
    """data: the bytes of the whole file, mapped; or its beginning, of a file of file_bytes.

    Raises HeaderCut where the header goes on behind such a beginning, FormatError where the bytes
    break the format, UnsupportedError for versions, byte orders
    and tensor types that elute or the gguf library does not know.
    """
    file_bytes = data.size if file_bytes is None else file_bytes
    cursor = _Cursor(path, data, file_bytes)
    version = cursor.version()
    n_tensors = cursor.count("tensors", MIN_TENSOR_BYTES)
    n_keys = cursor.count("keys", MIN_KEY_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        at = cursor.at
        key = cursor.string("key")
        if key in metadata:
            raise cursor.error(at, f"found key {show(key)} twice, wanted each once")
        metadata[key] = cursor.value(show(key))
    alignment = _alignment(path, metadata)
    tensors: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        at = cursor.at
        info = cursor.tensor()
        if info.name in tensors:
            raise cursor.error(at, f"found tensor {show(info.name)} twice, wanted each once")
        tensors[info.name] = info
    data_start = -(-cursor.at // alignment) * alignment
    return GgufHeader(
        path, version, metadata, _placed(path, tensors, data_start, alignment, file_bytes)
    )


class HeaderCut(FormatError):
    """More of the file has to be there."""


class _Cursor:
    """Reads forward through the header, never past the end of the file."""

    def __init__(self, path: Path, data: U8, file_bytes: int) -> None:
        self.path = path
        self.at = 0
        self._view = data.data
        self._here = data.size
        self._end = file_bytes
        self._elements_left = MAX_ELEMENTS

    def error(self, at: int, what: str, advice: str = AGAIN) -> FormatError:
        return FormatError(f"{self.path}: offset {at}: {what}; {advice}")

    def _need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self._end - self.at:
            raise self.error(
                self.at,
                f"found {self._end - self.at} bytes to the end, wanted {n_bytes} for {what}",
            )
        if n_bytes > self._here - self.at:
            raise HeaderCut(f"{self.path}: {what} lies behind the first {self._here} bytes")

    def _u32(self, what: str) -> int:
        self._need(4, what)
        (value,) = struct.unpack_from("<I", self._view, self.at)
        self.at += 4
        return int(value)

    def _u64(self, what: str) -> int:
        self._need(8, what)
        (value,) = struct.unpack_from("<Q", self._view, self.at)
        self.at += 8
        return int(value)

    def version(self) -> int:
        magic = self._u32("the magic")
        if magic != GGUF_MAGIC:
            found = magic.to_bytes(4, "little")
            raise self.error(0, f"found magic {found!r}, wanted b'GGUF'", "give a GGUF file")
        version = self._u32("the version")
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(
                f"{self.path}: offset 4: found a big-endian file, wanted little-endian; "
                "convert the model again without --bigendian"
            )
        if version not in VERSIONS:
            raise UnsupportedError(
                f"{self.path}: offset 4: found GGUF version {version}, wanted 2 or 3; "
                "convert the model with a current llama.cpp"
            )
        return version

    def count(self, what: str, min_bytes: int) -> int:
        at = self.at
        n = self._u64(f"the number of {what}")
        limit = min(MAX_ENTRIES, (self._end - self.at) // min_bytes)
        if n > limit:
            raise self.error(at, f"found {n} {what}, wanted at most {limit} in {self._end} bytes")
        return n

    def string(self, what: str) -> str:
        at = self.at
        n = self._u64(f"the length of a {what}")
        if n > MAX_STRING_BYTES:
            raise self.error(at, f"found a {what} of {n} bytes, wanted at most {MAX_STRING_BYTES}")
        self._need(n, f"a {what}")
        try:
            text = str(self._view[self.at : self.at + n], "utf-8")
        except UnicodeDecodeError as error:
            bad = self._view[self.at + error.start]
            raise self.error(
                self.at + error.start, f"found byte 0x{bad:02x} in a {what}, wanted UTF-8"
            ) from None
        self.at += n
        return text

    def value(self, key: str) -> Any:
        return self._typed(self._value_type(key), key, depth=0)

    def _value_type(self, key: str) -> GGUFValueType:
        at = self.at
        found = self._u32(f"the value type of {key}")
        try:
            return GGUFValueType(found)
        except ValueError:
            raise self.error(at, f"found value type {found} in {key}, wanted 0 to 12") from None

    def _typed(self, kind: GGUFValueType, key: str, *, depth: int) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string(f"string of {key}")
        if kind is GGUFValueType.ARRAY:
            return self._array(key, depth=depth + 1)
        return self._scalars(kind, 1, key)[0]

    def _array(self, key: str, *, depth: int) -> list[Any]:
        at = self.at
        if depth > MAX_ARRAY_DEPTH:
            raise self.error(
                at, f"found {depth} nested arrays in {key}, wanted at most {MAX_ARRAY_DEPTH}"
            )
        kind = self._value_type(key)
        at = self.at
        n = self._u64(f"the length of array {key}")
        min_bytes = {GGUFValueType.STRING: 8, GGUFValueType.ARRAY: 12}.get(kind)
        if min_bytes is None:
            min_bytes = np.dtype(_SCALARS[kind]).itemsize
        limit = min(self._elements_left, (self._end - self.at) // min_bytes)
        if n > limit:
            raise self.error(at, f"found {n} elements in array {key}, wanted at most {limit}")
        self._elements_left -= n
        if kind is GGUFValueType.STRING:
            what = f"string of {key}"
            return [self.string(what) for _ in range(n)]
        if kind is GGUFValueType.ARRAY:
            return [self._array(key, depth=depth + 1) for _ in range(n)]
        return self._scalars(kind, n, key)

    def _scalars(self, kind: GGUFValueType, n: int, key: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        self._need(n * dtype.itemsize, key)
        values = np.frombuffer(self._view, dtype, n, self.at)
        if kind is GGUFValueType.BOOL:
            if n and values.max() > 1:
                bad = int(np.argmax(values > 1))
                raise self.error(self.at + bad, f"found bool {values[bad]} in {key}, wanted 0 or 1")
            values = values.astype(np.bool_)
        self.at += n * dtype.itemsize
        listed: list[Any] = values.tolist()
        return listed

    def tensor(self) -> TensorInfo:
        """-> the tensor with its offset still counted from the start of the data."""
        name = self.string("tensor name")
        at = self.at
        n_dims = self._u32(f"the number of dimensions of {show(name)}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.error(
                at, f"found {n_dims} dimensions in {show(name)}, wanted 1 to {MAX_DIMS}"
            )
        at = self.at
        dims = [self._u64(f"the dimensions of {show(name)}") for _ in range(n_dims)]
        if 0 in dims:
            raise self.error(at, f"found dimensions {dims} in {show(name)}, wanted each at least 1")
        type_at = self.at
        found = self._u32(f"the type of {show(name)}")
        try:
            tensor_type = GGMLQuantizationType(found)
            block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        except (ValueError, KeyError):
            raise UnsupportedError(
                f"{self.path}: offset {type_at}: found tensor type {found} in {show(name)}, wanted "
                "one that the gguf library knows; update gguf, or quantize to another type"
            ) from None
        if dims[0] % block:
            raise self.error(
                at,
                f"found rows of {dims[0]} in {show(name)}, wanted a multiple of the {block} "
                f"weights of a {tensor_type.name} block",
            )
        offset = self._u64(f"the offset of {show(name)}")
        n_bytes = math.prod(dims) // block * block_bytes
        return TensorInfo(name, tuple(reversed(dims)), tensor_type, offset, n_bytes)


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if (
        isinstance(found, bool)
        or not isinstance(found, int)
        or not 8 <= found <= MAX_ALIGNMENT
        or found & (found - 1)
    ):
        raise FormatError(
            f"{path}: key 'general.alignment': found {str(found)[:80]}, wanted a power of two from "
            f"8 to {MAX_ALIGNMENT}; {AGAIN}"
        )
    return found


def _placed(
    path: Path, tensors: Mapping[str, TensorInfo], data_start: int, alignment: int, file_bytes: int
) -> dict[str, TensorInfo]:
    """-> tensors with offsets from the file's start: aligned, inside it, not overlapping."""
    placed: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if info.offset % alignment:
            raise FormatError(
                f"{path}: tensor {show(name)}: found offset {info.offset}, wanted a multiple of "
                f"{alignment}; {AGAIN}"
            )
        start = data_start + info.offset
        if start + info.n_bytes > file_bytes:
            raise FormatError(
                f"{path}: tensor {show(name)}: found its end at byte {start + info.n_bytes}, "
                f"wanted it inside the {file_bytes} bytes of the file; {AGAIN}"
            )
        placed[name] = TensorInfo(name, info.shape, info.type, start, info.n_bytes)
    in_order = sorted(placed.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(in_order):
        if before.offset + before.n_bytes > after.offset:
            raise FormatError(
                f"{path}: tensor {show(after.name)}: found its start at byte {after.offset} inside "
                f"{show(before.name)}, wanted at least {before.offset + before.n_bytes}; {AGAIN}"
            )
    return placed
