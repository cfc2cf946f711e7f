"""What op_list refuses: every bad value is one sentence of an EluteError, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_keys

from elute.errors import EluteError, FormatError, UnsupportedError
from elute.model.config import Config
from elute.model.families import op_list
from elute.model.families.gemma3 import gemma3
from elute.model.ops import Attention, Embed, Experts
from elute.model.weights import weight_shapes

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
COUNTS = (*SIZES, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # without defaults and with them
@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [0, -1, "64", 2.5, True, [64], {}, 2**31, 10**400, float("nan")])
def test_counts_are_whole_numbers_above_zero(family: str, key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"config.json: {key} is .*, wanted .* number") as caught:
        op_list(tiny_keys(family, **{key: value}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", [*SIZES, "num_attention_heads", "max_position_embeddings"])
def test_missing_sizes_are_named(key: str) -> None:
    keys = tiny_keys("llama")
    del keys[key]
    with pytest.raises(FormatError, match=f"config.json: found no {key}, wanted a whole number"):
        op_list(keys)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "kv heads": (
        "llama",
        {"num_key_value_heads": 3},
        "num_attention_heads is 4, wanted a multiple",
    ),
    "more kv heads": (
        "llama",
        {"num_key_value_heads": 8},
        "num_attention_heads is 4, wanted a mul",
    ),
    "uneven heads": ("llama", {"hidden_size": 66}, "hidden_size is 66, wanted head_dim, or a mult"),
    "odd head": ("llama", {"head_dim": 15}, "head_dim .* is 15, wanted an even number"),
    "odd derived head": ("llama", {"hidden_size": 60}, "head_dim .* is 15, wanted an even number"),
    "zero head": ("llama", {"head_dim": 0}, "head_dim is 0, wanted a whole number"),
    "deep": ("llama", {"num_hidden_layers": 10**6}, "wanted a whole number from 1 to 4096"),
    "eps": ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0, wanted a number above"),
    "eps huge": ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*, wanted a num"),
    "eps unprintable": ("llama", {"rms_norm_eps": 10**5000}, "rms_norm_eps is a value too long"),
    "bias": ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes', wanted true or false"),
    "tied": ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, wanted true or false"),
    "activation": ("llama", {"hidden_act": 3}, "hidden_act is 3, wanted a string"),
    "type": ("llama", {"model_type": ["llama"]}, "model_type is .*, wanted a string"),
    "architecture": ("llama", {"architectures": "x"}, "architectures is 'x', wanted a list of str"),
    "architectures": ("llama", {"architectures": [1]}, r"architectures is \[1\], wanted a list of"),
    "window": ("mistral", {"sliding_window": 0}, "sliding_window is 0, wanted a whole number"),
    "few layer types": (
        "qwen3",
        {"layer_types": ["full_attention"]},
        "layer_types has 1 entries, wanted num_hidden_layers = 2",
    ),
    "layer type": (
        "qwen3",
        {"layer_types": ["full_attention", "linear_attention"]},
        r"layer_types\[1\] is 'linear_attention', wanted full_attention or sliding_attention",
    ),
    "no window": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
        r"layer_types\[1\] is sliding_attention but no sliding_window is in force",
    ),
    "first sliding layer": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": -1},
        "max_window_layers is -1, wanted a whole number from 0",
    ),
    "pattern": ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    "scalar": ("gemma3_text", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1, wanted"),
    "softcap": ("gemma3_text", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
    "dtype": ("gemma3_text", {"dtype": 16}, "dtype is 16, wanted a string"),
    "no experts": (
        "mixtral",
        {"num_local_experts": None},
        "found no num_local_experts, wanted a w",
    ),
    "many experts": ("olmoe", {"num_experts": 40_000}, "wanted a whole number from 1 to 32768"),
    "more picked": ("olmoe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, wanted .* 8"),
    "dense layers": (
        "qwen3_moe",
        {"mlp_only_layers": [-1]},
        r"mlp_only_layers is \[-1\], wanted a",
    ),
    "no step": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, wanted a who"),
    "norm of heads": ("olmoe", {"head_dim": 32}, r"head_dim is 128, wanted hidden_size \(64\)"),
    "wide": ("bitnet", {"head_dim": 32}, r"head_dim is 128, wanted hidden_size \(64\)"),
}


@pytest.mark.parametrize(("family", "keys", "message"), BAD.values(), ids=BAD.keys())
def test_bad_values_are_one_sentence(family: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        op_list({**tiny_keys(family), **keys})
    assert "\n" not in str(caught.value)


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "model type": (
        "llama",
        {"model_type": "mamba"},
        "model_type is 'mamba', and elute runs bitnet, gemma3, gemma3_text, llama, mistral, "
        "mixtral, olmoe, qwen2, "
        "qwen3, qwen3_moe; use",
    ),
    "class": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        r"architectures of llama is \['LlamaForSequenceClassification'\], and elute runs LlamaFor",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and elute runs gelu_py"),
    "bidirectional": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is true",
    ),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, and elute runs queries, keys and va"),
    "shared": ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts is 1, and elute runs expe"),
    "rope": ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'"),
}


@pytest.mark.parametrize(
    ("family", "keys", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys()
)
def test_unsupported_models_name_what_is(family: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        op_list({**tiny_keys(family), **keys})


def test_empty_config_names_the_missing_model_type() -> None:
    with pytest.raises(FormatError, match=r"config\.json: found no model_type, wanted a string"):
        op_list({})


def test_whole_floats_count() -> None:
    assert op_list(tiny_keys("llama", hidden_size=64.0)).registers["hidden"] == 64


# What their config.json says, as far as it is about sizes; millions of weights in all, and those
# that a token multiplies, embedding apart.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Mixtral-8x7B-v0.1": (
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
        46_703,
        12_749,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 48,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
        30_532,
        3_042,
    ),
}


@pytest.mark.parametrize(("keys", "total", "used"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_mixtures_have_their_sizes(keys: dict[str, Any], total: int, used: int) -> None:
    ops = op_list(keys)
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(ops).items()}
    assert round(sum(sizes.values()) / 1e6) == total
    experts = [op for op in ops.ops if isinstance(op, Experts)]
    unused = sum(
        sum(sizes[name] for name in op.matrices()) * (len(op.gates) - op.top_k) // len(op.gates)
        for op in experts
    )
    embedding = keys["vocab_size"] * keys["hidden_size"]
    assert round((sum(sizes.values()) - unused - embedding) / 1e6) == used


def test_gemma3_wrapper_is_gemma3_text() -> None:
    keys = tiny_keys("gemma3_text", architectures=["Gemma3ForConditionalGeneration"])
    text, wrapped = op_list(keys), op_list({**keys, "model_type": "gemma3"})
    assert text.ops == wrapped.ops


def test_gemma3_left_out_keys_have_the_defaults_of_transformers() -> None:
    """The text_config of gemma-3-4b names little more than its widths and its scaling."""
    from transformers import Gemma3TextConfig

    keys = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    few, all_keys = gemma3(Config(keys)), gemma3(Config(Gemma3TextConfig(**keys).to_dict()))
    assert few.ops == all_keys.ops
    assert few.registers == all_keys.registers
    assert (few.vocabulary, few.context) == (all_keys.vocabulary, all_keys.context)
    for name, table in few.rope_tables.items():
        assert (table.inverse_frequencies == all_keys.rope_tables[name].inverse_frequencies).all()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    # sqrt(3072) = 55.4256; bf16 keeps 8 bits of it: steps of 0.25, f16 11 bits: steps of 1/32
    [({"dtype": "bfloat16"}, 55.5), ({"torch_dtype": "float16"}, 55.4375), ({}, 55.42562484741211)],
)
def test_gemma3_embed_scale_is_rounded_to_the_checkpoint(
    dtype: dict[str, str], scale: float
) -> None:
    first = op_list(tiny_keys("gemma3_text", hidden_size=3072, **dtype)).ops[0]
    assert isinstance(first, Embed)
    assert first.scale == scale


def test_windows_of_gemma3_follow_the_pattern() -> None:
    ops = op_list(tiny_keys("gemma3_text", num_hidden_layers=7, sliding_window_pattern=3)).ops
    windows = [op.window for op in ops if isinstance(op, Attention)]
    assert windows == [6, 6, None, 6, 6, None, 6]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "silu", "yarn", "full_attention"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = sorted(
    {key for family in FAMILIES for key in tiny_keys(family)}
    | {
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "layer_types",
        "attention_bias",
        "hidden_act",
    }
)


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(FAMILIES), keys=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3)
)
def test_any_json_value_builds_or_is_refused_in_one_sentence(
    family: str, keys: dict[str, Any]
) -> None:
    try:
        op_list({**tiny_keys(family), **keys})
    except EluteError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert len(message) < 500
