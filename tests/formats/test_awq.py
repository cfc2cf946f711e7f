"""AWQ folders against a packer written from AutoAWQ's documented GEMM layout."""

import numpy as np
import pytest
from folders import write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import FormatError, UnsupportedError
from elute.formats import open_checkpoint
from elute.formats.awq import AwqFolder, unpack_nibbles
from elute.types import Affine, QuantizedMatrix

MODULE = "model.layers.0.self_attn.q_proj"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack_across(codes: np.ndarray) -> np.ndarray:
    """codes [R, N] -> i32 [R, N/8]: nibble i of a word holds output ORDER[i] of its eight."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint64)
    for word in range(packed.shape[1]):
        for nibble in range(8):
            column = codes[:, 8 * word + ORDER[nibble]].astype(np.uint64)
            packed[:, word] |= column << np.uint64(4 * nibble)
    return packed.astype(np.uint32).view(np.int32)


def awq_tensors(rng, n, k, group_size, *, zero=None):
    group_size = k if group_size == -1 else group_size
    codes = rng.integers(0, 16, (k, n))
    zeros = rng.integers(0, 16, (k // group_size, n))
    if zero is not None:
        zeros[:] = zero
    scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    groups = np.arange(k) // group_size
    weights = scales[groups].astype(np.float32) * (codes - zeros[groups]).astype(np.float32)
    tensors = {
        f"{MODULE}.qweight": pack_across(codes),
        f"{MODULE}.qzeros": pack_across(zeros),
        f"{MODULE}.scales": scales,
        f"{MODULE}.bias": rng.standard_normal(n).astype(np.float16),
        "model.norm.weight": np.ones(4, np.float16),
    }
    return tensors, weights.T, codes


def settings_of(**more):
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", **more}


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_weights_equal_those_of_a_documented_packer(tmp_path, group_size):
    rng = np.random.default_rng(7)
    tensors, want, codes = awq_tensors(rng, 24, 128, group_size)
    path = write_folder(tmp_path, tensors, quantization=settings_of(group_size=group_size))
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, AwqFolder)
    matrix = checkpoint.read(f"{MODULE}.weight")
    assert isinstance(matrix, QuantizedMatrix)
    assert checkpoint.shape(f"{MODULE}.weight") == (24, 128)
    assert matrix.affine is Affine.ZERO
    assert matrix.columns is None
    np.testing.assert_array_equal(matrix.codes, codes.T)
    np.testing.assert_array_equal(matrix.dequantize(), want)
    assert set(checkpoint.names()) == {
        f"{MODULE}.weight",
        f"{MODULE}.bias",
        "model.norm.weight",
    }


def test_equal_zeros_are_symmetric(tmp_path):
    tensors, want, _ = awq_tensors(np.random.default_rng(1), 16, 64, 32, zero=8)
    matrix = open_checkpoint(
        write_folder(tmp_path, tensors, quantization=settings_of(version="GEMM"))
    ).read(f"{MODULE}.weight")
    assert (matrix.affine, matrix.zero) == (Affine.SYMMETRIC, 8)
    np.testing.assert_array_equal(matrix.dequantize(), want)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"version": "gemv"}, UnsupportedError, "AWQ version 'gemv', wanted gemm"),
        ({"version": 3}, UnsupportedError, "AWQ version 3"),
        ({"backend": "llm-awq"}, UnsupportedError, "'llm-awq'"),
        ({"bits": 8}, UnsupportedError, "AWQ of 8 bits, wanted 4"),
        ({"group_size": -2}, FormatError, "group_size -2"),
        ({"bits": None}, FormatError, "bits None, wanted an integer"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, more, error, message):
    tensors, _, _ = awq_tensors(np.random.default_rng(0), 16, 64, 32)
    with pytest.raises(error, match=message):
        open_checkpoint(write_folder(tmp_path, tensors, quantization=settings_of(**more)))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("qzeros", lambda a: a[:1], r"qzeros has shape \[1, 2\], wanted \[2, 2\]"),
        ("scales", lambda a: a[:, :-1], "wanted floats"),
        ("scales", lambda a: a.astype(np.int32), "scales are int32"),
        ("qweight", lambda a: a[:-1], "K=63 is not a multiple of group_size=32"),
        ("qweight", lambda a: a.astype(np.float32), "wanted i32 words"),
    ],
)
def test_damaged_modules_are_one_sentence(tmp_path, name, edit, message):
    tensors, _, _ = awq_tensors(np.random.default_rng(0), 16, 64, 32)
    tensors[f"{MODULE}.{name}"] = edit(tensors[f"{MODULE}.{name}"])
    path = write_folder(tmp_path, tensors, quantization=settings_of())
    with pytest.raises(FormatError, match=message):
        open_checkpoint(path).read(f"{MODULE}.weight")


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), words=st.integers(1, 4), seed=st.integers(0, 99))
def test_unpack_nibbles_inverts_the_packer(rows, words, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (rows, 8 * words))
    np.testing.assert_array_equal(unpack_nibbles(pack_across(codes).view(np.uint32)), codes.T)
