"""Architectures by name: config in, op list out. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elute.model.config import Config, shown
from elute.model.families.bitnet import bitnet
from elute.model.families.gemma3 import gemma3
from elute.model.families.llama import llama, mistral
from elute.model.families.mixtral import mixtral
from elute.model.families.olmoe import olmoe
from elute.model.families.qwen2 import qwen2
from elute.model.families.qwen3 import qwen3
from elute.model.families.qwen3_moe import qwen3_moe
from elute.model.ops import OpList


@dataclass(frozen=True)
class Family:
    """A builder and the classes of transformers whose weights it describes."""

    build: Callable[[Config], OpList]
    architectures: tuple[str, ...]


FAMILIES: Mapping[str, Family] = {
    "llama": Family(llama, ("LlamaForCausalLM", "LLaMAForCausalLM")),
    "mistral": Family(mistral, ("MistralForCausalLM",)),
    "qwen2": Family(qwen2, ("Qwen2ForCausalLM",)),
    "qwen3": Family(qwen3, ("Qwen3ForCausalLM",)),
    "mixtral": Family(mixtral, ("MixtralForCausalLM",)),
    "qwen3_moe": Family(qwen3_moe, ("Qwen3MoeForCausalLM",)),
    "olmoe": Family(olmoe, ("OlmoeForCausalLM",)),
    "gemma3_text": Family(gemma3, ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")),
    # The picture-and-text wrapper, whose text_config the reader has laid flat.
    "gemma3": Family(gemma3, ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM")),
    "bitnet": Family(bitnet, ("BitNetForCausalLM", "BitnetForCausalLM")),
}


def op_list(config: Mapping[str, Any]) -> OpList:
    """What the model of this config.json computes.

    Raises UnsupportedError for an unknown model_type, a class that does not generate, or a feature
    that elute lacks; FormatError for a missing or impossible value.
    """
    checked = Config(config)
    model_type = checked.text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        raise checked.unsupported(f"model_type is {shown(model_type)}", ", ".join(sorted(FAMILIES)))
    architectures = checked.texts("architectures")
    if architectures and not set(architectures) & set(family.architectures):
        found = f"architectures of {model_type} is {shown(list(architectures))}"
        raise checked.unsupported(found, ", ".join(family.architectures))
    return family.build(checked)
