"""The disk under a model that is not there yet, and what a forecast is without one."""

from types import SimpleNamespace

import pytest

from elute.bench import budget
from elute.bench.budget import Flash, predict
from elute.bench.pace import Compute, Pace, cut, layer_matrices
from elute.bench.rehearsal import Rehearsed
from elute.bench.shapes import CONFIGS
from elute.errors import BudgetError, DeviceError
from elute.flash.disk import Disk
from elute.flash.plan import BLOCK, Use, solve
from elute.model.families import op_list
from elute.model.rope import FREQUENCY_FACTORS

DISK = Disk(1e9, 1e-5, 1e9, 4, 1 << 20, "io_uring")
DENSE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
PLAN = solve(250 * BLOCK, {}, [Use((str(i),), (100 * BLOCK,)) for i in range(10)])


def predicted(monkeypatch, flash, rehearsed=None):
    monkeypatch.setattr(budget, "measured_pace", lambda *_, **__: Pace(0.002, 0.001))
    monkeypatch.setattr(budget, "rehearse", lambda *_, **__: rehearsed)
    return predict(SimpleNamespace(), DENSE, PLAN, flash, Compute(1, "f16"))


def test_a_disk_that_is_not_here_overlaps_as_well_as_can_be(monkeypatch):
    read_s = PLAN.missed / 1e9
    assert read_s > 0.002
    found = predicted(monkeypatch, Flash(DISK, None))
    assert found.waited_s == pytest.approx(read_s - 0.002)
    assert 1 / found.tok_s == pytest.approx(read_s + 0.001)
    assert found.read_bytes == PLAN.missed


def test_what_the_head_hides_is_hidden_once(monkeypatch, tmp_path):
    found = predicted(monkeypatch, Flash(DISK, tmp_path), Rehearsed(0.003, 0.004))
    hidden_s = min(0.001, PLAN.window / 1e9)
    assert found.waited_s == pytest.approx(0.004 - hidden_s)
    assert 1 / found.tok_s == pytest.approx(0.003 + 0.004 - hidden_s + 0.001)
    little = predicted(monkeypatch, Flash(DISK, tmp_path), Rehearsed(0.003, 1e-9))
    assert little.waited_s == 0


def test_what_cannot_be_rehearsed_is_foretold(monkeypatch, tmp_path):
    found = predicted(monkeypatch, Flash(DISK, tmp_path), None)
    assert 1 / found.tok_s == pytest.approx(PLAN.missed / 1e9 + 0.001)


def test_nothing_is_read_where_all_fits(monkeypatch):
    monkeypatch.setattr(budget, "measured_pace", lambda *_, **__: Pace(0.002, 0.001))
    plan = solve(10**9, {}, [Use(("a",), (BLOCK,))])
    found = predict(SimpleNamespace(), DENSE, plan, None, Compute(1, "f16"))
    assert (found.read_bytes, found.waited_s) == (0, 0)
    assert 1 / found.tok_s == pytest.approx(0.003)


def test_a_file_is_there_while_it_is_read_and_gone_afterwards(tmp_path):
    with budget._some_file(tmp_path / "cache", 3 << 20) as file:
        assert file.stat().st_size == 3 << 20
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(KeyboardInterrupt), budget._some_file(tmp_path / "cache", 1 << 20):
        raise KeyboardInterrupt
    assert not list((tmp_path / "cache").iterdir())


def test_where_nothing_can_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    wanted = r"file: cannot be written to learn the rate of the disk \(File exists\); give it with"
    with pytest.raises(DeviceError, match=wanted), budget._some_file(tmp_path / "file", 1 << 20):
        pass


def test_a_rehearsal_without_memory_leaves_the_formula(monkeypatch, tmp_path):
    def too_large(*_, **__):
        raise BudgetError("bench: the window takes 9 MiB, but 1 MiB are available")

    monkeypatch.setattr(budget, "measured_pace", lambda *_, **__: Pace(0.002, 0.001))
    monkeypatch.setattr(budget, "rehearse", too_large)
    found = predict(SimpleNamespace(), DENSE, PLAN, Flash(DISK, tmp_path), Compute(1, "f16"))
    assert 1 / found.tok_s == pytest.approx(PLAN.missed / 1e9 + 0.001)


def test_a_model_by_channel_that_fits_takes_the_time_of_its_kernels(monkeypatch):
    monkeypatch.setattr(budget, "measured_pace", lambda *_, **__: Pace(0.002, 0.001))
    plan = solve(10**9, {}, [Use(("a",), (BLOCK,))])
    by_channel = SimpleNamespace(banks={"a": None})
    dense, half = (
        predict(by_channel, DENSE, plan, None, Compute(1, "f16"), sparsity=sparsity)
        for sparsity in (0.0, 0.5)
    )
    assert 1 / dense.tok_s == pytest.approx(0.002 * 1.48 + 0.001)
    assert 1 / half.tok_s == pytest.approx(0.002 * (0.13 + 1.35 / 2) + 0.001)


def test_the_pace_of_a_mixture_weighs_the_experts_that_a_token_picks():
    shape = {**CONFIGS["olmoe-1b-7b"], "num_hidden_layers": 3}
    ops = op_list(shape)
    all_of_them, picked = layer_matrices(ops), layer_matrices(ops, picked=True)
    attention = 3 * 4
    assert len(all_of_them) - attention == 3 * 3 * 64
    assert len(picked) - attention == 3 * 3 * 8
    assert set(picked) <= set(all_of_them)


def test_lists_of_something_else_than_layers_are_not_cut():
    config = {"layer_types": ["a", "b", "c"], FREQUENCY_FACTORS: [1.0, 2.0, 3.0]}
    assert cut(config, 2, 3) == {
        "layer_types": ["a", "b"],
        FREQUENCY_FACTORS: [1.0, 2.0, 3.0],
        "num_hidden_layers": 2,
    }
