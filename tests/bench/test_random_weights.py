import numpy as np
import pytest

from elute.bench import random_weights
from elute.bench.random_weights import RandomWeights, random_recipe
from elute.bench.shapes import CONFIGS, shape_config
from elute.bench.subject import random_subject
from elute.errors import BudgetError
from elute.model.families import op_list
from elute.model.weights import weight_shapes
from elute.pack.quads import unpack
from elute.quantize.recipe import Recipe, Rule, Scheme
from elute.runtime.executor import Executor
from elute.types import Affine

TINY = {
    **CONFIGS["smollm2-135m"],
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
}
GATE = "model.layers.1.mlp.gate_proj.weight"


def weights(recipe, config=TINY):
    return RandomWeights(op_list(config), recipe)


@pytest.mark.parametrize("shape", CONFIGS)
def test_shapes_are_configs_of_known_families(shape):
    shapes = weight_shapes(op_list(shape_config(shape))).values()
    assert all(shape[1] % 64 == 0 for shape in shapes if len(shape) == 2)


def test_sizes_are_those_of_the_published_models():
    def millions(shape):
        shapes = weight_shapes(op_list(shape_config(shape))).values()
        return round(sum(int(np.prod(shape)) for shape in shapes) / 1e6)

    assert {shape: millions(shape) for shape in CONFIGS} == {
        "llama-2-7b": 6738,
        "llama-3-8b": 8030,
        "llama-3.2-1b": 1236,
        "llama-3.2-3b": 3213,
        "olmoe-1b-7b": 6919,
        "qwen2.5-0.5b": 494,
        "bitnet-3b": 3324,
        "smollm2-135m": 135,
    }


@pytest.mark.parametrize("bits", [*range(1, 9), None])
def test_logits_are_finite_and_differ(bits):
    config = {**TINY, "tie_word_embeddings": False}
    ops = op_list(config)
    source = RandomWeights(ops, random_recipe(bits=bits, group_size=None, outer_bits=8))
    logits = Executor(ops, source, context=8, n_threads=1).forward(np.arange(4, dtype=np.int32), 0)
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100


def test_matrices_are_what_the_recipe_says():
    source = weights(random_recipe(bits=3, group_size=32, outer_bits=6))
    gate, embedding = source.matrix(GATE), source.matrix("model.embed_tokens.weight")
    assert (gate.shape, gate.bits, gate.group_size, gate.zero) == ((192, 64), 3, 32, 4)
    assert (embedding.bits, embedding.group_size) == (6, 32)
    assert source.matrix(GATE) is gate
    assert set(np.unique(unpack(gate).codes)) == set(range(8))
    assert np.array_equal(source.vector("model.norm.weight"), np.ones(64, np.float32))


def test_no_two_matrices_share_memory_or_bytes():
    source = weights(random_recipe(bits=4, outer_bits=8))
    up = source.matrix("model.layers.1.mlp.up_proj.weight").planes
    assert not np.shares_memory(up, source.matrix(GATE).planes)
    assert not np.array_equal(up, source.matrix(GATE).planes)


def test_ternary_has_three_codes_and_one_scale_a_row():
    gate = weights(random_recipe(bits=None, group_size=None, outer_bits=8)).matrix(GATE)
    assert (gate.bits, gate.zero, gate.group_size) == (2, 1, 64)
    assert set(np.unique(unpack(gate).codes)) == {0, 1, 2}


def test_one_bit_and_asymmetric_have_offsets_as_quantizing_stores_them():
    one = weights(random_recipe(bits=1, outer_bits=8)).matrix(GATE)
    recipe = Recipe((Rule("*", bits=4, scheme=Scheme.ASYMMETRIC),))
    four = weights(recipe).matrix(GATE)
    for matrix in (one, four):
        assert matrix.affine is Affine.MIN
        assert np.isfinite(matrix.offsets).all()
        assert matrix.offsets.shape == matrix.scales.shape


def test_outputs_that_fill_the_last_panel_are_zero():
    source = weights(random_recipe(bits=4, outer_bits=8), {**TINY, "vocab_size": 70})
    scales = source.matrix("model.embed_tokens.weight").scales
    assert (scales[-1, :, 6:] == 0).all()
    assert (scales[-1, :, :6] > 0).all()


def test_a_model_beyond_the_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(random_weights, "available_bytes", lambda: 100 << 20)
    with pytest.raises(BudgetError, match=r"the weights take 3\d{3} MiB, but 100 MiB are"):
        random_subject("llama-2-7b", random_recipe(bits=4, outer_bits=8))


def test_a_group_that_does_not_fit_is_said(caplog):
    made = weights(random_recipe(bits=4, group_size=48, outer_bits=8))
    assert made.matrix(GATE).group_size == 32
    assert (
        "14 random matrices take group_size=32, because 48 does not fit their rows" in caplog.text
    )
