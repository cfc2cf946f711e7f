"""The tiny checkpoints that other tests stand on: transformers reads what we wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import (
    FAMILIES,
    MIXTURES,
    config_and_weights,
    save_tiny_checkpoint,
    tiny_checkpoint,
    tiny_model,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoint_opens_in_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny_checkpoint(tmp_path / family, family, tie_word_embeddings=True)
    config, weights = tiny_checkpoint(family, tie_word_embeddings=True)
    assert json.loads((folder / "config.json").read_text()) == config
    on_disk = load_file(folder / "model.safetensors")
    assert on_disk.keys() == weights.keys()
    opened = config_and_weights(AutoModelForCausalLM.from_pretrained(folder))[1]
    for name, weight in weights.items():
        assert (on_disk[name] == weight).all(), name
        assert (opened[name] == weight).all(), name


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_have_the_names_under_which_transformers_saves_them(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    weights = config_and_weights(model)[1]
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        assert (saved[name] == weight).all(), name


def test_tokenizer_is_lossless_and_chats(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_checkpoint(tmp_path, "llama"))
    text = "the cat  sat\n\tnaïve 東京 🦀\x00"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 288
    assert len(ids) < len(text.encode())
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(chat)[0] == 1


def test_seeds_give_the_same_and_other_weights() -> None:
    (_, one), (_, same), (_, other) = (tiny_checkpoint("llama", seed=seed) for seed in (1, 1, 2))
    for name, weight in one.items():
        assert (weight == same[name]).all(), name
        assert not np.allclose(weight, other[name]), name
