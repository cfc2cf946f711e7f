"""Llama 2 and 3, SmolLM2, Mistral: the plain pre-norm decoder. Mistral's layers may slide."""

from __future__ import annotations

from elute.model.config import Config
from elute.model.families.decoder import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Decoder,
    read_layer_types,
    read_sizes,
    windows_of,
)
from elute.model.ops import OpList
from elute.model.rope import rope_table


def llama(config: Config) -> OpList:
    sizes = read_sizes(config)
    bias = config.flag("attention_bias", False)
    return Decoder(
        sizes=sizes,
        activation=config.activation("hidden_act", "silu"),
        eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", False),
        windows=(None,) * sizes.n_layers,
        ropes=("rope",) * sizes.n_layers,
        rope_tables={
            "rope": rope_table(config, head_width=sizes.head_width, default_theta=10_000.0)
        },
        attention_scale=sizes.head_width**-0.5,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    ).op_list()


def mistral(config: Config) -> OpList:
    sizes = read_sizes(config)
    window = config.optional_count("sliding_window")
    kind = FULL_ATTENTION if window is None else SLIDING_ATTENTION
    types = read_layer_types(config, (kind,) * sizes.n_layers)
    return Decoder(
        sizes=sizes,
        activation=config.activation("hidden_act", "silu"),
        eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", False),
        windows=windows_of(config, types, window),
        ropes=("rope",) * sizes.n_layers,
        rope_tables={
            "rope": rope_table(config, head_width=sizes.head_width, default_theta=10_000.0)
        },
        attention_scale=sizes.head_width**-0.5,
    ).op_list()
