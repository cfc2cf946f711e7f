"""Rope tables against transformers' own, at the sizes of published models, in both spellings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elute.errors import FormatError, UnsupportedError
from elute.model.config import Config
from elute.model.rope import FREQUENCY_FACTORS, rope_table

HEAD_WIDTH = 128
SIZES = {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": HEAD_WIDTH}

LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_2_5 = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
    "llama3.1": LLAMA_3_1,
    "llama3.2": {**LLAMA_3_1, "factor": 32.0},
    "llama3 without original context": {
        key: value for key, value in LLAMA_3_1.items() if not key.startswith("original")
    },
    "yarn": QWEN_2_5,
    "yarn factor from the contexts": {**QWEN_2_5, "factor": None},
    "yarn attention factor": {**QWEN_2_5, "attention_factor": 0.75},
    "yarn mscale": {**QWEN_2_5, "mscale": 0.8, "mscale_all_dim": 1.3},
    "yarn mscale alone": {**QWEN_2_5, "mscale": 0.8},
    "yarn mscale zero": {**QWEN_2_5, "mscale": 0.8, "mscale_all_dim": 0},
    "yarn betas, not truncated": {
        **QWEN_2_5,
        "beta_fast": 16.5,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn ramp of one channel": {**QWEN_2_5, "beta_fast": 2, "beta_slow": 2, "truncate": False},
    "yarn factor 1": {**QWEN_2_5, "factor": 1.0},
}


@pytest.mark.parametrize("context", [131_072, 2048])
@pytest.mark.parametrize("parameters", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_table_equals_transformers(parameters: dict[str, Any], context: int, older: bool) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    oracle = LlamaConfig(**SIZES, max_position_embeddings=context, rope_parameters=dict(parameters))
    compute = ROPE_INIT_FUNCTIONS.get(
        parameters["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters
    )
    frequencies, factor = compute(oracle)

    keys: dict[str, Any] = {"max_position_embeddings": context}
    if older:
        scaling = dict(parameters)
        keys["rope_theta"] = scaling.pop("rope_theta")
        scaling["type"] = scaling.pop("rope_type")
        keys["rope_scaling"] = scaling
    else:
        keys["rope_parameters"] = parameters
    table = rope_table(Config(keys), head_width=HEAD_WIDTH, default_theta=10_000.0)

    # Both sides round powers of theta to f32, by different routes.
    np.testing.assert_allclose(table.inverse_frequencies, frequencies.numpy(), rtol=1e-6)
    assert table.inverse_frequencies.dtype == np.float32
    assert table.factor == pytest.approx(factor, rel=1e-12)


def test_theta_defaults_to_the_family() -> None:
    table = rope_table(Config({}), head_width=4, default_theta=10_000.0)
    np.testing.assert_allclose(table.inverse_frequencies, [1.0, 0.01], rtol=1e-6)


def test_frequency_factors_take_the_place_of_scaling() -> None:
    keys = {"rope_theta": 10_000.0, "rope_scaling": LLAMA_3_1, FREQUENCY_FACTORS: [1.0, 8]}
    keys["rope_scaling"] = {**LLAMA_3_1, "rope_theta": 10_000.0}
    table = rope_table(Config(keys), head_width=4, default_theta=500.0)
    np.testing.assert_allclose(table.inverse_frequencies, [1.0, 0.01 / 8], rtol=1e-6)
    assert table.factor == 1.0


def test_layer_type_reads_its_own_parameters() -> None:
    keys = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
            "sliding_attention": None,
        },
        "rope_local_base_freq": 400.0,
    }
    full = rope_table(
        Config(keys), head_width=4, default_theta=10_000.0, layer_type="full_attention"
    )
    local = rope_table(
        Config(keys),
        head_width=4,
        default_theta=10_000.0,
        theta_key="rope_local_base_freq",
        scaling_key=None,
        layer_type="sliding_attention",
    )
    np.testing.assert_allclose(full.inverse_frequencies, [1 / 8, 0.1 / 8], rtol=1e-6)
    np.testing.assert_allclose(local.inverse_frequencies, [1, 0.05], rtol=1e-6)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope", "su", "mrope", "proportional"])
def test_other_scalings_are_unsupported(scaling: str) -> None:
    keys = {"rope_scaling": {"type": scaling, "factor": 2.0}}
    with pytest.raises(
        UnsupportedError, match=f"rope_type is '{scaling}'.*linear, llama3 and yarn"
    ):
        rope_table(Config(keys), head_width=4, default_theta=10_000.0)


@pytest.mark.parametrize("place", ["top", "inside"])
def test_partial_rotation_is_unsupported(place: str) -> None:
    partial = {"partial_rotary_factor": 0.5}
    keys = partial if place == "top" else {"rope_parameters": partial}
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor is 0\.5"):
        rope_table(Config(keys), head_width=4, default_theta=10_000.0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "theta string": ({"rope_theta": "10000"}, "rope_theta is '10000', wanted a number above"),
    "theta one": ({"rope_theta": 1.0}, "rope_theta is 1.0, wanted a number above 1,"),
    "theta infinite": ({"rope_theta": float("inf")}, "rope_theta is inf"),
    "scaling list": ({"rope_scaling": [1, 2]}, r"rope_scaling is \[1, 2\], wanted an object"),
    "type number": ({"rope_scaling": {"type": 3}}, "type is 3, wanted a string"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling: found no factor"),
    "factor tiny": ({"rope_scaling": {"type": "linear", "factor": 1e-30}}, "factor is 1e-30"),
    "beta huge": ({"rope_parameters": {**QWEN_2_5, "beta_fast": 1e308}}, "beta_fast is 1e.308"),
    "factor zero": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, wanted"),
    "factor negative": ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor is -2.0"),
    "factor bool": ({"rope_scaling": {"type": "linear", "factor": True}}, "factor is True"),
    "bounds crossed": (
        {"rope_parameters": {**LLAMA_3_1, "high_freq_factor": 1.0}},
        r"high_freq_factor is 1.0, wanted a number above low_freq_factor \(1\)",
    ),
    "trained context zero": (
        {"rope_parameters": {**QWEN_2_5, "original_max_position_embeddings": 0}},
        "original_max_position_embeddings is 0",
    ),
    "truncate number": ({"rope_parameters": {**QWEN_2_5, "truncate": 1}}, "truncate is 1, wanted"),
    "nested for a family without layer types": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "'full_attention' is .* wanted a number or string",
    ),
    "factors of another width": (
        {FREQUENCY_FACTORS: [1.0]},
        r"elute_rope_frequency_factors has 1 values, wanted head_dim/2 = 2",
    ),
    "factors with zero": ({FREQUENCY_FACTORS: [1.0, 0.0]}, "wanted a list of numbers"),
    "factors with NaN": ({FREQUENCY_FACTORS: [1.0, float("nan")]}, "wanted a list of numbers"),
    "factors with text": ({FREQUENCY_FACTORS: [1.0, "2"]}, "wanted a list of numbers"),
    "factors no list": ({FREQUENCY_FACTORS: 2.0}, "wanted a list of numbers"),
}


@pytest.mark.parametrize(("keys", "message"), BAD.values(), ids=BAD.keys())
def test_bad_values_are_one_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        rope_table(Config(keys), head_width=4, default_theta=10_000.0)
    assert "\n" not in str(caught.value)


def test_flat_parameters_for_a_layer_type_are_refused() -> None:
    keys = {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}
    with pytest.raises(FormatError, match="'rope_type' is 'linear', wanted an object per layer"):
        rope_table(Config(keys), head_width=4, default_theta=1e4, layer_type="full_attention")
