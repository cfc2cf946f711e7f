"""Any damage to a GGUF file either leaves it readable or gives an EluteError, at once."""

from __future__ import annotations

import contextlib
import logging
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import EluteError
from elute.formats.gguf import open_gguf
from elute.formats.gguf_header import read_header

HOSTILE = (0, 1, 2, 31, 2**16, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
LIMIT_S = 1.0
HEADER_BYTES = 2496  # of the tiny file


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    rows = {"attn_q": 64, "attn_k": 32}
    raw = {
        f"blk.0.{stem}.weight": (np.zeros((n, 36), np.uint8), T.IQ4_NL) for stem, n in rows.items()
    }
    types = {"blk.0.ffn_up.weight": T.Q4_1, "blk.1.attn_q.weight": T.Q8_0}
    path = tmp_path_factory.mktemp("fuzz") / "valid.gguf"
    keys = {
        "llama.attention.sliding_window": 64,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
    }
    content = write_gguf(path, types=types, raw=raw, keys=keys).read_bytes()
    first = min(
        info.offset for info in read_header(path, np.fromfile(path, np.uint8)).tensors.values()
    )
    assert first == HEADER_BYTES
    check(path, content)
    return content


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    start = time.perf_counter()
    with contextlib.suppress(EluteError):
        checkpoint = open_gguf(path)
        for name in checkpoint.names():
            checkpoint.read(name)
    assert time.perf_counter() - start < LIMIT_S


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("elute").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.gguf"


def positions(end: int) -> st.SearchStrategy[int]:
    return st.integers(0, end)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(positions(HEADER_BYTES - 1), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits(valid: bytes, target: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(valid)
    for at, bit in flips:
        content[at] ^= 1 << bit
    check(target, bytes(content))


@settings(max_examples=200, deadline=None)
@given(positions(HEADER_BYTES - 1), st.sampled_from(HOSTILE), st.sampled_from(["<I", "<Q"]))
def test_hostile_numbers(valid: bytes, target: Path, at: int, value: int, form: str) -> None:
    content = bytearray(valid)
    struct.pack_into(form, content, at, value & (2**32 - 1 if form == "<I" else HOSTILE[-1]))
    check(target, bytes(content))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cut_and_inserted_bytes(valid: bytes, target: Path, data: st.DataObject) -> None:
    at = data.draw(positions(len(valid)))
    inserted = data.draw(st.binary(max_size=40))
    dropped = data.draw(st.integers(0, 40))
    rest = valid[at + dropped :] if data.draw(st.booleans()) else b""
    check(target, valid[:at] + inserted + rest)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=20))
def test_damaged_tensor_data(valid: bytes, target: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(valid)
    for at, value in changes:
        content[HEADER_BYTES + at % (len(content) - HEADER_BYTES)] = value
    check(target, bytes(content))
