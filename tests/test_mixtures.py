"""Mixtures of experts from a Hugging Face folder to an answer, and through a GGUF file."""

import os
import subprocess
import sys

import numpy as np
import pytest
from tiny import MIXTURES, save_tiny_checkpoint

import elute
from elute.evaluate.reference import reference_executor
from elute.formats import open_checkpoint
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.model.ops import Experts
from elute.pack.convert import convert
from elute.quantize.recipe import Recipe
from elute.runtime.sampler import log_softmax_at
from elute.runtime.store import pack_checkpoint


@pytest.fixture(scope="module", params=MIXTURES)
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    save_tiny_checkpoint(folder / "model", request.param)
    pack_checkpoint(folder / "model", folder / "packed", Recipe.default(bits=8))
    return folder / "packed"


def test_routers_stay_floats_and_experts_become_codes(packed):
    model = PackedModel.open(packed)
    routers = [name for name in model.names if name.endswith(".gate.weight")]
    experts = [name for name in model.names if ".experts." in name]
    assert all(model.vector(name).ndim == 2 for name in routers)
    assert len(routers) == 2
    assert {model.matrix(name).bits for name in experts} == {8}
    assert len(experts) == 2 * 3 * 8


def test_experts_lie_one_behind_the_other_in_one_file(packed):
    source = packed.parent / "model"
    checkpoint = open_checkpoint(source)
    ops = op_list(checkpoint.config)
    model = convert(
        checkpoint,
        packed.parent / "small files",
        Recipe.default(),
        tensors=(*ops.matrices(), *ops.vectors()),
        floats=ops.vectors(),
        runs=ops.runs(),
        max_shard_bytes=400_000,
    )
    assert len(model.shards) > 1
    for op in (op for op in ops.ops if isinstance(op, Experts)):
        assert len({model.records[name].file for name in op.matrices()}) == 1
        shard = model.shards[model.records[op.gates[0]].file]
        at = [shard.offset(f"{name}.planes") for name in op.matrices()]
        assert at == sorted(at)
        expert = sum(
            part.stored_bytes
            for name in (op.gates[0], op.ups[0], op.downs[0])
            for part in model.records[name].parts()
        )
        assert np.diff(at[::3]).tolist() == [expert] * (len(op.gates) - 1)


def test_score_is_near_the_float_reference_of_the_packed_codes(packed):
    with elute.load(packed, threads=2) as model:
        score = model.score("the cat sat on the mat")
    tokens = np.array(score.tokens)
    logits = reference_executor(packed).forward(tokens[:-1].astype(np.int32), 0, all_logits=True)
    want = log_softmax_at(logits, tokens[1:])
    # Most tokens pick the same experts; where int8 activations turn a pick, an answer differs.
    assert np.median(np.abs(np.array(score.logprobs[1:], float) - want)) < 0.25


def test_a_budget_that_holds_all_changes_no_token(packed):
    with elute.load(packed, threads=2, context=64) as model:
        wanted = model.generate("the cat", max_tokens=12, temperature=0, ignore_end=True).tokens
    with elute.load(packed, threads=2, context=64, memory="2G") as model:
        got = model.generate("the cat", max_tokens=12, temperature=0, ignore_end=True).tokens
    assert got == wanted


def test_run_answers_from_a_folder(packed):
    folder = packed.parent / "model"
    command = [sys.executable, "-m", "elute", "run", "--raw", "--temperature", "0"]
    command += ["--max-tokens", "8", str(folder), "the cat"]
    home = {**os.environ, "ELUTE_HOME": str(packed.parent / "home")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=home)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    assert "generated 8 tokens" in ran.stderr
