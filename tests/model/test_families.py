"""Every family and variant against transformers, on tiny random checkpoints in f32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tiny import config_and_weights, tiny_keys, tiny_model

from elute.model.families import op_list
from elute.model.reference import ReferenceExecutor
from elute.model.weights import weight_shapes

TOLERANCE = 1e-4  # of the largest logit: the project's bound for f32 against f32
N_TOKENS = 24  # four times the shortest window below

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
BY_LAYER_TYPE = {
    "full_attention": {**LINEAR, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
}
MIXED_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Variant:
    name: str
    family: str
    keys: dict[str, Any] = field(default_factory=dict)
    forward: dict[str, Any] = field(default_factory=dict)  # further arguments of the oracle


def _legacy(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope` in the older spelling: rope_theta apart, "type" for "rope_type"."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


QWEN_SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
VARIANTS = [
    Variant("llama", "llama"),
    Variant("llama-tied", "llama", {"tie_word_embeddings": True}),
    Variant("llama-every-head-its-own-kv", "llama", {"num_key_value_heads": None}),
    Variant("llama-one-kv-head", "llama", {"num_key_value_heads": 1}),
    Variant("llama-wide-heads", "llama", {"head_dim": 24}),
    Variant("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Variant("llama-linear", "llama", {"rope_parameters": LINEAR}),
    Variant("llama-llama3", "llama", {"rope_parameters": LLAMA3}),
    Variant("llama-yarn", "llama", {"rope_parameters": YARN}),
    Variant("llama-legacy-linear", "llama", _legacy(LINEAR)),
    Variant("llama-legacy-llama3", "llama", _legacy(LLAMA3)),
    Variant("llama-legacy-yarn", "llama", _legacy(YARN)),
    Variant("mistral", "mistral"),
    Variant("mistral-sliding", "mistral", {"sliding_window": 6}),
    Variant("mistral-window-of-one", "mistral", {"sliding_window": 1}),
    Variant("qwen2", "qwen2"),
    Variant("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    Variant("qwen2-sliding", "qwen2", {**QWEN_SLIDING, "num_hidden_layers": 3}),
    Variant("qwen2-window-unused", "qwen2", {"sliding_window": 6, "max_window_layers": 1}),
    Variant("qwen2-yarn", "qwen2", {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    Variant("qwen3", "qwen3"),
    Variant("qwen3-tied", "qwen3", {"tie_word_embeddings": True}),
    Variant("qwen3-biases", "qwen3", {"attention_bias": True}),
    Variant("qwen3-sliding", "qwen3", QWEN_SLIDING),
    Variant("gemma3", "gemma3_text"),
    Variant("gemma3-untied", "gemma3_text", {"tie_word_embeddings": False}),
    Variant("gemma3-odd-embed-scale", "gemma3_text", {"hidden_size": 48, "attention_bias": True}),
    Variant("gemma3-logit-softcap", "gemma3_text", {"final_logit_softcapping": 2.0}),
    # transformers reads attn_logit_softcapping but does not pass it on; its attention takes it.
    Variant(
        "gemma3-attention-softcap", "gemma3_text", {"attn_logit_softcapping": 1.5}, {"softcap": 1.5}
    ),
    Variant("gemma3-layer-types", "gemma3_text", {"layer_types": MIXED_LAYERS}),
    Variant("gemma3-rope-by-layer-type", "gemma3_text", {"rope_parameters": BY_LAYER_TYPE}),
    Variant(
        "gemma3-legacy-rope",
        "gemma3_text",
        {
            "rope_theta": 500_000.0,
            "rope_local_base_freq": 5_000.0,
            # As Google's files spell it; with "type" transformers would quietly not scale.
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    Variant("bitnet", "bitnet"),
    Variant("bitnet-tied", "bitnet", {"tie_word_embeddings": True}),
    Variant("mixtral", "mixtral"),
    Variant("mixtral-sliding", "mixtral", {"sliding_window": 6}),
    Variant("mixtral-tied", "mixtral", {"tie_word_embeddings": True}),
    Variant("mixtral-one-expert", "mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    Variant("mixtral-all-experts", "mixtral", {"num_experts_per_tok": 8}),
    Variant("qwen3-moe", "qwen3_moe"),
    Variant("qwen3-moe-shares-of-all", "qwen3_moe", {"norm_topk_prob": False}),
    Variant("qwen3-moe-every-second", "qwen3_moe", {"decoder_sparse_step": 2}),
    Variant("qwen3-moe-all-dense", "qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
    Variant(
        "qwen3-moe-sliding",
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 6, "attention_bias": True},
    ),
    Variant("olmoe", "olmoe"),
    Variant("olmoe-normalized", "olmoe", {"norm_topk_prob": True, "attention_bias": True}),
    Variant("olmoe-every-head-its-own-kv", "olmoe", {"num_key_value_heads": None}),
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name, scope="module")
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture(scope="module")
def model(variant: Variant) -> Any:
    return tiny_model(variant.family, **variant.keys)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 288, N_TOKENS, dtype=np.int32)


@pytest.fixture(scope="module")
def wanted(variant: Variant, model: Any, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits, [N_TOKENS, vocabulary]."""
    import torch

    with torch.inference_mode():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        return model(ids, use_cache=False, **variant.forward).logits[0].numpy()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    bound = TOLERANCE * np.abs(want).max()
    difference = np.abs(got - want)
    at = np.unravel_index(difference.argmax(), got.shape)
    assert difference[at] <= bound, f"worst at {at}: got {got[at]}, want {want[at]}, bound {bound}"


def test_reference_forward_equals_transformers(model, tokens, wanted) -> None:
    config, weights = config_and_weights(model)
    executor = ReferenceExecutor(op_list(config), weights)
    assert_close(executor.forward(tokens, 0, all_logits=True), wanted)


def test_keys_as_written_equal_those_of_transformers(variant, model, tokens, wanted) -> None:
    """Older spellings and left-out keys, before transformers' config class has rewritten them."""
    _, weights = config_and_weights(model)
    executor = ReferenceExecutor(op_list(tiny_keys(variant.family, **variant.keys)), weights)
    assert_close(executor.forward(tokens, 0, all_logits=True), wanted)


def test_chunks_equal_one_prefill(model, tokens, wanted) -> None:
    config, weights = config_and_weights(model)
    executor = ReferenceExecutor(op_list(config), weights)
    position = 0
    for size in (5, 1, 1, 9, 1, 7):
        got = executor.forward(tokens[position : position + size], position)
        position += size
        assert_close(got, wanted[position - 1 : position])
    assert position == N_TOKENS


def test_op_list_uses_every_weight_once_named(model) -> None:
    config, weights = config_and_weights(model)
    ops = op_list(config)
    names = [*ops.matrices(), *ops.vectors()]
    assert len(names) == len(set(names))
    assert set(names) == set(weights)
    assert {name: tensor.shape for name, tensor in weights.items()} == weight_shapes(ops)
