"""GPTQ folders against a packer written from the layout that AutoGPTQ and GPTQModel document."""

import logging

import numpy as np
import pytest
from folders import write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import FormatError, UnsupportedError
from elute.formats import open_checkpoint
from elute.formats.gptq import GptqFolder, unpack_words
from elute.types import Affine, QuantizedMatrix

MODULE = "model.layers.0.mlp.up_proj"


def pack_down(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [K, N] -> i32 [K*bits/32, N], word by word as the original packers do it."""
    k, n = codes.shape
    codes = codes.astype(np.uint64)
    packed = np.zeros((k * bits // 32, n), np.uint64)
    if bits != 3:
        per_word = 32 // bits
        for channel in range(k):
            packed[channel // per_word] |= codes[channel] << np.uint64(bits * (channel % per_word))
        return packed.astype(np.uint32).view(np.int32)
    channel, row = 0, 0
    while row < packed.shape[0]:  # 10 codes, two thirds of one; 10, one third of one; 10
        for j in range(10):
            packed[row] |= codes[channel + j] << np.uint64(3 * j)
        packed[row] |= (codes[channel + 10] & np.uint64(3)) << np.uint64(30)
        packed[row + 1] |= codes[channel + 10] >> np.uint64(2)
        for j in range(10):
            packed[row + 1] |= codes[channel + 11 + j] << np.uint64(3 * j + 1)
        packed[row + 1] |= (codes[channel + 21] & np.uint64(1)) << np.uint64(31)
        packed[row + 2] |= codes[channel + 21] >> np.uint64(1)
        for j in range(10):
            packed[row + 2] |= codes[channel + 22 + j] << np.uint64(3 * j + 2)
        channel, row = channel + 32, row + 3
    return packed.astype(np.uint32).view(np.int32)


def ones_of(bits: int) -> np.uint32:
    return np.uint32(sum(1 << at for at in range(0, 32, bits)))


def gptq_tensors(
    rng, n, k, bits, group_size, *, v1=True, symmetric=False, g_idx="plain", zeros=None
):
    """-> tensors of one module, the weights that they mean f32 [N, K], codes [K, N]."""
    group_size = k if group_size == -1 else group_size
    n_groups = k // group_size
    codes = rng.integers(0, 1 << bits, (k, n))
    if zeros is None:
        zeros = rng.integers(1, 1 << bits, (n_groups, n))
    if symmetric:
        zeros = np.full((n_groups, n), 1 << (bits - 1))
    scales = rng.uniform(0.01, 0.1, (n_groups, n)).astype(np.float16)
    groups = np.arange(k) // group_size
    if g_idx == "act_order":
        groups = rng.permutation(groups)
    elif g_idx == "whole_groups":
        groups = rng.permutation(n_groups)[groups]
    if v1 and bits == 3:
        qzeros = pack_down(((zeros - 1) & 7).T, bits).T
    elif v1:
        qzeros = (pack_down(zeros.T, bits).view(np.uint32) - ones_of(bits)).view(np.int32).T
    else:
        qzeros = pack_down(zeros.T, bits).T
    weights = scales[groups].astype(np.float32) * (codes - zeros[groups]).astype(np.float32)
    tensors = {
        f"{MODULE}.qweight": pack_down(codes, bits),
        f"{MODULE}.qzeros": qzeros,
        f"{MODULE}.scales": scales,
        "model.norm.weight": np.ones(4, np.float16),
    }
    if g_idx != "absent":
        tensors[f"{MODULE}.g_idx"] = groups.astype(np.int32)
    return tensors, weights.T, codes


def settings_of(bits, group_size, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **more}


def read_module(path, tensors, quantization) -> QuantizedMatrix:
    checkpoint = open_checkpoint(write_folder(path, tensors, quantization=quantization))
    assert isinstance(checkpoint, GptqFolder)
    matrix = checkpoint.read(f"{MODULE}.weight")
    assert isinstance(matrix, QuantizedMatrix)
    assert checkpoint.shape(f"{MODULE}.weight") == matrix.shape
    return matrix


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("g_idx", ["plain", "absent", "act_order", "whole_groups"])
def test_weights_equal_those_of_a_documented_packer(
    tmp_path, bits, group_size, checkpoint_format, g_idx
):
    rng = np.random.default_rng(bits * 1000 + group_size)
    tensors, want, codes = gptq_tensors(
        rng, 32, 128, bits, group_size, v1=checkpoint_format == "gptq", g_idx=g_idx
    )
    matrix = read_module(
        tmp_path / "m",
        tensors,
        settings_of(
            bits,
            group_size,
            checkpoint_format=checkpoint_format,
            sym=False,
            desc_act=g_idx == "act_order",
        ),
    )
    np.testing.assert_array_equal(matrix.dequantize(), want)
    assert matrix.affine is Affine.ZERO
    assert (matrix.columns is not None) == (g_idx == "act_order" and group_size != -1)
    columns = np.arange(128) if matrix.columns is None else matrix.columns
    np.testing.assert_array_equal(matrix.codes, codes.T[:, columns])  # no code is changed


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equal_zeros_are_symmetric(tmp_path, bits):
    rng = np.random.default_rng(bits)
    tensors, want, _ = gptq_tensors(rng, 32, 64, bits, 32, symmetric=True)
    matrix = read_module(tmp_path, tensors, settings_of(bits, 32, sym=True))
    assert matrix.affine is Affine.SYMMETRIC
    assert matrix.zero == 1 << (bits - 1)
    assert matrix.offsets is None
    np.testing.assert_array_equal(matrix.dequantize(), want)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_zero_survives_the_borrow_of_version_1(tmp_path, bits):
    rng = np.random.default_rng(bits)
    zeros = rng.integers(0, 1 << bits, (2, 32))
    zeros[:, 0] = 0  # the word-wide subtraction borrows from the next code
    zeros[0, 31] = 0
    tensors, want, _ = gptq_tensors(rng, 32, 64, bits, 32, zeros=zeros)
    matrix = read_module(tmp_path, tensors, settings_of(bits, 32, sym=False))
    np.testing.assert_array_equal(matrix.dequantize(), want)


def test_a_zero_of_zero_wraps_in_3_bits(tmp_path):
    rng = np.random.default_rng(3)
    zeros = rng.integers(0, 8, (2, 32))
    tensors, want, _ = gptq_tensors(rng, 32, 64, 3, 32, zeros=zeros)
    matrix = read_module(tmp_path, tensors, settings_of(3, 32, sym=False))
    np.testing.assert_array_equal(matrix.dequantize(), want)


def test_version_2_zeros_under_the_name_of_version_1_are_noticed(tmp_path, caplog):
    rng = np.random.default_rng(1)
    tensors, want, _ = gptq_tensors(rng, 32, 64, 4, 32, v1=False, symmetric=True)
    with caplog.at_level(logging.WARNING):
        matrix = read_module(tmp_path, tensors, settings_of(4, 32, sym=True))
    assert "as in gptq_v2" in caplog.text
    np.testing.assert_array_equal(matrix.dequantize(), want)


def test_names_show_weights_and_hide_packed_tensors(tmp_path):
    tensors, _, _ = gptq_tensors(np.random.default_rng(0), 32, 64, 4, 32)
    tensors[f"{MODULE}.bias"] = np.arange(32, dtype=np.float16)
    path = write_folder(tmp_path, tensors, quantization=settings_of(4, 32))
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.names()) == {f"{MODULE}.weight", f"{MODULE}.bias", "model.norm.weight"}
    np.testing.assert_array_equal(checkpoint.read(f"{MODULE}.bias"), np.arange(32))
    assert checkpoint.shape("model.norm.weight") == (4,)
    assert checkpoint.source == str(path)


def test_overridden_modules_are_read_from_their_shapes(tmp_path):
    tensors, want, _ = gptq_tensors(np.random.default_rng(0), 32, 64, 8, 64)
    overrides = {r"+:.*up_proj": {"bits": 8, "group_size": 64}}
    matrix = read_module(tmp_path, tensors, settings_of(4, 32, dynamic=overrides))
    assert (matrix.bits, matrix.group_size) == (8, 64)
    np.testing.assert_array_equal(matrix.dequantize(), want)


def test_settings_beside_config_json_are_found(tmp_path):
    tensors, want, _ = gptq_tensors(np.random.default_rng(0), 32, 64, 4, 32)
    write_folder(tmp_path, tensors)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "sym": false}')
    matrix = open_checkpoint(tmp_path).read(f"{MODULE}.weight")
    np.testing.assert_array_equal(matrix.dequantize(), want)


def test_g_idx_of_zeros_means_channels_in_order(tmp_path):
    tensors, want, _ = gptq_tensors(np.random.default_rng(0), 32, 64, 4, 32)
    tensors[f"{MODULE}.g_idx"][:] = 0
    matrix = read_module(tmp_path, tensors, settings_of(4, 32, desc_act=False))
    np.testing.assert_array_equal(matrix.dequantize(), want)


@pytest.mark.parametrize(
    ("quantization", "error", "message"),
    [
        (settings_of(5, 32), UnsupportedError, "GPTQ of 5 bits"),
        (settings_of("4", 32), FormatError, "bits '4', wanted an integer"),
        (settings_of(4, None), FormatError, "group_size None, wanted an integer"),
        (settings_of(4, 0), FormatError, "group_size 0, wanted -1"),
        (settings_of(4, 32, checkpoint_format="marlin"), UnsupportedError, "'marlin'"),
        (settings_of(4, 32, is_marlin_format=True), UnsupportedError, "'marlin'"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, quantization, error, message):
    tensors, _, _ = gptq_tensors(np.random.default_rng(0), 32, 64, 4, 32)
    with pytest.raises(error, match=message):
        open_checkpoint(write_folder(tmp_path, tensors, quantization=quantization))


def without(name):
    return lambda tensors: tensors.pop(f"{MODULE}.{name}")


def change(name, edit):
    def apply(tensors):
        tensors[f"{MODULE}.{name}"] = edit(tensors[f"{MODULE}.{name}"])

    return apply


def set_first(value):
    def edit(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("qzeros"), "has a qweight and no qzeros"),
        (without("scales"), "has a qweight and no scales"),
        (without("g_idx"), "desc_act is true, and g_idx is missing"),
        (change("qweight", np.ravel), "wanted two sizes"),
        (change("qweight", lambda a: a.astype(np.int64)), "wanted i32 words"),
        (change("qweight", lambda a: a[:-1]), "qweight has 7 rows for the 64 channels"),
        (change("qzeros", lambda a: a[:, :-1]), r"qzeros has shape \[2, 3\], wanted \[2, 4\]"),
        (change("qzeros", lambda a: a[:1]), "found 1 groups for K=64"),
        (change("scales", lambda a: a[:1]), r"scales are float16 \[1, 32\], wanted floats"),
        (change("scales", set_first(np.nan)), r"found nan at \[0, 0\]"),
        (change("scales", set_first(np.inf)), r"found inf at \[0, 0\]"),
        (
            change("scales", lambda a: a.astype(np.float32) * 1e9),
            "wanted finite values below 65504",
        ),
        (change("g_idx", set_first(7)), "does not give each of the 2 groups 32 channels"),
        (change("g_idx", set_first(-1)), "does not give each of the 2 groups 32 channels"),
        (change("g_idx", set_first(1)), "does not give each of the 2 groups 32 channels"),
        (change("g_idx", lambda a: a.astype(np.float32)), "g_idx is float32"),
    ],
)
def test_damaged_modules_are_one_sentence(tmp_path, damage, message):
    tensors, _, _ = gptq_tensors(np.random.default_rng(0), 32, 64, 4, 32)
    damage(tensors)
    path = write_folder(tmp_path, tensors, quantization=settings_of(4, 32, desc_act=True))
    with pytest.raises(FormatError, match=message) as caught:
        open_checkpoint(path).read(f"{MODULE}.weight")
    assert "\n" not in str(caught.value)


def test_a_quantized_config_without_packed_tensors_is_refused(tmp_path):
    path = write_folder(tmp_path, {"w": np.ones(2)}, quantization=settings_of(4, 32))
    with pytest.raises(FormatError, match=r"no tensor ends in \.qweight"):
        open_checkpoint(path)


def test_packed_tensors_without_a_quantized_config_are_refused(tmp_path):
    tensors, _, _ = gptq_tensors(np.random.default_rng(0), 32, 64, 4, 32)
    with pytest.raises(FormatError, match="no quantization_config"):
        open_checkpoint(write_folder(tmp_path, tensors))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    n=st.integers(1, 9),
    runs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_unpack_words_inverts_the_packer(bits, n, runs, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (32 * runs, n))
    words = pack_down(codes, bits).view(np.uint32)
    np.testing.assert_array_equal(unpack_words(words, bits), codes.T)
