"""GGUF metadata to the keys of a Hugging Face config.json. Knows no bytes and no tensor data.

One key has no counterpart in Hugging Face:

    elute_rope_frequency_factors  [head_dim / 2] divisors of the inverse frequencies

GGUF keeps llama3's rope scaling only as that table (tensor rope_freqs.weight); rope_scaling is then
absent. Of sliding windows, one as long as the context or longer is left out: it hides nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elute.errors import FormatError, UnsupportedError
from elute.formats.gguf_header import AGAIN, GgufHeader, show
from elute.formats.gguf_names import ARCHITECTURES, EXPERTS, Architecture

logger = logging.getLogger(__name__)

MAX_SIZE = 1 << 31  # of any dimension or count
GEMMA3_PERIOD = 6  # five sliding layers, then a full one; in the file only where it differs
GEMMA3_LOCAL_BASE = 10000.0
GEMMA3_27B_LAYERS = 62  # the one size that scales attention by hidden_size / heads, not head_dim
SOFTMAX_GATING = 1  # of llama.cpp's gating functions; the key is absent where it is this one
_REQUIRED = object()


class _Keys:
    """The metadata of one architecture, read with types and ranges checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
        self._path = path
        self._metadata = metadata
        self._architecture = architecture

    def error(self, key: str, found: Any, wanted: str) -> FormatError:
        return FormatError(
            f"{self._path}: key {self.full(key)!r}: found {_brief(found)}, wanted {wanted}; {AGAIN}"
        )

    def full(self, key: str) -> str:
        """The key as the file spells it: the architecture's name before its own keys."""
        shared = ("tokenizer.", "general.", "split.", f"{self._architecture}.")
        return key if key.startswith(shared) else f"{self._architecture}.{key}"

    def _raw(self, key: str, default: Any) -> tuple[str, Any]:
        key = self.full(key)
        found = self._metadata.get(key, default)
        if found is _REQUIRED:
            raise FormatError(f"{self._path}: key {key!r}: found nothing, wanted a value; {AGAIN}")
        return key, found

    def integer(self, key: str, default: Any = _REQUIRED, *, at_least: int = 1) -> Any:
        """-> int, or `default`. A list of equal numbers (one a layer) counts as that number."""
        key, found = self._raw(key, default)
        if found is default:
            return default
        if isinstance(found, list) and found and all(value == found[0] for value in found):
            found = found[0]
        elif isinstance(found, list) and found:
            raise UnsupportedError(
                f"{self._path}: key {key!r}: found {_brief(found)}, which varies by layer, wanted "
                "one number; use another model"
            )
        if (
            isinstance(found, bool)
            or not isinstance(found, int)
            or not at_least <= found < MAX_SIZE
        ):
            raise self.error(key, found, f"an integer from {at_least} to {MAX_SIZE - 1}")
        return found

    def number(self, key: str, default: Any = _REQUIRED, *, positive: bool = True) -> Any:
        """-> float, or `default`. f32 becomes its shortest decimal: 1e-05, not 9.99e-06."""
        key, found = self._raw(key, default)
        if found is default:
            return default
        if (
            isinstance(found, bool)
            or not isinstance(found, int | float)
            or not math.isfinite(found)
        ):
            raise self.error(key, found, "a finite number")
        if positive and found <= 0:
            raise self.error(key, found, "a number above 0")
        with np.errstate(over="ignore"):
            short = float(str(np.float32(found)))
        in_range = math.isfinite(short) and (short != 0) == (found != 0)
        return short if in_range else float(found)

    def flags(self, key: str, n: int) -> list[bool] | None:
        """-> a list of n bools, or None where the key is absent or no list."""
        key, found = self._raw(key, None)
        if not isinstance(found, list):
            return None
        if len(found) != n or not all(isinstance(flag, bool) for flag in found):
            raise self.error(key, found, f"a period or {n} bools")
        return found

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        key, found = self._raw(key, default)
        if found is not default and not isinstance(found, str):
            raise self.error(key, found, "a string")
        return found


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_architecture(header: GgufHeader) -> Architecture:
    """Raises UnsupportedError for what is not one whole language model of a known architecture."""
    keys = _Keys(header.path, header.metadata, "")
    name = keys.text("general.architecture")
    kind = keys.text("general.type", "model")
    if kind != "model":
        raise UnsupportedError(
            f"{header.path}: key 'general.type': found {show(kind)}, wanted 'model'; give the "
            "language model itself"
        )
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{header.path}: key 'general.architecture': found {show(name)}, wanted one of "
            f"{', '.join(ARCHITECTURES)}; use a model of one of these"
        )
    n_parts = keys.integer("split.count", 1, at_least=0)
    if n_parts > 1:
        raise UnsupportedError(
            f"{header.path}: key 'split.count': found {n_parts} parts, wanted one file; join them "
            "with llama-gguf-split --merge"
        )
    return ARCHITECTURES[name]


def read_config(
    header: GgufHeader, architecture: Architecture, read_factors: Callable[[], Sequence[float]]
) -> dict[str, Any]:
    """-> the keys of config.json. read_factors reads rope_freqs.weight, where there is one.

    Raises FormatError for missing keys and values out of range, UnsupportedError for what no family
    computes.
    """
    tensors = header.tensors
    keys = _Keys(header.path, header.metadata, header.metadata["general.architecture"])
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": _head_dim(header, keys, hidden, heads),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length"),
        "vocab_size": _vocab_size(header, keys),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": architecture.model_type == "qwen2" or "blk.0.attn_q.bias" in tensors,
        "hidden_act": architecture.hidden_act,
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }
    if config["num_hidden_layers"] > len(tensors):
        raise keys.error(
            "block_count",
            config["num_hidden_layers"],
            f"at most the {len(tensors)} tensors in the file",
        )
    if heads % config["num_key_value_heads"]:
        raise keys.error(
            "attention.head_count_kv", config["num_key_value_heads"], f"a divisor of {heads} heads"
        )
    config |= _experts(header, keys, config)
    scaling = _rope_scaling(header, keys, config["max_position_embeddings"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    config |= _token_ids(keys, config["vocab_size"])
    if architecture.model_type == "gemma3_text":
        config |= _gemma3(keys, config)
        return config
    if config["model_type"] == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if architecture.model_type == "llama" and "rope_freqs.weight" in tensors:
        config["elute_rope_frequency_factors"] = list(read_factors())
    if architecture.model_type == "bitnet":
        config["hidden_act"] = _bitnet_activation(header)
    window = keys.integer("attention.sliding_window", 0, at_least=0)
    if 0 < window < config["max_position_embeddings"]:
        config |= _window(header, config, window)
    return config


def _experts(header: GgufHeader, keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a mixture of experts. Hugging Face calls a llama with experts mixtral."""
    model_type = config["model_type"]
    if model_type in EXPERTS:
        count = keys.integer("expert_count")
    else:
        count = keys.integer("expert_count", 0, at_least=0)
    if not count:
        return {}
    for key, plain in (
        ("expert_shared_count", (0,)),
        ("expert_gating_func", (SOFTMAX_GATING,)),
        ("expert_weights_scale", (0.0, 1.0)),  # both mean none
    ):
        found = keys.number(key, plain[0], positive=False)
        if found not in plain:
            raise UnsupportedError(
                f"{header.path}: key {keys.full(key)!r}: found {found:g}, wanted {plain[-1]:g}: "
                "experts that all tokens share, and shares other than softmax's, are not "
                "implemented; use another model"
            )
    if model_type not in EXPERTS and (model_type != "llama" or config["attention_bias"]):
        raise UnsupportedError(
            f"{header.path}: found {count} experts a layer in a {model_type} model"
            f"{' with biases' if model_type == 'llama' else ''}, wanted none; use another model"
        )
    known: dict[str, Any] = {"num_experts_per_tok": keys.integer("expert_used_count")}
    if known["num_experts_per_tok"] > count:
        raise keys.error("expert_used_count", known["num_experts_per_tok"], f"at most {count}")
    width = keys.integer("expert_feed_forward_length", config["intermediate_size"])
    if model_type == "llama":
        known |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    else:
        # llama.cpp knows it from the architecture, and writes no key.
        known["norm_topk_prob"] = model_type == "qwen3_moe"
    names = EXPERTS[known.get("model_type", model_type)]
    return known | {names.count: count, names.width: width}


def _window(header: GgufHeader, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The keys that make every layer slide. Hugging Face calls a llama with a window mistral."""
    if config["model_type"] in ("mixtral", "qwen3_moe"):
        return {"sliding_window": window, "use_sliding_window": True}
    is_llama = config["model_type"] == "llama"
    has_bias = config["attention_bias"] or config.get("mlp_bias", False)
    if config["model_type"] in ("bitnet", "olmoe") or (is_llama and has_bias):
        raise UnsupportedError(
            f"{header.path}: found a sliding window of {window} in a {config['model_type']} model "
            f"{'with biases' if is_llama else 'of any kind'}, wanted none; use another model"
        )
    if is_llama:
        return {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": window,
        }
    return {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}


def _head_dim(header: GgufHeader, keys: _Keys, hidden: int, heads: int) -> int:
    head_dim: int = keys.integer("attention.key_length", 0)
    if not head_dim:
        if hidden % heads:
            raise keys.error(
                "attention.head_count", heads, f"a divisor of the embedding length {hidden}"
            )
        head_dim = hidden // heads
    if head_dim % 2:
        raise keys.error("attention.key_length", head_dim, "an even number")
    for key in ("attention.value_length", "rope.dimension_count"):
        other = keys.integer(key, head_dim)
        if other != head_dim:
            raise UnsupportedError(
                f"{header.path}: key {keys.full(key)!r}: found {other}, wanted the head width "
                f"{head_dim}; use another model"
            )
    return head_dim


def _vocab_size(header: GgufHeader, keys: _Keys) -> int:
    """Rows of the embedding: the file's own vocab_size key is often absent and sometimes stale."""
    info = header.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise FormatError(
            f"{header.path}: tensor 'token_embd.weight': found "
            f"{'nothing' if info is None else list(info.shape)}, wanted a matrix; {AGAIN}"
        )
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    if isinstance(tokens, list) and len(tokens) > info.shape[0]:
        raise keys.error(
            "tokenizer.ggml.tokens",
            f"{len(tokens)} tokens",
            f"at most {info.shape[0]}, one a row of the embedding",
        )
    return info.shape[0]


def _token_ids(keys: _Keys, vocabulary: int) -> dict[str, Any]:
    def token(kind: str) -> int | None:
        key = f"tokenizer.ggml.{kind}_token_id"
        found: int | None = keys.integer(key, None, at_least=0)
        if found is not None and found >= vocabulary:
            raise keys.error(key, found, f"a token below {vocabulary}")
        return found

    ids: dict[str, Any] = {"bos_token_id": token("bos"), "pad_token_id": token("padding")}
    # llama.cpp ends a generation at any of the three; Hugging Face lists them.
    ends = [end for end in map(token, ("eos", "eot", "eom")) if end is not None]
    ends = list(dict.fromkeys(ends))
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return {key: value for key, value in ids.items() if value is not None}


def _rope_scaling(header: GgufHeader, keys: _Keys, context: int) -> dict[str, Any] | None:
    legacy = keys.number("rope.scale_linear", 1.0)  # before August 2023
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", legacy)
    if kind == "none":
        return None
    if kind == "linear":
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedError(
            f"{header.path}: key {keys.full('rope.scaling.type')!r}: found {show(kind)}, "
            "wanted none, linear or yarn; use another model"
        )
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", context
        ),
    }
    attention_factor = keys.number("rope.scaling.attn_factor", None)
    optional = {
        "attention_factor": keys.number("rope.scaling.yarn_attn_factor", attention_factor),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", None),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", None),
    }
    return scaling | {key: value for key, value in optional.items() if value is not None}


def _gemma3(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = keys.integer("attention.sliding_window", 0, at_least=0)
    types = _layer_types(keys, layers) if window else ["full_attention"] * layers
    softcap = keys.number("final_logit_softcapping", None)
    if layers == GEMMA3_27B_LAYERS:
        query_scalar = config["hidden_size"] // config["num_attention_heads"]
    else:
        query_scalar = config["head_dim"]
    gemma3 = {
        "hidden_activation": config["hidden_act"],
        "query_pre_attn_scalar": query_scalar,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", GEMMA3_LOCAL_BASE),
        "layer_types": types,
        # Gemma was trained with its embedding scale rounded to bf16, whatever the file holds now.
        "dtype": "bfloat16",
    }
    if window:
        gemma3["sliding_window"] = window
    if softcap is not None:
        gemma3["final_logit_softcapping"] = softcap
    return gemma3


def _layer_types(keys: _Keys, layers: int) -> list[str]:
    """From one flag a layer, or from the period whose last layer attends to everything."""
    flags = keys.flags("attention.sliding_window_pattern", layers)
    if flags is None:
        period = keys.integer("attention.sliding_window_pattern", GEMMA3_PERIOD)
        flags = [bool((layer + 1) % period) for layer in range(layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in flags]


def _bitnet_activation(header: GgufHeader) -> str:
    """b1.58-2B-4T squares a relu; older bitnet_b1_58 models, with Llama 2's tokenizer, use silu.

    The architecture 'bitnet' stands for both, and no key tells them apart.
    """
    if header.metadata["general.architecture"] != "bitnet":
        return "relu2"
    model = header.metadata.get("tokenizer.ggml.model")
    activation = "silu" if model == "llama" else "relu2"
    logger.warning(
        "%s: architecture 'bitnet' does not say its activation; taking %s, as tokenizer.ggml.model "
        "is %r",
        header.path,
        activation,
        model,
    )
    return activation
