"""Rotary position tables from a config: default, linear, llama3 and yarn scaling.

Formulas, defaults and both spellings (`rope_theta` + `rope_scaling`; `rope_parameters`, flat or one
object per layer type) are those of transformers 5.23, modeling_rope_utils.py; the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from elute.model.config import Config, shown
from elute.model.ops import RopeTable

# One divisor per frequency, set by the GGUF reader from the tensor rope_freqs.weight: Llama 3's
# scaling as a table, so it takes the place of any scaling that the config names.
FREQUENCY_FACTORS = "elute_rope_frequency_factors"

F64 = npt.NDArray[np.float64]


def rope_table(
    config: Config,
    *,
    head_width: int,
    default_theta: float,
    theta_key: str = "rope_theta",
    scaling_key: str | None = "rope_scaling",
    layer_type: str | None = None,
) -> RopeTable:
    """The table of a model, or of one `layer_type` whose parameters are an object of their own.

    theta_key     where the older spelling keeps the base
    scaling_key   where the older spelling keeps the scaling; None when it is not for this table

    Raises UnsupportedError for other scalings (dynamic, longrope) and for partial rotation,
    FormatError for missing or impossible values.
    """
    parameters = _parameters(config, scaling_key, layer_type)
    partial = parameters if parameters.has("partial_rotary_factor") else config
    if partial.number("partial_rotary_factor", 1.0) != 1.0:
        found = shown(partial.values["partial_rotary_factor"])
        raise partial.unsupported(f"partial_rotary_factor is {found}", "heads turned whole (1.0)")
    theta_config, key = (
        (parameters, "rope_theta") if parameters.has("rope_theta") else (config, theta_key)
    )
    theta = theta_config.number(key, default_theta, above=1.0)
    frequencies = theta ** -(np.arange(0, head_width, 2, dtype=np.float64) / head_width)

    factors = config.numbers(FREQUENCY_FACTORS)
    if factors:
        if len(factors) != frequencies.size:
            found = f"{FREQUENCY_FACTORS} has {len(factors)} values"
            raise config.misfit(found, f"head_dim/2 = {frequencies.size}")
        return _table(frequencies / np.array(factors))

    scaling = parameters.text("rope_type", parameters.text("type", "default"))
    if scaling == "default":
        return _table(frequencies)
    if scaling == "linear":
        return _table(frequencies / parameters.number("factor"))
    if scaling == "llama3":
        return _table(_llama3(frequencies, parameters, _trained_context(config, parameters)))
    if scaling == "yarn":
        return _yarn(frequencies, theta, config, parameters)
    raise parameters.unsupported(
        f"rope_type is {shown(scaling)}", "default, linear, llama3 and yarn"
    )


def _parameters(config: Config, scaling_key: str | None, layer_type: str | None) -> Config:
    """The scaling's keys, however spelled; the older spelling wins, as in transformers."""
    parameters = config.part("rope_parameters")
    for key, value in parameters.values.items():
        # A level too many or too few would read as "no scaling" and quietly change the model.
        if value is not None and isinstance(value, Mapping) != (layer_type is not None):
            wanted = "a number or string" if layer_type is None else "an object per layer type"
            raise parameters.misfit(f"{shown(key)} is {shown(value)}", wanted)
    if layer_type is not None:
        parameters = parameters.part(layer_type)
    if scaling_key is not None and config.has(scaling_key):
        older = config.part(scaling_key)
        theta = {key: value for key, value in parameters.values.items() if key == "rope_theta"}
        if older.values:
            return Config({**theta, **older.values}, older.where)
    return parameters


def _trained_context(config: Config, parameters: Config) -> int:
    """The context length before scaling."""
    for place in (config, parameters):
        if place.has("original_max_position_embeddings"):
            return place.count("original_max_position_embeddings")
    return config.count("max_position_embeddings")


def _llama3(frequencies: F64, parameters: Config, trained_context: int) -> F64:
    """Divides low frequencies by `factor`, keeps high ones, blends those between.

    Source: Llama 3.1; modeling_rope_utils._compute_llama3_parameters.
    """
    factor = parameters.number("factor")
    low = parameters.number("low_freq_factor")
    high = parameters.number("high_freq_factor")
    if high <= low:
        raise parameters.wrong("high_freq_factor", f"a number above low_freq_factor ({low:g})")
    turns = trained_context * frequencies / (2 * math.pi)  # in the trained context
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * frequencies / factor + keep * frequencies


def _yarn(frequencies: F64, theta: float, config: Config, parameters: Config) -> RopeTable:
    """Divides low frequencies by `factor`, blends over a range of channels, and scales cos and sin.

    Source: YaRN, arXiv 2309.00071 §3; modeling_rope_utils._compute_yarn_parameters.
    """
    trained_context = _trained_context(config, parameters)
    head_width = 2 * frequencies.size
    factor = (
        parameters.number("factor")
        if parameters.has("factor")
        else config.count("max_position_embeddings") / trained_context
    )

    def channel(turns: float) -> float:
        """The channel, a real number, that makes `turns` turns in the trained context."""
        return (
            head_width * math.log(trained_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = channel(parameters.number("beta_fast", 32.0))
    high = channel(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    if low == high:
        high += 0.001  # as transformers does: a step instead of a ramp
    interpolated = np.clip((np.arange(frequencies.size) - low) / (high - low), 0, 1)
    blended = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    return _table(blended, _attention_factor(factor, parameters))


def _attention_factor(factor: float, parameters: Config) -> float:
    if parameters.has("attention_factor"):
        return parameters.number("attention_factor")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    # A zero counts as missing here, as in transformers.
    if parameters.values.get("mscale") and parameters.values.get("mscale_all_dim"):
        return magnitude(parameters.number("mscale")) / magnitude(
            parameters.number("mscale_all_dim")
        )
    return magnitude(1.0)


def _table(frequencies: F64, factor: float = 1.0) -> RopeTable:
    return RopeTable(inverse_frequencies=frequencies.astype(np.float32), factor=factor)
