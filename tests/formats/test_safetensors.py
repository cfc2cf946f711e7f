"""The safetensors reader against the reference library, and every way a header can lie."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from elute.errors import EluteError, FormatError, UnsupportedError
from elute.formats.safetensors import SafetensorsFile, parse_json


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_equal_what_the_library_wrote(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "f64": rng.standard_normal((2, 3)),
        "f32": rng.standard_normal((5,)).astype(np.float32),
        "f16": rng.standard_normal((3, 3)).astype(np.float16),
        "i64": rng.integers(-9, 9, (2, 2)),
        "i32": rng.integers(-9, 9, (4,)).astype(np.int32),
        "i16": rng.integers(-9, 9, (4,)).astype(np.int16),
        "i8": rng.integers(-9, 9, (7,)).astype(np.int8),
        "u8": rng.integers(0, 9, (3, 1, 2)).astype(np.uint8),
        "bool": np.array([True, False, True]),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "bf16": rng.standard_normal((4, 4)).astype(ml_dtypes.bfloat16),
    }
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "np"})
    file = SafetensorsFile.open(path)
    assert set(file.entries) == set(tensors)
    assert file.metadata == {"format": "np"}
    raw = path.read_bytes()
    for name, want in tensors.items():
        got = file.tensor(name)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)
        assert raw[file.offset(name) :][: want.nbytes] == want.tobytes()
        if want.size:
            assert not got.flags.writeable


def test_a_padded_header_and_unaligned_data_are_read(tmp_path):
    text = json.dumps({"w": entry()}).encode()
    text += b" " * (8 - len(text) % 8 + 1)  # odd start: the view is unaligned
    path = write(tmp_path / "m.safetensors", text, struct.pack("<ff", 1.5, -2.0))
    np.testing.assert_array_equal(SafetensorsFile.open(path).tensor("w"), [1.5, -2.0])


DEEP = b"[" * 200_000 + b"]" * 200_000

BAD_HEADERS = {
    "not JSON": (b"{nope", b"", "invalid JSON at character 1"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not UTF-8"),
    "UTF-16": ("{}".encode("utf-16-le"), b"", "invalid JSON"),
    "not an object": (b"[]", b"", "a list as header"),
    "nested too deeply": (b'{"a": ' + DEEP + b"}", b"", "nested too deeply"),
    "endless integer": (b'{"a": ' + b"9" * 5000 + b"}", b"", "number that cannot be read"),
    "NaN": (b'{"a": NaN}', b"", "found NaN"),
    "duplicate key": (b'{"a": {}, "a": {}}', b"", "the key 'a' twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "not an object of strings"),
    "tensor is a list": ({"w": []}, b"", "wanted an object of exactly"),
    "missing field": ({"w": {"dtype": "F32", "shape": []}}, b"", "wanted an object of exactly"),
    "extra field": ({"w": {**entry(), "x": 1}}, bytes(8), "wanted an object of exactly"),
    "unknown dtype": ({"w": entry("F33")}, bytes(8), "found dtype 'F33'"),
    "dtype not a string": ({"w": entry(["F32"])}, bytes(8), "found dtype"),
    "negative size": ({"w": entry(shape=(-2,))}, bytes(8), "found shape"),
    "boolean size": ({"w": entry(shape=(True, 2))}, bytes(8), "found shape"),
    "float size": ({"w": entry(shape=(2.0,))}, bytes(8), "found shape"),
    "too many dimensions": ({"w": entry(shape=(1,) * 9, offsets=(0, 4))}, bytes(4), "9 dimensions"),
    "size overflows": (
        {"w": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))},
        b"",
        "overflows 64 bits",
    ),
    "huge count": ({"w": entry(shape=(10**30,))}, bytes(8), "overflows 64 bits"),
    "three offsets": ({"w": entry(offsets=(0, 4, 8))}, bytes(8), "wanted a list of begin and end"),
    "negative offset": ({"w": entry(offsets=(-8, 0))}, bytes(8), "wanted a list of begin and end"),
    "reversed offsets": ({"w": entry(offsets=(8, 0))}, bytes(8), "wanted a range of 8 bytes"),
    "range too short": ({"w": entry(offsets=(0, 4))}, bytes(4), "wanted a range of 8 bytes"),
    "overlap": (
        {"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))},
        bytes(12),
        "overlaps the tensor before it",
    ),
    "hole": (
        {"a": entry(offsets=(0, 8)), "b": entry(offsets=(12, 20))},
        bytes(20),
        "leaves a hole before it",
    ),
    "data cut off": ({"w": entry()}, bytes(7), "the file is cut off"),
    "data left over": ({"w": entry()}, bytes(9), "bytes that no tensor owns"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_one_sentence(tmp_path, case):
    header, data, message = BAD_HEADERS[case]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile.open(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "found 0 bytes"),
        (b"\x01\x00\x00", "found 3 bytes"),
        (struct.pack("<Q", 100_000_001), "header length of 100000001 bytes, wanted at most"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "wanted at most"),
        (struct.pack("<Q", 50) + b"{}", "header length of 50 bytes in a file of 10"),
    ],
)
def test_a_bad_length_is_one_sentence(tmp_path, raw, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=message):
        SafetensorsFile.open(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
def test_eight_bit_floats_are_refused_by_name(tmp_path, dtype):
    path = write(tmp_path / "f8.safetensors", {"w": entry(dtype, (8,))}, bytes(8))
    with pytest.raises(UnsupportedError, match=f"found dtype {dtype}"):
        SafetensorsFile.open(path)


def test_a_missing_file_and_a_missing_tensor_are_named(tmp_path):
    with pytest.raises(FormatError, match=r"none\.safetensors: cannot be read"):
        SafetensorsFile.open(tmp_path / "none.safetensors")
    path = write(tmp_path / "m.safetensors", {"w": entry()}, bytes(8))
    with pytest.raises(FormatError, match="no tensor 'v' among 1"):
        SafetensorsFile.open(path).tensor("v")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "X"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 3) | st.integers(0, 2**70), max_size=10) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON_VALUES,
    }
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def reads_or_refuses(path: Path) -> None:
    """A file either opens, and then every tensor reads, or raises an EluteError."""
    try:
        file = SafetensorsFile.open(path)
    except EluteError:
        return
    for name, found in file.entries.items():
        assert file.tensor(name).shape == found.shape


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=4), ENTRIES | JSON_VALUES, max_size=4),
    data=st.binary(max_size=64),
)
def test_any_json_header_reads_or_refuses(tmp_path, header, data):
    reads_or_refuses(write(tmp_path / "fuzz.safetensors", header, data))


@FUZZ
@given(raw=st.binary(max_size=120), length=st.none() | st.integers(0, 200))
def test_any_bytes_read_or_refuse(tmp_path, raw, length):
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(raw if length is None else struct.pack("<Q", length) + raw)
    reads_or_refuses(path)


@FUZZ
@given(data=st.data())
def test_a_flipped_or_cut_file_reads_or_refuses(tmp_path, data):
    good = tmp_path / "good.safetensors"
    if not good.exists():
        save_file({"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.int8)}, good)
    raw = bytearray(good.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw if data.draw(st.booleans()) else raw[:cut])
    reads_or_refuses(path)


def test_parse_json_accepts_plain_json():
    assert parse_json('{"a": [1, 2.5, null]}', where="x") == {"a": [1, 2.5, None]}
