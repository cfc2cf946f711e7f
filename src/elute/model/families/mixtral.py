"""Mixtral: Mistral with experts in every layer, whose gate, up and down are w1, w3 and w2."""

from __future__ import annotations

from elute.model.config import Config
from elute.model.families.decoder import Decoder, Mixture, read_mixture_sizes, read_sizes
from elute.model.ops import OpList
from elute.model.rope import rope_table


def mixtral(config: Config) -> OpList:
    sizes = read_sizes(config)
    n_experts, top_k = read_mixture_sizes(
        config, ("num_local_experts", "num_experts"), sizes.n_layers
    )
    return Decoder(
        sizes=sizes,
        activation=config.activation("hidden_act", "silu"),
        eps=config.number("rms_norm_eps", 1e-5),
        tied=config.flag("tie_word_embeddings", False),
        windows=(config.optional_count("sliding_window"),) * sizes.n_layers,
        ropes=("rope",) * sizes.n_layers,
        rope_tables={
            "rope": rope_table(config, head_width=sizes.head_width, default_theta=1_000_000.0)
        },
        attention_scale=sizes.head_width**-0.5,
        mixture=Mixture(
            n_experts=n_experts,
            top_k=top_k,
            width=sizes.intermediate,
            normalized=True,
            layers=(True,) * sizes.n_layers,
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
        ),
    ).op_list()
