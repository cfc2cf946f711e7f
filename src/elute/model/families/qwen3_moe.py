"""Qwen3 with experts in some layers or all; a layer without them has a plain mlp."""

from __future__ import annotations

from elute.model.config import Config
from elute.model.families.decoder import Decoder, Mixture, Norms, read_mixture_sizes, read_sizes
from elute.model.ops import OpList
from elute.model.rope import rope_table


def qwen3_moe(config: Config) -> OpList:
    sizes = read_sizes(config)
    bias = config.flag("attention_bias", False)
    window: int | None = None
    if config.flag("use_sliding_window", False):  # all layers: there is no max_window_layers here
        window = config.count("sliding_window", 4096)
    return Decoder(
        sizes=sizes,
        activation=config.activation("hidden_act", "silu"),
        eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", False),
        windows=(window,) * sizes.n_layers,
        ropes=("rope",) * sizes.n_layers,
        rope_tables={
            "rope": rope_table(config, head_width=sizes.head_width, default_theta=10_000.0)
        },
        attention_scale=sizes.head_width**-0.5,
        norms=Norms(query="self_attn.q_norm", key="self_attn.k_norm"),
        qkv_bias=bias,
        output_bias=bias,
        mixture=_mixture(config, sizes.n_layers),
    ).op_list()


def _mixture(config: Config, n_layers: int) -> Mixture:
    step = config.count("decoder_sparse_step", 1)
    dense = config.indices("mlp_only_layers")
    # transformers from 5 writes num_local_experts, the published files say num_experts.
    n_experts, top_k = read_mixture_sizes(config, ("num_experts", "num_local_experts"), n_layers)
    return Mixture(
        n_experts=n_experts,
        top_k=top_k,
        width=config.count("moe_intermediate_size"),
        normalized=config.flag("norm_topk_prob", False),
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(n_layers)),
    )
