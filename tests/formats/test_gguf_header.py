from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T

from elute.errors import FormatError, UnsupportedError
from elute.formats import gguf_header
from elute.formats.gguf_header import GgufHeader, read_header

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
HUGE = 2**64 - 1


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: bytes) -> bytes:
    return u64(len(text)) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def tensor(name: bytes, dims: tuple[int, ...] = (4,), kind: int = T.F32, offset: int = 0) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def file(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    data: int = 64,
    head: bytes | None = None,
) -> bytes:
    """head replaces magic, version and counts."""
    if head is None:
        head = b"GGUF" + u32(3) + u64(len(tensors)) + u64(len(keys))
    text = head + b"".join(keys) + b"".join(tensors)
    return text + bytes(-len(text) % 32) + bytes(data)


def read(content: bytes) -> GgufHeader:
    return read_header(Path("m.gguf"), np.frombuffer(content, np.uint8))


def test_every_value_type_is_read() -> None:
    values = {
        b"u8": (U8, b"\xff", 255),
        b"i8": (I8, b"\xff", -1),
        b"u16": (U16, b"\xff\xff", 65535),
        b"i16": (I16, b"\xff\xff", -1),
        b"u32": (U32, u32(7), 7),
        b"i32": (I32, b"\xff" * 4, -1),
        b"f32": (F32, struct.pack("<f", 0.5), 0.5),
        b"yes": (BOOL, b"\x01", True),
        b"text": (STRING, string("é".encode()), "é"),
        b"u64": (U64, u64(HUGE), HUGE),
        b"i64": (I64, b"\xff" * 8, -1),
        b"f64": (F64, struct.pack("<d", 0.1), 0.1),
        b"ints": (ARRAY, u32(I16) + u64(2) + b"\x01\x00\x02\x00", [1, 2]),
        b"bools": (ARRAY, u32(BOOL) + u64(2) + b"\x01\x00", [True, False]),
        b"texts": (ARRAY, u32(STRING) + u64(2) + string(b"a") + string(b""), ["a", ""]),
        b"none": (ARRAY, u32(F32) + u64(0), []),
        b"nested": (ARRAY, u32(ARRAY) + u64(2) + (u32(U8) + u64(1) + b"\x05") * 2, [[5], [5]]),
    }
    header = read(file(tuple(key(name, kind, raw) for name, (kind, raw, _) in values.items())))
    assert header.metadata == {name.decode(): value for name, (_, _, value) in values.items()}
    assert header.metadata["yes"] is True
    assert header.version == 3


def test_tensors_are_placed_in_the_file() -> None:
    content = file((), (tensor(b"a", (4, 2)), tensor(b"b", (32,), T.Q8_0, offset=32)), data=96)
    header = read(content)
    start = len(content) - 96
    a, b = header.tensors.values()
    assert (a.shape, a.type, a.offset, a.n_bytes) == ((2, 4), T.F32, start, 32)
    assert (b.shape, b.type, b.offset, b.n_bytes) == ((32,), T.Q8_0, start + 32, 34)


def test_alignment_key_moves_the_data() -> None:
    content = file((key(b"general.alignment", U32, u32(8)),), (tensor(b"a"),), data=16)
    assert read(content).tensors["a"].offset % 8 == 0


def arrays(depth: int) -> bytes:
    return (u32(ARRAY) + u64(1)) * depth + u32(U8) + u64(1) + b"\x00"


BAD = {
    "empty": (b"", "offset 0: found 0 bytes to the end, wanted 4 for the magic"),
    "magic": (file(head=b"GGML" + u32(3) + u64(0) * 2), "offset 0: found magic b'GGML'"),
    "short": (b"GGUF" + u32(3) + b"\x00" * 7, "offset 8: found 7 bytes to the end"),
    "many tensors": (file(head=b"GGUF" + u32(3) + u64(HUGE) + u64(0)), f"found {HUGE} tensors"),
    "many keys": (file(head=b"GGUF" + u32(3) + u64(0) + u64(2**40)), f"found {2**40} keys"),
    "count beyond the file": (
        file(head=b"GGUF" + u32(3) + u64(0) + u64(6)),
        "offset 16: found 6 keys, wanted at most 5",
    ),
    "key length": (file((u64(HUGE) + b"a" * 20,)), f"found a key of {HUGE} bytes"),
    "key beyond the file": (file((u64(2000) + b"a" * 20,)), "wanted 2000 for a key"),
    "key encoding": (file((key(b"a\xff", U8, b"\x00"),)), "offset 33: found byte 0xff in a key"),
    "key twice": (
        file((key(b"a", U8, b"\x00"), key(b"a", U8, b"\x01"))),
        "offset 38: found key 'a' twice",
    ),
    "value type": (file((key(b"a", 13, b"\x00"),)), "found value type 13 in 'a', wanted 0 to 12"),
    "value cut": (
        b"GGUF" + u32(3) + u64(0) + u64(1) + key(b"a", U64, b"\x00" * 3),
        "found 3 bytes to the end, wanted 8 for 'a'",
    ),
    "bool": (file((key(b"a", BOOL, b"\x02"),)), "found bool 2 in 'a', wanted 0 or 1"),
    "bools": (
        file((key(b"a", ARRAY, u32(BOOL) + u64(2) + b"\x01\x09"),)),
        "found bool 9 in 'a', wanted 0 or 1",
    ),
    "array length": (
        file((key(b"a", ARRAY, u32(U8) + u64(HUGE)),)),
        f"found {HUGE} elements in array 'a'",
    ),
    "string array length": (
        file((key(b"a", ARRAY, u32(STRING) + u64(2**32)),)),
        f"found {2**32} elements in array 'a'",
    ),
    "array element type": (
        file((key(b"a", ARRAY, u32(99) + u64(0)),)),
        "found value type 99 in 'a'",
    ),
    "array depth": (
        file((key(b"a", ARRAY, arrays(4)),)),
        "found 5 nested arrays in 'a', wanted at most 4",
    ),
    "alignment": (
        file((key(b"general.alignment", U32, u32(24)),)),
        "key 'general.alignment': found 24, wanted a power of two",
    ),
    "alignment 0": (file((key(b"general.alignment", U32, u32(0)),)), "found 0, wanted a power"),
    "alignment type": (
        file((key(b"general.alignment", STRING, string(b"32")),)),
        "found 32, wanted a power of two",
    ),
    "tensor twice": (file((), (tensor(b"a"), tensor(b"a", offset=32))), "found tensor 'a' twice"),
    "no dimensions": (file((), (tensor(b"a", ()),)), "found 0 dimensions in 'a', wanted 1 to 4"),
    "dimensions": (
        file((), (string(b"a") + u32(2**31),), data=128),
        f"found {2**31} dimensions in 'a'",
    ),
    "dimension 0": (file((), (tensor(b"a", (4, 0)),)), "found dimensions [4, 0] in 'a'"),
    "huge dimensions": (
        file((), (tensor(b"a", (2**40, 2**40, 2**40, 2**40)),)),
        "wanted it inside the",
    ),
    "ragged blocks": (
        file((), (tensor(b"a", (48,), T.Q4_0),)),
        "found rows of 48 in 'a', wanted a multiple of the 32 weights of a Q4_0 block",
    ),
    "offset alignment": (
        file((), (tensor(b"a", offset=8),)),
        "tensor 'a': found offset 8, wanted a multiple of 32",
    ),
    "offset beyond": (
        file((), (tensor(b"a", offset=64),)),
        "tensor 'a': found its end at byte 144, wanted it inside the 128 bytes of the file",
    ),
    "offset wraps": (
        file((), (tensor(b"a", offset=2**64 - 32),)),
        "wanted it inside the 128 bytes",
    ),
    "overlap": (
        file((), (tensor(b"a", (9,)), tensor(b"b", offset=32)), data=128),
        "tensor 'b': found its start at byte 128 inside 'a', wanted at least 132",
    ),
    "tensor cut": (
        b"GGUF" + u32(3) + u64(1) + u64(0) + string(b"a" * 20) + u32(2),
        "offset 56: found 0 bytes to the end, wanted 8 for the dimensions",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bytes_give_one_sentence(case: str) -> None:
    content, wanted = BAD[case]
    with pytest.raises(FormatError) as caught:
        read(content)
    message = str(caught.value)
    assert wanted in message
    assert message.startswith("m.gguf: ")
    assert "; " in message
    assert "\n" not in message


UNSUPPORTED = {
    "version 1": (file(head=b"GGUF" + u32(1) + u64(0) * 2), "found GGUF version 1, wanted 2 or 3"),
    "version 4": (file(head=b"GGUF" + u32(4) + u64(0) * 2), "found GGUF version 4"),
    "big-endian": (file(head=b"GGUF" + b"\0\0\0\3" + u64(0) * 2), "found a big-endian file"),
    "tensor type": (
        file((), (tensor(b"a", (4,), 36),)),
        "found tensor type 36 in 'a', wanted one that the gguf library knows",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_other_versions_and_types_are_unsupported(case: str) -> None:
    content, wanted = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError) as caught:
        read(content)
    assert wanted in str(caught.value)


def test_elements_of_all_arrays_share_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_ELEMENTS", 5)
    three = u32(U8) + u64(3) + b"\x00" * 3
    with pytest.raises(FormatError, match="found 3 elements in array 'b', wanted at most 2"):
        read(file((key(b"a", ARRAY, three), key(b"b", ARRAY, three))))


def test_hostile_names_stay_on_one_short_line() -> None:
    name = b"x\n\x1b[31m" * 50
    with pytest.raises(FormatError) as caught:
        read(file((key(name, BOOL, b"\x02"),)))
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 250


@pytest.mark.parametrize("at", range(0, 200, 7))
def test_a_file_cut_anywhere_is_refused(at: int) -> None:
    whole = file(
        (key(b"a", STRING, string(b"text")), key(b"b", ARRAY, u32(U16) + u64(4) + bytes(8))),
        (tensor(b"t", (4, 4)), tensor(b"u", (32,), T.Q8_0, offset=64)),
        data=98,
    )
    read(whole)
    with pytest.raises(FormatError):
        read(whole[: min(at, len(whole) - 1)])
