"""OLMoE: experts in every layer, and norms over all query and all key heads at once."""

from __future__ import annotations

from elute.model.config import Config, shown
from elute.model.families.decoder import Decoder, Mixture, Norms, read_mixture_sizes, read_sizes
from elute.model.ops import OpList
from elute.model.rope import rope_table


def olmoe(config: Config) -> OpList:
    if config.has("clip_qkv"):
        found = f"clip_qkv is {shown(config.values['clip_qkv'])}"
        raise config.unsupported(found, "queries, keys and values as they are (null)")
    sizes = read_sizes(config)
    if sizes.n_heads * sizes.head_width != sizes.hidden:
        raise config.misfit(
            f"num_attention_heads * head_dim is {sizes.n_heads * sizes.head_width}",
            f"hidden_size ({sizes.hidden}), the width of q_norm",
        )
    n_experts, top_k = read_mixture_sizes(
        config, ("num_experts", "num_local_experts"), sizes.n_layers
    )
    bias = config.flag("attention_bias", False)
    return Decoder(
        sizes=sizes,
        activation=config.activation("hidden_act", "silu"),
        eps=config.number("rms_norm_eps", 1e-5),
        tied=config.flag("tie_word_embeddings", False),
        windows=(None,) * sizes.n_layers,
        ropes=("rope",) * sizes.n_layers,
        rope_tables={
            "rope": rope_table(config, head_width=sizes.head_width, default_theta=10_000.0)
        },
        attention_scale=sizes.head_width**-0.5,
        norms=Norms(query="self_attn.q_norm", key="self_attn.k_norm", whole=True),
        qkv_bias=bias,
        output_bias=bias,
        mixture=Mixture(
            n_experts=n_experts,
            top_k=top_k,
            width=sizes.intermediate,
            normalized=config.flag("norm_topk_prob", False),
            layers=(True,) * sizes.n_layers,
        ),
    ).op_list()
