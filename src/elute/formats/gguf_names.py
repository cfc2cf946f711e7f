"""Which tensors a GGUF architecture has, and what Hugging Face calls them. Knows no bytes.

Source: llama.cpp, gguf-py/gguf/tensor_mapping.py and its converters of these architectures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Sizes are config keys; q and kv are heads times head width.
_VECTORS = {
    "attn_norm": ("input_layernorm", "hidden_size"),
    "attn_q_norm": ("self_attn.q_norm", "head_dim"),
    "attn_k_norm": ("self_attn.k_norm", "head_dim"),
    "attn_sub_norm": ("self_attn.attn_sub_norm", "q"),
    "post_attention_norm": ("post_attention_layernorm", "hidden_size"),
    "post_ffw_norm": ("post_feedforward_layernorm", "hidden_size"),
    "ffn_sub_norm": ("mlp.ffn_sub_norm", "intermediate_size"),
}
_MATRICES = {
    "attn_q": ("self_attn.q_proj", "q", "hidden_size"),
    "attn_k": ("self_attn.k_proj", "kv", "hidden_size"),
    "attn_v": ("self_attn.v_proj", "kv", "hidden_size"),
    "attn_output": ("self_attn.o_proj", "hidden_size", "q"),
    "ffn_gate": ("mlp.gate_proj", "intermediate_size", "hidden_size"),
    "ffn_up": ("mlp.up_proj", "intermediate_size", "hidden_size"),
    "ffn_down": ("mlp.down_proj", "hidden_size", "intermediate_size"),
}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_FFN = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class ExpertNames:
    """Of the experts of a layer, in Hugging Face's convention; GGUF has one tensor for all gates.

    count, width    config keys
    """

    block: str
    gate: str
    up: str
    down: str
    count: str
    width: str


# By the model_type of the config: a llama with experts is a mixtral.
EXPERTS: Mapping[str, ExpertNames] = {
    "mixtral": ExpertNames(
        "block_sparse_moe", "w1", "w3", "w2", "num_local_experts", "intermediate_size"
    ),
    "qwen3_moe": ExpertNames(
        "mlp", "gate_proj", "up_proj", "down_proj", "num_experts", "moe_intermediate_size"
    ),
    "olmoe": ExpertNames(
        "mlp", "gate_proj", "up_proj", "down_proj", "num_experts", "intermediate_size"
    ),
}


@dataclass(frozen=True)
class Architecture:
    """What distinguishes the GGUF tensors of an architecture.

    ffn_norm            the Hugging Face name of GGUF's ffn_norm
    attention_biases    matrices that have a bias where config["attention_bias"]
    is_interleaved      rows of q and k pair channel 2i with 2i + 1, not i with i + head_width / 2
    norm_offset         what the converter added to every norm weight
    norms_all_heads     q and k norms are over all heads at once
    """

    model_type: str
    class_name: str
    hidden_act: str
    norms: tuple[str, ...] = ("attn_norm",)
    ffn_norm: str = "post_attention_layernorm"
    attention_biases: tuple[str, ...] = _ATTENTION
    is_interleaved: bool = False
    norm_offset: float = 0.0
    norms_all_heads: bool = False


_BITNET = Architecture(
    model_type="bitnet",
    class_name="BitNetForCausalLM",
    hidden_act="relu2",
    norms=("attn_norm", "attn_sub_norm", "ffn_sub_norm"),
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", "silu", is_interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", "silu", attention_biases=_ATTENTION[:3]),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", "silu", norms=("attn_norm", "attn_q_norm", "attn_k_norm")
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "silu",
        norms=("attn_norm", "attn_q_norm", "attn_k_norm"),
    ),
    "olmoe": Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        "silu",
        norms=("attn_norm", "attn_q_norm", "attn_k_norm"),
        norms_all_heads=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gelu_pytorch_tanh",
        norms=("attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"),
        ffn_norm="pre_feedforward_layernorm",
        norm_offset=1.0,
    ),
    "bitnet": _BITNET,
    "bitnet-b1.58": _BITNET,
    "bitnet-25": _BITNET,
}


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that the config calls for.

    rope_heads  heads of interleaved rows, 0 for none
    part, parts the GGUF tensor is [parts, *shape], and this is one of them; None: it is all of it
    alone       what it is called where it is a tensor of its own, as in files before April 2024
    """

    gguf_name: str
    name: str
    shape: tuple[int, ...]
    is_norm: bool = False
    rope_heads: int = 0
    part: int | None = None
    parts: int = 1
    alone: str = ""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.part is None else (self.parts, *self.shape)


def expected_tensors(
    architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[ExpectedTensor]:
    """Every tensor of the model, in the order of the forward pass; lm_head only where untied.

    Lazy, so that a hostile layer count costs nothing: the caller stops at the first missing tensor.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = dict(config) | {"q": heads * config["head_dim"], "kv": kv_heads * config["head_dim"]}
    hidden = config["hidden_size"]
    rope_heads = {"attn_q": heads, "attn_k": kv_heads} if architecture.is_interleaved else {}
    vectors = {stem: _VECTORS[stem] for stem in architecture.norms}
    vectors["ffn_norm"] = (architecture.ffn_norm, "hidden_size")
    if architecture.norms_all_heads:
        vectors["attn_q_norm"] = ("self_attn.q_norm", "q")
        vectors["attn_k_norm"] = ("self_attn.k_norm", "kv")
    experts = EXPERTS.get(config["model_type"])
    matrices = {k: v for k, v in _MATRICES.items() if experts is None or k not in _FFN}
    biases = architecture.attention_biases if config["attention_bias"] else ()
    biases += _FFN if config.get("mlp_bias") else ()

    yield ExpectedTensor(
        "token_embd.weight", "model.embed_tokens.weight", (config["vocab_size"], hidden)
    )
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for stem, (name, size) in vectors.items():
            yield ExpectedTensor(
                f"{theirs}{stem}.weight", f"{ours}{name}.weight", (sizes[size],), is_norm=True
            )
        for stem, (name, n, k) in matrices.items():
            of_rope = rope_heads.get(stem, 0)
            yield ExpectedTensor(
                f"{theirs}{stem}.weight",
                f"{ours}{name}.weight",
                (sizes[n], sizes[k]),
                rope_heads=of_rope,
            )
            if stem in biases:
                yield ExpectedTensor(
                    f"{theirs}{stem}.bias", f"{ours}{name}.bias", (sizes[n],), rope_heads=of_rope
                )
        if experts is not None:
            yield from _expected_experts(experts, config, ours, theirs)
    yield ExpectedTensor("output_norm.weight", "model.norm.weight", (hidden,), is_norm=True)
    if not config["tie_word_embeddings"]:
        yield ExpectedTensor("output.weight", "lm_head.weight", (config["vocab_size"], hidden))


def _expected_experts(
    names: ExpertNames, config: Mapping[str, Any], ours: str, theirs: str
) -> Iterator[ExpectedTensor]:
    hidden, width, count = config["hidden_size"], config[names.width], config[names.count]
    path = f"{ours}{names.block}"
    yield ExpectedTensor(f"{theirs}ffn_gate_inp.weight", f"{path}.gate.weight", (count, hidden))
    for expert in range(count):
        for stem, name, shape in (
            ("ffn_gate", names.gate, (width, hidden)),
            ("ffn_up", names.up, (width, hidden)),
            ("ffn_down", names.down, (hidden, width)),
        ):
            yield ExpectedTensor(
                f"{theirs}{stem}_exps.weight",
                f"{path}.experts.{expert}.{name}.weight",
                shape,
                part=expert,
                parts=count,
                alone=f"{theirs}{stem}.{expert}.weight",
            )


def half_split_rows(n_rows: int, n_heads: int) -> npt.NDArray[np.intp]:
    """-> for each stored row its place in half-split order.

    Interleaved row 2i + s of a head goes to row s * width/2 + i of it: the inverse of llama.cpp's
    reshape(n_heads, 2, width/2).swapaxes(1, 2). A head of 8:

        stored  0 1 2 3 4 5 6 7
        goes to 0 4 1 5 2 6 3 7
    """
    half = n_rows // n_heads // 2
    return np.arange(n_rows).reshape(n_heads, 2, half).swapaxes(1, 2).reshape(-1)
