"""Qwen2 and Qwen2.5: Llama with biases on q, k and v; upper layers slide if the config says so."""

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


def qwen2(config: Config) -> OpList:
    sizes = read_sizes(config)
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
        qkv_bias=True,
    ).op_list()


def qwen_windows(config: Config, n_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: from max_window_layers up, and only with use_sliding_window."""
    window: int | None = None
    if config.flag("use_sliding_window", False):
        window = config.count("sliding_window", 4096)
    first = n_layers if window is None else config.index("max_window_layers", 28)
    default = tuple(
        SLIDING_ATTENTION if layer >= first else FULL_ATTENTION for layer in range(n_layers)
    )
    return windows_of(config, read_layer_types(config, default), window)
