"""Tiny random checkpoints of every family, made with transformers, for the tests of all rooms.

Every parameter is random, also norms and biases, and large enough that attention has contrast: a
model whose norms are all one and whose biases are all zero would hide one that is never applied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

# 256 bytes, three special tokens, 29 merges; a multiple of 32.
VOCABULARY = 288
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
    },
    "bitnet": {},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
FAMILIES = tuple(_FAMILIES)


def tiny_keys(family: str, **overrides: Any) -> dict[str, Any]:
    """The config.json keys that tiny_model sets, as spelled here; `family` is a model_type."""
    return {**_COMMON, **_FAMILIES[family], **overrides, "model_type": family}


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model in f32 with eager attention; overrides are config keys."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # A copy all the way down: transformers changes nested objects in place.
    keys = json.loads(json.dumps(tiny_keys(family, **overrides)))
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    config.dtype = "float32"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    # Gemma stores its norms less one.
    norm_centre = 0.0 if family.startswith("gemma3") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(norm_centre + noise * 0.2)
    return model


def config_and_weights(model: Any) -> tuple[dict[str, Any], dict[str, F32]]:
    """config.json and the tensors that its checkpoint holds: no lm_head where it is tied."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    weights = dict(_as_saved(config["model_type"], model.state_dict()))
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    return config, weights


def _as_saved(family: str, state: Any) -> Iterator[tuple[str, F32]]:
    """transformers holds a layer's experts in two tensors and writes each expert's three."""
    for name, tensor in state.items():
        weight = tensor.numpy()
        if family == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else PROJECTIONS
        path, _, last = name.rpartition(".")
        for expert in range(len(weight) if path.endswith(".experts") else 0):
            if last == "down_proj":
                yield f"{path}.{expert}.{down}.weight", weight[expert]
            else:
                yield f"{path}.{expert}.{gate}.weight", weight[expert, : weight.shape[1] // 2]
                yield f"{path}.{expert}.{up}.weight", weight[expert, weight.shape[1] // 2 :]
        if not path.endswith(".experts"):
            yield name, weight


def tiny_checkpoint(
    family: str, *, seed: int = 0, **overrides: Any
) -> tuple[dict[str, Any], dict[str, F32]]:
    """(config.json as an object, {tensor name: f32 array}) of a random model of `family`."""
    return config_and_weights(tiny_model(family, seed=seed, **overrides))


def save_tiny_checkpoint(folder: Path, family: str, *, seed: int = 0, **overrides: Any) -> Path:
    """A Hugging Face folder: config, weights, byte-level tokenizer, chat template. -> folder"""
    from safetensors.numpy import save_file

    config, weights = tiny_checkpoint(family, seed=seed, **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json())
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "unk_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    generation_config = {"bos_token_id": 0, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2))
    return folder


def tiny_tokenizer_json() -> str:
    """A byte-level BPE of VOCABULARY tokens: every text encodes, and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the cat and the dog sat on the mat while the rain in the hills fell on the other side"
    tokenizer.train_from_iterator([text, text], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return str(tokenizer.to_str())
