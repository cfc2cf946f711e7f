from __future__ import annotations

import logging
from pathlib import Path

import gguf
import gguf_files
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf_files import HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, WIDTH, random_weights, write_gguf

from elute.errors import FormatError, UnsupportedError
from elute.formats.gguf import GgufCheckpoint, open_gguf
from elute.model.families import op_list
from elute.types import QuantizedMatrix

FAMILIES = tuple(gguf_files.NORMS)
BIASES = {"qwen2": ("q_proj", "k_proj", "v_proj")}


def opened(tmp_path: Path, *args: object, **kwargs: object) -> GgufCheckpoint:
    return open_gguf(write_gguf(tmp_path / "m.gguf", *args, **kwargs))  # type: ignore[arg-type]


def qwen2(tmp_path: Path, **kwargs: object) -> GgufCheckpoint:
    return opened(tmp_path, "qwen2", random_weights("qwen2", biases=BIASES["qwen2"]), **kwargs)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_tensors_come_back_under_their_hugging_face_names(
    architecture: str, tmp_path: Path
) -> None:
    weights = random_weights(architecture, biases=BIASES.get(architecture, ()))
    checkpoint = opened(tmp_path, architecture, weights)
    assert set(checkpoint.names()) == set(weights)
    for name, want in weights.items():
        assert checkpoint.shape(name) == want.shape
        got = checkpoint.read(name)
        assert isinstance(got, np.ndarray)
        if architecture == "gemma3" and name.endswith("norm.weight"):  # (w + 1) - 1 in f32
            np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-22)
        else:
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = random_weights(architecture, biases=BIASES.get(architecture, ()))
    checkpoint = opened(tmp_path, architecture, weights)
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    (class_name,) = checkpoint.config["architectures"]
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # tied
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == state


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_op_list_uses_every_tensor_and_no_other(architecture: str, tmp_path: Path) -> None:
    weights = random_weights(architecture, biases=BIASES.get(architecture, ()))
    checkpoint = opened(tmp_path, architecture, weights)
    described = op_list(checkpoint.config)
    assert {*described.matrices(), *described.vectors()} == set(checkpoint.names())


@pytest.mark.parametrize("kind", [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0])
def test_rows_of_llama_codes_and_scales_return_to_half_split_order(kind: T, tmp_path: Path) -> None:
    weights = random_weights("llama")
    names = [f"blk.0.attn_{stem}.weight" for stem in ("q", "k", "v")]
    checkpoint = opened(tmp_path, "llama", weights, types=dict.fromkeys(names, kind))
    for stem in ("q", "k", "v"):
        name = f"model.layers.0.self_attn.{stem}_proj.weight"
        got = checkpoint.read(name)
        assert isinstance(got, QuantizedMatrix)
        # Quantization is by row, so the order of rows and quantization commute.
        want = gguf.quants.dequantize(gguf.quants.quantize(weights[name], kind), kind)
        np.testing.assert_array_equal(got.dequantize(), want)


def test_biases_of_llama_are_reordered_too(tmp_path: Path) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    weights = random_weights("llama", biases=names)
    checkpoint = opened(tmp_path, "llama", weights)
    assert checkpoint.config["attention_bias"] is True
    assert checkpoint.config["mlp_bias"] is True
    name = "model.layers.1.self_attn.k_proj.bias"
    np.testing.assert_array_equal(checkpoint.read(name), weights[name])


def test_floats_come_as_stored(tmp_path: Path) -> None:
    types = {"blk.0.ffn_up.weight": T.F16, "blk.0.ffn_down.weight": T.BF16}
    weights = random_weights("qwen3")
    checkpoint = opened(tmp_path, "qwen3", weights, types=types)
    up = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    down = checkpoint.read("model.layers.0.mlp.down_proj.weight")
    assert isinstance(up, np.ndarray)
    assert isinstance(down, np.ndarray)
    assert up.dtype == np.float16
    assert down.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(up, weights["model.layers.0.mlp.up_proj.weight"].astype("f2"))
    np.testing.assert_array_equal(
        down, weights["model.layers.0.mlp.down_proj.weight"].astype(ml_dtypes.bfloat16)
    )
    assert not up.flags.writeable


def test_llama_config(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.padding_token_id": 0}
    assert opened(tmp_path, keys=keys).config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "vocab_size": 48,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": [2, 5],
    }


def test_keys_that_may_be_absent(tmp_path: Path) -> None:
    absent = ("attention.key_length", "attention.value_length", "rope.freq_base")
    keys = {f"qwen2.{key}": None for key in absent} | {"tokenizer.ggml.bos_token_id": None}
    config = qwen2(tmp_path, keys=keys).config
    assert config["head_dim"] == HIDDEN // HEADS
    assert config["rope_theta"] == 10000.0
    assert config["attention_bias"] is True
    assert "bos_token_id" not in config


def test_an_output_tensor_unties_the_head(tmp_path: Path) -> None:
    weights = random_weights("llama")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    checkpoint = opened(tmp_path, "llama", weights)
    assert checkpoint.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), weights["lm_head.weight"])


def test_gemma3_config(tmp_path: Path) -> None:
    keys = {
        "gemma3.attention.sliding_window": 32,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    config = opened(tmp_path, "gemma3", keys=keys).config
    assert config["model_type"] == "gemma3_text"
    assert config["query_pre_attn_scalar"] == WIDTH
    assert config["rope_theta"] == 1e6
    assert config["rope_local_base_freq"] == 10000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["sliding_window"] == 32
    assert config["layer_types"] == ["sliding_attention"] * LAYERS
    assert config["hidden_activation"] == "gelu_pytorch_tanh"
    assert "final_logit_softcapping" not in config


@pytest.mark.parametrize("pattern", [2, [True, False]])
def test_gemma3_pattern_as_period_or_as_flags(pattern: object, tmp_path: Path) -> None:
    at = "gemma3.attention.sliding_window"
    config = opened(tmp_path, "gemma3", keys={at: 32, f"{at}_pattern": pattern}).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"]


def test_gemma3_without_window_attends_to_everything(tmp_path: Path) -> None:
    config = opened(tmp_path, "gemma3").config
    assert config["layer_types"] == ["full_attention"] * LAYERS
    assert "sliding_window" not in config


@pytest.mark.parametrize("name", ["bitnet", "bitnet-b1.58", "bitnet-25"])
def test_bitnet_by_its_three_names(name: str, tmp_path: Path) -> None:
    keys = {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": 1.0}
    config = opened(tmp_path, "bitnet", file_architecture=name, keys=keys).config
    assert config["model_type"] == "bitnet"
    assert config["hidden_act"] == "relu2"
    assert "rope_scaling" not in config


def test_bitnet_with_the_tokenizer_of_llama_2_uses_silu_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = opened(tmp_path, "bitnet", keys={"tokenizer.ggml.model": "llama"}).config
    assert config["hidden_act"] == "silu"
    assert "does not say its activation; taking silu" in caplog.text


def test_rope_scaling_of_yarn(tmp_path: Path) -> None:
    at = "qwen3.rope.scaling."
    keys = {
        f"{at}type": "yarn",
        f"{at}factor": 4.0,
        f"{at}original_context_length": 128,
        f"{at}yarn_beta_fast": 16.0,
        f"{at}attn_factor": 1.25,
    }
    assert opened(tmp_path, "qwen3", keys=keys).config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "attention_factor": 1.25,
    }


def test_rope_factors_of_llama3(tmp_path: Path) -> None:
    factors = np.array([1, 1, 1, 1.5, 2, 4, 8, 8], np.float32)
    checkpoint = opened(tmp_path, raw={"rope_freqs.weight": (factors, T.F32)})
    assert checkpoint.config["elute_rope_frequency_factors"] == factors.tolist()
    assert "rope_freqs.weight" not in checkpoint.names()


@pytest.mark.parametrize(
    ("factors", "wanted"),
    [
        ([1, 1, 1, 0, 1, 1, 1, 1], "found the factor 0.0, wanted 8 finite factors above 0"),
        ([1, 1, 1, np.nan, 1, 1, 1, 1], "found the factor nan"),
        ([1, 1, 1], "found 3 factors, wanted 8"),
    ],
)
def test_bad_rope_factors_are_refused(factors: list[float], wanted: str, tmp_path: Path) -> None:
    raw = {"rope_freqs.weight": (np.array(factors, np.float32), T.F32)}
    with pytest.raises(FormatError, match=wanted):
        opened(tmp_path, raw=raw)


def test_a_window_makes_llama_mistral_and_qwen_slide(tmp_path: Path) -> None:
    config = opened(tmp_path, keys={"llama.attention.sliding_window": 64}).config
    assert config["model_type"] == "mistral"
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 64
    config = qwen2(tmp_path, keys={"qwen2.attention.sliding_window": 64}).config
    assert (config["sliding_window"], config["use_sliding_window"]) == (64, True)
    assert config["max_window_layers"] == 0
    config = qwen2(tmp_path, keys={"qwen2.attention.sliding_window": 512}).config
    assert "sliding_window" not in config  # as long as the context: hides nothing


def test_types_without_linear_codes_are_dequantized_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random_weights("qwen3")
    rng = np.random.default_rng(0)
    raw = {}
    for stem in ("attn_q", "attn_k"):
        rows = (HEADS if stem == "attn_q" else KV_HEADS) * WIDTH
        blocks = rng.integers(0, 256, (rows, HIDDEN // 32, 18), np.uint8)
        blocks[:, :, :2] = np.array([0.5], "<f2").view(np.uint8)
        raw[f"blk.0.{stem}.weight"] = (blocks.reshape(rows, -1), T.IQ4_NL)
    checkpoint = opened(tmp_path, "qwen3", weights, raw=raw)
    with caplog.at_level(logging.WARNING):
        got = checkpoint.read("model.layers.0.self_attn.q_proj.weight")
        checkpoint.read("model.layers.0.self_attn.k_proj.weight")
    want = gguf.quants.dequantize(raw["blk.0.attn_q.weight"][0], T.IQ4_NL)
    np.testing.assert_array_equal(got, want)
    (record,) = caplog.records
    assert "type IQ4_NL has no linear codes" in record.getMessage()
    assert "blk.0.attn_q.weight" in record.getMessage()


def without(name: str) -> dict[str, np.ndarray]:
    weights = random_weights("llama")
    del weights[name]
    return weights


FLAT = np.zeros(HIDDEN, np.float32)
BAD: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "architecture": (
        {"keys": {"general.architecture": "mamba"}},
        UnsupportedError,
        "found 'mamba', wanted one of llama, qwen2, qwen3, qwen3moe, olmoe, gemma3, bitnet, "
        "bitnet-b1.58, bitnet-25",
    ),
    "projector": ({"keys": {"general.type": "mmproj"}}, UnsupportedError, "wanted 'model'"),
    "split": ({"keys": {"split.count": 3}}, UnsupportedError, "found 3 parts, wanted one file"),
    "experts": (
        {"keys": {"qwen3.expert_count": 8}, "file_architecture": "qwen3"},
        UnsupportedError,
        "found 8 experts a layer in a qwen3 model",
    ),
    "no layers": (
        {"keys": {"llama.block_count": None}},
        FormatError,
        "key 'llama.block_count': found nothing",
    ),
    "layer count": (
        {"keys": {"llama.block_count": 2**31}},
        FormatError,
        "key 'llama.block_count': found 2147483648, wanted an integer from 1",
    ),
    "more layers than tensors": (
        {"keys": {"llama.block_count": 1000}},
        FormatError,
        "found 1000, wanted at most the 20 tensors",
    ),
    "one layer more": (
        {"keys": {"llama.block_count": 3}},
        FormatError,
        "tensor 'blk.2.attn_norm.weight': found nothing, wanted shape [64]",
    ),
    "one layer less": (
        {"keys": {"llama.block_count": 1}},
        UnsupportedError,
        "tensor 'blk.1.attn_norm.weight': found it in architecture 'llama'",
    ),
    "heads": (
        {"keys": {"llama.attention.head_count_kv": 3}},
        FormatError,
        "key 'llama.attention.head_count_kv': found 3, wanted a divisor of 4 heads",
    ),
    "heads by layer": (
        {"keys": {"llama.attention.head_count": [4, 2]}},
        UnsupportedError,
        "found [4, 2], which varies by layer",
    ),
    "float count": (
        {"keys": {"llama.embedding_length": 64.0}},
        FormatError,
        "key 'llama.embedding_length': found 64.0, wanted an integer",
    ),
    "eps": (
        {"keys": {"llama.attention.layer_norm_rms_epsilon": float("nan")}},
        FormatError,
        "found nan, wanted a finite number",
    ),
    "theta": ({"keys": {"llama.rope.freq_base": -1.0}}, FormatError, "wanted a number above 0"),
    "partial rope": (
        {"keys": {"llama.rope.dimension_count": 8}},
        UnsupportedError,
        "key 'llama.rope.dimension_count': found 8, wanted the head width 16",
    ),
    "odd heads": (
        {"keys": {"llama.attention.key_length": 15}},
        FormatError,
        "found 15, wanted an even number",
    ),
    "rope type": (
        {"keys": {"llama.rope.scaling.type": "longrope"}},
        UnsupportedError,
        "found 'longrope', wanted none, linear or yarn",
    ),
    "token": (
        {"keys": {"tokenizer.ggml.bos_token_id": VOCAB}},
        FormatError,
        "key 'tokenizer.ggml.bos_token_id': found 48, wanted a token below 48",
    ),
    "vocabulary": (
        {"keys": {"tokenizer.ggml.tokens": ["x"] * (VOCAB + 1)}},
        FormatError,
        "'49 tokens', wanted at most 48",
    ),
    "no embedding": (
        {"weights": without("model.embed_tokens.weight")},
        FormatError,
        "tensor 'token_embd.weight': found nothing, wanted a matrix",
    ),
    "missing tensor": (
        {"weights": without("model.layers.1.mlp.up_proj.weight")},
        FormatError,
        "tensor 'blk.1.ffn_up.weight': found nothing, wanted shape [96, 64]",
    ),
    "shape": (
        {"raw": {"blk.0.attn_v.weight": (np.zeros((16, HIDDEN), np.float32), T.F32)}},
        FormatError,
        "tensor 'blk.0.attn_v.weight': found shape [16, 64], wanted [32, 64]",
    ),
    "extra tensor": (
        {"raw": {"blk.0.attn_sinks.weight": (FLAT, T.F32)}},
        UnsupportedError,
        "tensor 'blk.0.attn_sinks.weight': found it in architecture 'llama'",
    ),
    "integer tensor": (
        {"raw": {"blk.0.attn_norm.weight": (FLAT.astype(np.int32), T.I32)}},
        UnsupportedError,
        "found type I32, wanted one that the gguf library can dequantize",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_models_give_one_sentence(case: str, tmp_path: Path) -> None:
    arguments, error, wanted = BAD[case]
    with pytest.raises(error) as caught:
        opened(tmp_path, **arguments)
    message = str(caught.value)
    assert wanted in message
    assert message.startswith(f"{tmp_path / 'm.gguf'}: ")
    assert "; " in message


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16])
def test_weights_that_are_not_finite_are_refused(bad: float, kind: T, tmp_path: Path) -> None:
    weights = random_weights("llama")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = bad
    checkpoint = opened(tmp_path, "llama", weights, types={"blk.1.ffn_up.weight": kind})
    with pytest.raises(
        FormatError, match=r"blk.1.ffn_up.weight': found weight (nan|inf) at \[5, 7"
    ):
        checkpoint.read("model.layers.1.mlp.up_proj.weight")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    for ask in (checkpoint.read, checkpoint.shape):
        with pytest.raises(FormatError, match=r"found no tensor 'lm_head\.weight'"):
            ask("lm_head.weight")


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    for path, wanted in ((tmp_path, "no file"), (tmp_path / "empty.gguf", "an empty file")):
        with pytest.raises(FormatError, match=wanted):
            open_gguf(path)


def test_default_model_equals_the_library(default_gguf: Path) -> None:
    checkpoint = open_gguf(default_gguf)
    assert len(checkpoint.names()) == 272
    assert checkpoint.source == str(default_gguf)
    config = checkpoint.config
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 30)
    assert (config["hidden_size"], config["vocab_size"], config["head_dim"]) == (576, 49152, 64)
    # Offsets and types as gguf.GGUFReader gives them; it takes 5 seconds to say so.
    for name, offset, kind, heads in (
        ("model.embed_tokens.weight", 1785664, T.Q8_0, 0),
        ("model.layers.29.mlp.down_proj.weight", 80630848, T.Q4_1, 0),
        ("model.layers.3.self_attn.q_proj.weight", 84784960, T.Q4_1, 9),
        ("model.layers.3.self_attn.k_proj.weight", 84508480, T.Q4_1, 3),
        ("model.norm.weight", 98360128, T.F32, 0),
    ):
        shape = gguf.quants.quant_shape_to_byte_shape(checkpoint.shape(name), kind)
        data = np.memmap(default_gguf, np.uint8, "r", offset, shape)
        want = gguf.quants.dequantize(data, kind)
        found = checkpoint.read(name)
        got = found.dequantize() if isinstance(found, QuantizedMatrix) else found
        np.testing.assert_array_equal(gguf_files.permuted(got, heads) if heads else got, want)


def test_default_model_has_its_tokenizer(default_gguf: Path) -> None:
    files = open_gguf(default_gguf).tokenizer_files()
    assert "<|im_start|>" in files.tokenizer_json
    assert files.chat_template is not None
