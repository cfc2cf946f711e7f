"""Gemma 3, text: norms around each block and on heads, windows on most layers, two rope bases.

Google's files leave out keys that equal transformers' defaults: those below are Gemma3TextConfig's.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from elute.model.config import Config
from elute.model.families.decoder import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Decoder,
    Norms,
    read_layer_types,
    read_sizes,
    windows_of,
)
from elute.model.ops import OpList
from elute.model.rope import rope_table

_NORMS = Norms(
    query="self_attn.q_norm",
    key="self_attn.k_norm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def gemma3(config: Config) -> OpList:
    if config.flag("use_bidirectional_attention", False):
        raise config.unsupported("use_bidirectional_attention is true", "causal attention")
    sizes = read_sizes(
        config, n_heads=8, n_kv_heads=4, head_width=256, vocabulary=262_208, context=131_072
    )
    types = _layer_types(config, sizes.n_layers)
    bias = config.flag("attention_bias", False)
    return Decoder(
        sizes=sizes,
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", True),
        windows=windows_of(config, types, config.count("sliding_window", 4096)),
        ropes=types,
        rope_tables={
            FULL_ATTENTION: rope_table(
                config,
                head_width=sizes.head_width,
                default_theta=1_000_000.0,
                layer_type=FULL_ATTENTION,
            ),
            SLIDING_ATTENTION: rope_table(
                config,
                head_width=sizes.head_width,
                default_theta=10_000.0,
                theta_key="rope_local_base_freq",
                scaling_key=None,  # rope_scaling is for the full layers alone
                layer_type=SLIDING_ATTENTION,
            ),
        },
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        norms=_NORMS,
        norm_offset=1.0,
        embed_scale=_embed_scale(config, sizes.hidden),
        qkv_bias=bias,
        output_bias=bias,
        # transformers 5.23 reads this key but never applies it; published files leave it null.
        attention_softcap=config.optional_number("attn_logit_softcapping"),
        logit_softcap=config.optional_number("final_logit_softcapping"),
    ).op_list()


def _layer_types(config: Config, n_layers: int) -> tuple[str, ...]:
    """Every sliding_window_pattern-th layer attends to everything."""
    pattern = config.count("sliding_window_pattern", 6)
    default = tuple(
        SLIDING_ATTENTION if (layer + 1) % pattern else FULL_ATTENTION for layer in range(n_layers)
    )
    return read_layer_types(config, default)


def _embed_scale(config: Config, hidden: int) -> float:
    """sqrt(hidden), rounded to the type in which the checkpoint was trained, as transformers does.

    bf16 makes 55.5 of sqrt(3072) = 55.43, and the model has learnt that.
    """
    rounded = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    dtype = config.text("dtype", config.text("torch_dtype", "float32"))
    return float(np.float32(hidden**0.5).astype(rounded.get(dtype, np.float32)))
