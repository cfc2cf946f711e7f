"""Sizes of published models, as their config.json states them: what a random model is made of.

Long-context scaling of rotary tables is left out: it changes numbers, not work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
    },
    "llama-3-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **_LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    # 64 experts, 8 of them for a token: 1.3 of 6.9 billion weights
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
    # the smallest with a vocabulary of 150k: the head is a third of its bytes
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    # 1bitLLM/bitnet_b1_58-3B: llama's activation, BitNet's two norms more a layer
    "bitnet-3b": {
        "model_type": "bitnet",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32002,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
    },
    "smollm2-135m": {
        **_LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    },
}


def shape_config(shape: str, *, vocabulary: int | None = None) -> dict[str, Any]:
    """A copy of CONFIGS[shape]; `vocabulary` replaces its number of tokens."""
    config = dict(CONFIGS[shape])
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    return config


def layer_shapes(shape: str) -> tuple[tuple[int, int], ...]:
    """The distinct [N, K] of a layer: query and output, key and value, gate and up, down."""
    config = CONFIGS[shape]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_width = hidden // config["num_attention_heads"]
    key = head_width * config["num_key_value_heads"]
    return tuple(dict.fromkeys([(hidden, hidden), (key, hidden), (inner, hidden), (hidden, inner)]))


def head_shape(shape: str) -> tuple[int, int]:
    """[N, K] of what makes logits: vocabulary, hidden."""
    config = CONFIGS[shape]
    return config["vocab_size"], config["hidden_size"]
