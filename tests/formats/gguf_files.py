"""Tiny GGUF files, written by the gguf library from weights in Hugging Face's convention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 64, 96, 2, 4, 2, 16, 48
NORMS = {
    "llama": (),
    "qwen2": (),
    "qwen3": ("self_attn.q_norm", "self_attn.k_norm"),
    "gemma3": (
        "self_attn.q_norm",
        "self_attn.k_norm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "bitnet": ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm"),
}
STEMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_STEMS = STEMS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def random_weights(architecture: str, *, biases: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Hugging Face names to f32 weights."""
    rng = np.random.default_rng(7)
    q, kv = HEADS * WIDTH, KV_HEADS * WIDTH
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes[f"{at}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}post_attention_layernorm.weight"] = (HIDDEN,)
        for norm in NORMS[architecture]:
            size = {"q_norm": WIDTH, "k_norm": WIDTH, "ffn_sub_norm": FFN}.get(norm.split(".")[-1])
            shapes[f"{at}{norm}.weight"] = (size or HIDDEN,)
        for name, shape in {
            "self_attn.q_proj": (q, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            shapes[f"{at}{name}.weight"] = shape
            if name.split(".")[-1] in biases:
                shapes[f"{at}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (HIDDEN,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


EXPERTS, EXPERT_WIDTH = 6, 32
# model_type: the file's architecture; the block, gate, up, down; the experts' width
MIXTURES = {
    "mixtral": ("llama", "block_sparse_moe", "w1", "w3", "w2", FFN),
    "qwen3_moe": ("qwen3moe", "mlp", "gate_proj", "up_proj", "down_proj", EXPERT_WIDTH),
    "olmoe": ("olmoe", "mlp", "gate_proj", "up_proj", "down_proj", FFN),
}


def random_mixture(model_type: str) -> dict[str, np.ndarray]:
    """Hugging Face names to f32 weights of a model of experts."""
    rng = np.random.default_rng(7)
    _, block, gate, up, down, width = MIXTURES[model_type]
    weights = {
        name: weight for name, weight in random_weights("llama").items() if ".mlp." not in name
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {f"{block}.gate": (EXPERTS, HIDDEN)}
        if model_type != "mixtral":
            whole = model_type == "olmoe"
            shapes["self_attn.q_norm"] = (HEADS * WIDTH if whole else WIDTH,)
            shapes["self_attn.k_norm"] = (KV_HEADS * WIDTH if whole else WIDTH,)
        for expert in range(EXPERTS):
            for name in (gate, up):
                shapes[f"{block}.experts.{expert}.{name}"] = (width, HIDDEN)
            shapes[f"{block}.experts.{expert}.{down}"] = (HIDDEN, width)
        for name, shape in shapes.items():
            weights[f"{at}{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
    return weights


def write_mixture(
    path: Path,
    model_type: str,
    *,
    keys: Mapping[str, Any] | None = None,
    merged: bool = True,
    **options: Any,
) -> Path:
    """A file of random_mixture, each kind of matrix of a layer's experts in one tensor; not
    merged: without those.
    """
    architecture, block, gate, up, down, _ = MIXTURES[model_type]
    weights = random_mixture(model_type)
    dense = {name: weight for name, weight in weights.items() if f".{block}." not in name}
    raw: dict[str, tuple[np.ndarray, T]] = {}
    for layer in range(LAYERS):
        at, to = f"model.layers.{layer}.{block}.", f"blk.{layer}."
        raw[f"{to}ffn_gate_inp.weight"] = (weights[f"{at}gate.weight"], T.F32)
        for stem, name in (("gate", gate), ("up", up), ("down", down)) if merged else ():
            each = [weights[f"{at}experts.{expert}.{name}.weight"] for expert in range(EXPERTS)]
            tensor = f"{to}ffn_{stem}_exps.weight"
            kind = options.get("types", {}).get(tensor, T.F32)
            raw[tensor] = (gguf.quants.quantize(np.stack(each), kind), kind)
    at = f"{architecture}."
    found = {at + "expert_count": EXPERTS, at + "expert_used_count": 2}
    if model_type == "qwen3_moe":
        found[at + "expert_feed_forward_length"] = EXPERT_WIDTH
    options["raw"] = raw | options.get("raw", {})
    return write_gguf(path, architecture, dense, keys=found | dict(keys or {}), **options)


def to_gguf(architecture: str, name: str, weights: np.ndarray) -> tuple[str, np.ndarray]:
    """What llama.cpp's converter makes of a Hugging Face tensor."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if architecture == "llama" and ".q_proj." in name:
        weights = permuted(weights, HEADS)
    if architecture == "llama" and ".k_proj." in name:
        weights = permuted(weights, KV_HEADS)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        weights = weights + 1
    if name in top:
        return top[name], weights
    _, _, layer, *stem, kind = name.split(".")
    stems = GEMMA_STEMS if architecture == "gemma3" else STEMS
    return f"blk.{layer}.{stems['.'.join(stem)]}.{kind}", weights


def permuted(weights: np.ndarray, n_heads: int) -> np.ndarray:
    half = weights.shape[0] // n_heads // 2
    split = weights.reshape(n_heads, 2, half, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    file_architecture: str | None = None,
    keys: Mapping[str, Any] | None = None,
    types: Mapping[str, T] | None = None,
    raw: Mapping[str, tuple[np.ndarray, T]] | None = None,
) -> Path:
    """keys and raw replace or add; a key of None is left out; types quantize GGUF tensors."""
    weights = random_weights(architecture) if weights is None else weights
    file_architecture = file_architecture or architecture
    arch = f"{file_architecture}."
    metadata: dict[str, Any] = {
        arch + "context_length": 512,
        arch + "embedding_length": HIDDEN,
        arch + "feed_forward_length": FFN,
        arch + "block_count": LAYERS,
        arch + "attention.head_count": HEADS,
        arch + "attention.head_count_kv": KV_HEADS,
        arch + "attention.layer_norm_rms_epsilon": 1e-5,
        arch + "attention.key_length": WIDTH,
        arch + "attention.value_length": WIDTH,
        arch + "rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata |= keys or {}
    writer = gguf.GGUFWriter(path, file_architecture)
    for key, value in metadata.items():
        if key == "general.architecture":
            writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.STRING)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    tensors = dict(to_gguf(architecture, name, tensor) for name, tensor in weights.items())
    stored: dict[str, tuple[np.ndarray, T]] = {}
    for name, tensor in tensors.items():
        kind = (types or {}).get(name, T.F32)
        stored[name] = (gguf.quants.quantize(tensor, kind), kind)
    for name, (tensor, kind) in (stored | dict(raw or {})).items():
        writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
