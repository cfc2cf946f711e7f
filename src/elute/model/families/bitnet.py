"""BitNet b1.58 (microsoft/bitnet-b1.58-2B-4T): squared ReLU, norms before the output projections.

The published model rounds activations to int8 before every linear. That is the packed path's
arithmetic, not this op list's: the reference forward is in float, as transformers' is.
"""

from __future__ import annotations

from elute.model.config import Config
from elute.model.families.decoder import Decoder, Norms, read_sizes
from elute.model.ops import OpList
from elute.model.rope import rope_table


def bitnet(config: Config) -> OpList:
    sizes = read_sizes(config)
    if sizes.n_heads * sizes.head_width != sizes.hidden:
        raise config.misfit(
            f"num_attention_heads * head_dim is {sizes.n_heads * sizes.head_width}",
            f"hidden_size ({sizes.hidden}), the width of attn_sub_norm",
        )
    bias = config.flag("attention_bias", False)
    return Decoder(
        sizes=sizes,
        activation=config.activation("hidden_act", "relu2"),
        eps=config.number("rms_norm_eps", 1e-5),
        tied=config.flag("tie_word_embeddings", False),
        windows=(None,) * sizes.n_layers,
        ropes=("rope",) * sizes.n_layers,
        rope_tables={
            "rope": rope_table(config, head_width=sizes.head_width, default_theta=500_000.0)
        },
        attention_scale=sizes.head_width**-0.5,
        norms=Norms(before_output="self_attn.attn_sub_norm", before_down="mlp.ffn_sub_norm"),
        qkv_bias=bias,
        output_bias=bias,
    ).op_list()
