"""GGUF files of mixtures of experts: one tensor for all gates of a layer, cut into matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf_files import EXPERTS, FFN, HIDDEN, MIXTURES, random_mixture, write_mixture

from elute.errors import FormatError, UnsupportedError
from elute.formats.gguf import GgufCheckpoint, open_gguf
from elute.kernels.kv_cache import CacheType
from elute.kernels.lut_matmul.reference import lut_matmul
from elute.model.families import op_list
from elute.model.reference import ReferenceExecutor
from elute.model.weights import check_weights
from elute.pack.convert import convert
from elute.pack.quads import unpack
from elute.quantize.recipe import Recipe
from elute.runtime.executor import Executor
from elute.types import QuantizedMatrix, TokenizerFiles

each_type = pytest.mark.parametrize("model_type", MIXTURES)


def opened(tmp_path: Path, model_type: str, **options: Any) -> GgufCheckpoint:
    return open_gguf(write_mixture(tmp_path / "m.gguf", model_type, **options))


@each_type
def test_experts_come_back_one_by_one(model_type: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, model_type)
    weights = random_mixture(model_type)
    assert set(checkpoint.names()) == set(weights)
    for name, want in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), want, err_msg=name)


@each_type
def test_the_op_list_uses_every_tensor_and_no_other(model_type: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, model_type)
    ops = op_list(checkpoint.config)
    assert {*ops.matrices(), *ops.vectors()} == set(checkpoint.names())
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    check_weights(ops, shapes.get, where="the file")


def test_experts_that_are_tensors_of_their_own_are_read_too(tmp_path: Path) -> None:
    """As llama.cpp's converter wrote Mixtral before April 2024."""
    weights = random_mixture("mixtral")
    stems = {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down"}
    raw = {}
    for name, weight in weights.items():
        if ".experts." in name:
            _, _, layer, _, _, expert, matrix, _ = name.split(".")
            kind = T.Q8_0 if matrix == "w2" else T.F16
            stored = gguf.quants.quantize(weight, kind)
            raw[f"blk.{layer}.{stems[matrix]}.{expert}.weight"] = (stored, kind)
    checkpoint = opened(tmp_path, "mixtral", raw=raw, merged=False)
    assert set(checkpoint.names()) == set(weights)
    name = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    np.testing.assert_array_equal(checkpoint.read(name), weights[name].astype(np.float16))
    assert isinstance(checkpoint.read(name.replace("w3", "w2")), QuantizedMatrix)


@pytest.mark.parametrize("kind", [T.Q4_0, T.Q5_1, T.Q8_0])
def test_experts_keep_their_codes(kind: T, tmp_path: Path) -> None:
    stems = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    types = {f"blk.1.{stem}.weight": kind for stem in stems}
    checkpoint = opened(tmp_path, "qwen3_moe", types=types)
    weights = random_mixture("qwen3_moe")
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.{expert}.{name}.weight"
            got = checkpoint.read(name)
            assert isinstance(got, QuantizedMatrix)
            want = gguf.quants.dequantize(gguf.quants.quantize(weights[name], kind), kind)
            np.testing.assert_array_equal(got.dequantize(), want)


def test_configs_are_those_of_hugging_face(tmp_path: Path) -> None:
    config = opened(tmp_path, "mixtral").config
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (EXPERTS, 2)
    assert config["intermediate_size"] == FFN
    config = opened(tmp_path, "qwen3_moe").config
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (config["num_experts"], config["moe_intermediate_size"]) == (EXPERTS, 32)
    assert config["norm_topk_prob"] is True
    config = opened(tmp_path, "olmoe").config
    assert config["architectures"] == ["OlmoeForCausalLM"]
    assert config["norm_topk_prob"] is False


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_window_is_kept(model_type: str, tmp_path: Path) -> None:
    keys = {f"{MIXTURES[model_type][0]}.attention.sliding_window": 64}
    config = opened(tmp_path, model_type, keys=keys).config
    assert config["model_type"] == model_type
    assert config["sliding_window"] == 64
    op_list(config)


@each_type
def test_a_file_is_packed_with_its_codes_and_computes_what_they_say(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GgufCheckpoint, "tokenizer_files", lambda _: TokenizerFiles("{}"))
    stems = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    types = {f"blk.{layer}.{stem}.weight": T.Q4_0 for layer in (0, 1) for stem in stems}
    checkpoint = opened(tmp_path, model_type, types=types)
    ops = op_list(checkpoint.config)
    packed = convert(
        checkpoint,
        tmp_path / "packed",
        Recipe.default(bits=8),
        tensors=(*ops.matrices(), *ops.vectors()),
        floats=ops.vectors(),
    )
    experts = [name for name in packed.names if ".experts." in name]
    assert {packed.matrix(name).bits for name in experts} == {4}
    floats = {name: unpack(packed.matrix(name)).dequantize() for name in ops.matrices()}
    floats |= {name: packed.vector(name) for name in ops.vectors()}
    linear = lambda x, name: lut_matmul(x, packed.matrix(name))  # noqa: E731
    reference = ReferenceExecutor(ops, floats, linear=linear, cache_type=CacheType.F16)
    tokens = np.arange(5, 25, dtype=np.int32)
    want = reference.forward(tokens, 0, all_logits=True)
    got = Executor(ops, packed, n_threads=2).forward(tokens, 0, all_logits=True)
    error = np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)
    assert np.median(error) < 1e-3, error


ONE_LESS = np.zeros((EXPERTS - 1, FFN, HIDDEN), np.float32)
DENSE = np.zeros((FFN, HIDDEN), np.float32)
BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "no count": (
        "olmoe",
        {"keys": {"olmoe.expert_count": None}},
        FormatError,
        "key 'olmoe.expert_count': found nothing",
    ),
    "no picks": (
        "mixtral",
        {"keys": {"llama.expert_used_count": None}},
        FormatError,
        "key 'llama.expert_used_count': found nothing",
    ),
    "too many picks": (
        "mixtral",
        {"keys": {"llama.expert_used_count": 7}},
        FormatError,
        "'llama.expert_used_count': found 7, wanted at most 6",
    ),
    "more experts than the tensors": (
        "mixtral",
        {"keys": {"llama.expert_count": 2**31 - 1}},
        FormatError,
        r"tensor 'blk.0.ffn_gate_inp.weight': found shape \[6, 64\], wanted \[2147483647, 64\]",
    ),
    "an expert is missing": (
        "mixtral",
        {"raw": {"blk.1.ffn_up_exps.weight": (ONE_LESS, T.F32)}},
        FormatError,
        r"tensor 'blk.1.ffn_up_exps.weight': found shape \[5, 96, 64\], wanted \[6, 96, 64\]",
    ),
    "a dense layer beside": (
        "qwen3_moe",
        {"raw": {"blk.1.ffn_up.weight": (DENSE, T.F32)}},
        UnsupportedError,
        "tensor 'blk.1.ffn_up.weight': found it in architecture 'qwen3moe'",
    ),
    "shared": (
        "qwen3_moe",
        {"keys": {"qwen3moe.expert_shared_count": 1}},
        UnsupportedError,
        "'qwen3moe.expert_shared_count': found 1, wanted 0",
    ),
    "sigmoid": (
        "mixtral",
        {"keys": {"llama.expert_gating_func": 2}},
        UnsupportedError,
        "'llama.expert_gating_func': found 2, wanted 1",
    ),
    "scaled": (
        "mixtral",
        {"keys": {"llama.expert_weights_scale": 2.5}},
        UnsupportedError,
        "'llama.expert_weights_scale': found 2.5, wanted 1",
    ),
}


@pytest.mark.parametrize(("model_type", "options", "error", "says"), BAD.values(), ids=BAD.keys())
def test_bad_files_get_a_sentence(
    model_type: str, options: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        opened(tmp_path, model_type, **options)
