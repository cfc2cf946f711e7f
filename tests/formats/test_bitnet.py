"""BitNet folders against transformers.integrations.bitnet."""

import ml_dtypes
import numpy as np
import pytest
import torch
from folders import write_folder
from transformers.integrations import bitnet as oracle

from elute.errors import FormatError, UnsupportedError
from elute.formats import open_checkpoint
from elute.formats.bitnet import BitnetFolder, unpack_rows
from elute.types import Affine, QuantizedMatrix

MODULE = "model.layers.0.mlp.down_proj"
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def _eager():
    """transformers compiles its oracle functions; as plain Python they need no compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def ternary(rng, n, k):
    return rng.integers(-1, 2, (n, k)).astype(np.float32)


def packed_tensors(weights, scale, dtype=BF16):
    packed = oracle.pack_weights(torch.tensor(weights)).numpy()
    return {
        f"{MODULE}.weight": packed,
        f"{MODULE}.weight_scale": np.array([scale], dtype),
        "model.embed_tokens.weight": np.ones((4, 4), BF16),
    }


def settings_of(**more):
    return {"quant_method": "bitnet", **more}


def read_module(path, tensors, quantization) -> QuantizedMatrix:
    checkpoint = open_checkpoint(write_folder(path, tensors, quantization=quantization))
    assert isinstance(checkpoint, BitnetFolder)
    matrix = checkpoint.read(f"{MODULE}.weight")
    assert isinstance(matrix, QuantizedMatrix)
    assert checkpoint.shape(f"{MODULE}.weight") == matrix.shape
    assert (matrix.affine, matrix.bits, matrix.zero) == (Affine.SYMMETRIC, 2, 1)
    assert matrix.group_size == matrix.shape[1]
    assert f"{MODULE}.weight_scale" not in checkpoint.names()
    return matrix


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_packed_weights_give_the_outputs_of_transformers(tmp_path, linear_class):
    """Which way weight_scale works, settled by the layers themselves."""
    rng = np.random.default_rng(5)
    weights = ternary(rng, 24, 40)
    tensors = packed_tensors(weights, 1.75, np.float32)
    matrix = read_module(
        tmp_path, tensors, settings_of(linear_class=linear_class, quantization_mode="offline")
    )
    x = torch.tensor(rng.standard_normal((3, 40)).astype(np.float32))
    if linear_class == "bitlinear":
        layer = oracle.BitLinear(40, 24, bias=False, dtype=torch.float32)
        layer.weight = torch.tensor(tensors[f"{MODULE}.weight"])
    else:
        layer = oracle.AutoBitLinear(40, 24, bias=False, dtype=torch.float32)
        layer.weight = torch.nn.Parameter(torch.tensor(weights))
    layer.weight_scale = torch.tensor([1.75])
    want = layer(x).detach().numpy()
    # The layers round activations to int8; ours are checked with the same rounding.
    step = 127 / x.abs().max(dim=-1, keepdim=True).values
    rounded = ((x * step).round() / step).numpy()
    got = rounded @ matrix.dequantize().T
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_the_default_linear_class_divides(tmp_path):
    weights = ternary(np.random.default_rng(0), 8, 8)
    matrix = read_module(tmp_path, packed_tensors(weights, 4.0), settings_of())
    np.testing.assert_array_equal(matrix.dequantize(), weights / 4)


def test_unpacked_rows_equal_those_of_transformers():
    packed = np.random.default_rng(2).integers(0, 256, (6, 10)).astype(np.uint8)
    want = oracle.unpack_weights(torch.tensor(packed), torch.float32).numpy()
    np.testing.assert_array_equal(unpack_rows(packed).astype(np.float32) - 1, want)


def test_spelled_ternary_weights_are_read(tmp_path):
    weights = ternary(np.random.default_rng(1), 6, 8)
    tensors = packed_tensors(np.ones((8, 8), np.float32), 0.5)
    tensors[f"{MODULE}.weight"] = weights.astype(BF16)
    matrix = read_module(
        tmp_path, tensors, settings_of(linear_class="autobitlinear", quantization_mode="offline")
    )
    np.testing.assert_array_equal(matrix.dequantize(), weights / 2)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
def test_online_weights_equal_those_of_transformers(tmp_path, dtype):
    rng = np.random.default_rng(9)
    master = (rng.standard_normal((32, 48)) * 0.02).astype(dtype)
    quantization = settings_of(linear_class="autobitlinear", quantization_mode="online")
    tensors = {
        f"{MODULE}.weight": master,
        "model.embed_tokens.weight": master,
        "lm_head.weight": master,
        "model.norm.weight": master[0].copy(),
    }
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, quantization=quantization))
    matrix = checkpoint.read(f"{MODULE}.weight")
    given = torch.tensor(master.astype(np.float32))
    given = given.bfloat16() if dtype == BF16 else given
    want = oracle.WeightQuant.apply(given).float().numpy()
    assert (np.sign(matrix.dequantize()) == np.sign(want)).all()
    np.testing.assert_allclose(matrix.dequantize(), want, rtol=2**-10)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert not isinstance(checkpoint.read(name), QuantizedMatrix)


def test_skipped_modules_stay_floats(tmp_path):
    quantization = settings_of(
        linear_class="autobitlinear",
        quantization_mode="online",
        modules_to_not_convert=["model.layers.1", "o_proj"],
    )
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 11) for p in "qo"]
    tensors = {f"{name}.weight": np.ones((4, 4), np.float32) for name in names}
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, quantization=quantization))
    quantized = {n for n in names if isinstance(checkpoint.read(f"{n}.weight"), QuantizedMatrix)}
    assert quantized == {"model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj"}


OFFLINE = settings_of(linear_class="autobitlinear", quantization_mode="offline")


@pytest.mark.parametrize(
    ("name", "value", "quantization", "message"),
    [
        (".weight", np.full((2, 8), 0x0C, np.uint8), OFFLINE, r"the code 3 at \[2, 0\]"),
        (".weight", np.full((2, 8), 0.5, np.float32), OFFLINE, r"holds 0\.5 at \[0, 0\]"),
        (".weight", np.zeros(8, np.uint8), OFFLINE, "wanted two dimensions"),
        (".weight_scale", np.array([np.nan], np.float32), OFFLINE, "wanted a finite scale"),
        (".weight_scale", np.array([0], np.float32), OFFLINE, "wanted a finite scale"),
        (".weight_scale", np.ones(2, np.float32), OFFLINE, "wanted one float"),
        (".weight_scale", np.array([1e9], np.float32), OFFLINE, "wanted finite values"),
        (".weight_scale", None, OFFLINE, "is packed and has no weight_scale"),
        (".weight", None, OFFLINE, "weight_scale and no model"),
        ("", None, settings_of(modules_to_not_convert="x"), "wanted a list of names"),
    ],
)
def test_damaged_folders_are_one_sentence(tmp_path, name, value, quantization, message):
    tensors = packed_tensors(ternary(np.random.default_rng(0), 8, 8), 2.0)
    if name and value is None:
        del tensors[MODULE + name]
    elif name:
        tensors[MODULE + name] = value
    path = write_folder(tmp_path, tensors, quantization=quantization)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(path).read(f"{MODULE}.weight")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"linear_class": "other"}, "linear_class 'other'"),
        ({"quantization_mode": "later"}, "quantization_mode 'later'"),
        ({"use_rms_norm": True}, "use_rms_norm"),
    ],
)
def test_unknown_settings_are_refused(tmp_path, more, message):
    tensors = packed_tensors(ternary(np.random.default_rng(0), 8, 8), 2.0)
    path = write_folder(tmp_path, tensors, quantization=settings_of(**more))
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(path)


def test_a_bitnet_folder_without_ternary_weights_is_refused(tmp_path):
    path = write_folder(tmp_path, {"w": np.ones(4)}, quantization=settings_of())
    with pytest.raises(FormatError, match="no tensor is a ternary weight"):
        open_checkpoint(path)


def test_master_weights_that_are_not_finite_are_refused(tmp_path):
    master = np.ones((4, 4), np.float32)
    master[1, 1] = np.inf
    quantization = settings_of(linear_class="autobitlinear", quantization_mode="online")
    path = write_folder(tmp_path, {f"{MODULE}.weight": master}, quantization=quantization)
    with pytest.raises(FormatError, match="not finite"):
        open_checkpoint(path).read(f"{MODULE}.weight")
