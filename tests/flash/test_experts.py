"""Experts that are fetched when they are picked: the bits of the resident path, no other read."""

import numpy as np
import pytest

import elute
from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.errors import NOTE, DeviceError, UnsupportedError
from elute.flash.banks import Predictor, expert_rows, expert_sizes
from elute.flash.plan import solve_banks
from elute.flash.weights import FlashWeights
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.runtime.executor import Executor

CONFIG = {
    **CONFIGS["olmoe-1b-7b"],
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 70,
    "num_experts_per_tok": 3,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
PROMPT = np.arange(45, dtype=np.int32) * 7 % 512


@pytest.fixture(scope="module", params=["symmetric", "asymmetric"])
def packed(request, tmp_path_factory) -> PackedModel:
    recipe = random_recipe(bits=4, outer_bits=6)
    if request.param == "asymmetric":
        from dataclasses import replace

        from elute.quantize.recipe import Scheme

        recipe = replace(
            recipe, rules=tuple(replace(rule, scheme=Scheme.ASYMMETRIC) for rule in recipe.rules)
        )
    return random_packed(CONFIG, recipe, tmp_path_factory.mktemp("experts") / "model")


def plan_of(packed, share):
    ops = op_list(packed.config)
    sizes = [sized.size for sized in expert_sizes(ops, packed.records)]
    total, largest = sum(s.total for s in sizes), max(s.total for s in sizes)
    return solve_banks(2 * largest + int(share * total), {}, sizes)


def answers(packed, weights, *, n_threads=2):
    executor = Executor(op_list(packed.config), weights, n_threads=n_threads)
    rows = [executor.forward(PROMPT, 0, all_logits=True)]
    for i in range(12):
        token = np.array([(31 * i + 5) % 512], np.int32)
        rows.append(executor.forward(token, PROMPT.size + i))
    rows.append(executor.forward(PROMPT[:7], 3))
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def wanted(packed):
    return answers(packed, packed)


def test_a_layers_experts_lie_one_behind_the_other(packed):
    ops = op_list(packed.config)
    rows = expert_rows(packed, ops)
    assert [row.n_rows for row in rows] == [70] * 4
    for row in rows:
        assert row.row_bytes == row.block_bytes
        assert row.row_bytes % 4096 == 0


@pytest.mark.parametrize("share", [0, 0.2, 0.45])
@pytest.mark.parametrize("predictor", Predictor)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_any_budget_and_predictor_give_the_same_bits(packed, wanted, share, predictor, n_threads):
    plan = plan_of(packed, share)
    assert plan.staging > 0
    weights = FlashWeights(packed, op_list(packed.config), plan, predictor=predictor)
    assert weights.has_expert_banks()
    assert np.array_equal(answers(packed, weights, n_threads=n_threads), wanted)


def test_where_all_fit_they_are_read_once(packed, wanted):
    weights = FlashWeights(packed, op_list(packed.config), plan_of(packed, 2))
    assert not weights.has_expert_banks()
    assert np.array_equal(answers(packed, weights), wanted)


def test_only_picked_experts_are_read(packed):
    ops = op_list(packed.config)
    weights = FlashWeights(packed, ops, plan_of(packed, 0), predictor=Predictor.NONE, gap_bytes=0)
    executor = Executor(ops, weights)
    executor.forward(PROMPT, 0)
    before = weights.banks.figures()
    for i in range(5):
        executor.forward(PROMPT[i : i + 1], PROMPT.size + i)
    after = weights.banks.figures()
    assert after["blocks"] - before["blocks"] == 5 * 4 * 3  # tokens, layers, experts a token
    (row,) = {rows.row_bytes for rows in expert_rows(packed, ops)}
    assert after["read_bytes"] - before["read_bytes"] == (after["missed"] - before["missed"]) * row


def test_a_file_that_cannot_be_read_is_an_error(packed, tmp_path):
    import os
    import shutil

    shutil.copytree(packed.path, tmp_path / "model")
    copied = PackedModel.open(tmp_path / "model")
    ops = op_list(copied.config)
    executor = Executor(ops, FlashWeights(copied, ops, plan_of(copied, 0)))
    os.truncate(tmp_path / "model" / "model-00001.safetensors", 8192)
    with pytest.raises(DeviceError, match="the file ends before that"):
        executor.forward(PROMPT, 0)


def test_sparsity_says_that_it_is_not_of_experts(packed, tmp_path, caplog):
    import logging

    import elute

    caplog.set_level(logging.INFO, "elute")
    with elute.load(packed.path, sparsity=0.3, cache_dir=tmp_path) as model:
        assert model.sparsity == 0.3
    assert "all weights of a picked expert count" in caplog.text


def test_no_order_is_advised_that_experts_cannot_have(packed, caplog):
    caplog.set_level(NOTE, "elute")
    with pytest.raises(UnsupportedError, match="for cache_aware; leave cache_aware out"):
        elute.load(packed.path, cache_aware=0.5, memory="1G", sparsity=0.5)
    assert "order channels" not in caplog.text
