"""Qwen3: Llama with a norm on every query and key head, and heads whose width is stated apart."""

from __future__ import annotations

from elute.model.config import Config
from elute.model.families.decoder import Decoder, Norms, read_sizes
from elute.model.families.qwen2 import qwen_windows
from elute.model.ops import OpList
from elute.model.rope import rope_table


def qwen3(config: Config) -> OpList:
    sizes = read_sizes(config, head_width=128)
    bias = config.flag("attention_bias", False)
    return Decoder(
        sizes=sizes,
        activation=config.activation("hidden_act", "silu"),
        eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", False),
        windows=qwen_windows(config, sizes.n_layers),
        ropes=("rope",) * sizes.n_layers,
        rope_tables={
            "rope": rope_table(config, head_width=sizes.head_width, default_theta=10_000.0)
        },
        attention_scale=sizes.head_width**-0.5,
        norms=Norms(query="self_attn.q_norm", key="self_attn.k_norm"),
        qkv_bias=bias,
        output_bias=bias,
    ).op_list()
