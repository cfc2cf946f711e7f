"""A tiny llama as a Hugging Face folder, without torch: for tests that need files, not a family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_keys, tiny_tokenizer_json

from elute.model.families import FAMILIES, op_list
from elute.model.weights import weight_shapes


def save_tiny_folder(
    folder: Path, *, seed: int = 0, template: bool = True, family: str = "llama"
) -> Path:
    """-> folder. The weights are random, large enough that the answer depends on the prompt."""
    config = {
        **tiny_keys(family),
        "architectures": [FAMILIES[family].architectures[0]],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    random = np.random.default_rng(seed)
    weights = {
        name: random.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1)
        for name, shape in weight_shapes(op_list(config)).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json())
    names = {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[2]}
    if template:
        names["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    advice = {"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(advice))
    return folder
