"""A rehearsal has the plan's share of misses, reads what they say, and fails in a sentence."""

import itertools
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from elute.bench import rehearsal
from elute.bench.pace import Compute
from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.rehearsal import rehearse, rehearse_banks
from elute.bench.shapes import CONFIGS
from elute.errors import DeviceError
from elute.flash.banks import banks_of, channel_sizes, expert_sizes
from elute.flash.disk import Disk
from elute.flash.plan import BLOCK, least_window, solve, solve_banks
from elute.flash.weights import uses
from elute.formats.packed_layout import Records
from elute.model.families import op_list
from elute.pack.reorder import reorder
from elute.runtime import calibration
from elute.runtime.executor import Executor

DISK = Disk(2e9, 1e-5, 3e9, 4, 1 << 20, "io_uring")
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}
EXPERTS = {"num_experts": 8, "intermediate_size": 256, "num_key_value_heads": 4}
SHAPES = {
    "llama-3.2-1b": {**CONFIGS["llama-3.2-1b"], **SMALL},
    "olmoe-1b-7b": {**CONFIGS["olmoe-1b-7b"], **SMALL, **EXPERTS},
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(rehearsal, "ENOUGH_S", 0.01)


@pytest.fixture(scope="module", params=SHAPES)
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal") / "model"
    return random_packed(SHAPES[request.param], random_recipe(bits=4, outer_bits=8), folder)


def plan_of(packed, share):
    order = uses(op_list(packed.config), packed)
    room = int(share * sum(use.total for use in order))
    plan = solve(least_window(order) + room, {}, order)
    assert plan.places
    return plan


COMPUTE = Compute(n_threads=2, cache_type="f16")


def rehearsed(packed, plan, file=None, disk=DISK):
    return rehearse(packed, packed.config, plan, file or packed.largest_shard, disk, COMPUTE)


@pytest.fixture
def streams(monkeypatch):
    """Every stream that a rehearsal opens, with what it was opened for."""
    found = []
    opened = rehearsal._Streamed._opened

    def noted(self, *arguments):
        found.append((self, opened(self, *arguments)))
        return found[-1][1]

    monkeypatch.setattr(rehearsal._Streamed, "_opened", noted)
    return found


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_all_layers_of_a_small_model_read_what_the_plan_misses(packed, share, streams):
    plan = plan_of(packed, share)
    told = rehearsed(packed, plan)
    assert told.worked_s + told.waited_s > 0
    ((weights, stream),) = streams
    assert weights.plan.missed == pytest.approx(plan.missed, abs=2 * BLOCK)
    n_bytes, _ = stream.figures()
    forwards = rehearsal.WARM_UP + rehearsal.LEAST_TOKENS
    assert n_bytes >= forwards * weights.plan.missed


@pytest.fixture
def timed(monkeypatch):
    """A token of what is rehearsed takes 5 ms, of which it waits 2."""
    monkeypatch.setattr(rehearsal, "_timed", lambda *_, **__: (0.005, 0.002))


def test_fewer_layers_stand_for_all(packed, streams, timed, monkeypatch):
    plan = plan_of(packed, 0.3)
    monkeypatch.setattr(rehearsal, "MOST_BYTES", 1)
    told = rehearsed(packed, plan)
    ((weights, _),) = streams
    assert weights.plan.missed < plan.missed / 3
    assert told.worked_s == pytest.approx(6 * 0.003)
    assert told.waited_s == pytest.approx(0.002 * plan.missed / weights.plan.missed)


def test_a_slow_disk_gets_fewer_layers(packed, streams, timed):
    plan = plan_of(packed, 0.0)
    a_third_a_turn = replace(DISK, sequential_bytes_s=plan.missed / 3 / rehearsal.MOST_READ_S)
    told = rehearsed(packed, plan, disk=a_third_a_turn)
    ((weights, _),) = streams
    assert weights.plan.missed == pytest.approx(plan.missed / 3, rel=0.1)
    assert told.worked_s == pytest.approx(3 * 0.003)


def test_a_disk_that_would_take_minutes_is_not_rehearsed(packed, streams):
    plan = plan_of(packed, 0.0)
    assert rehearsed(packed, plan, disk=replace(DISK, sequential_bytes_s=1e3)) is None
    assert not streams


def test_time_is_that_of_layers_and_of_every_thread_that_waits():
    class Cut:
        n_threads = 2
        seen: ClassVar[list[tuple[int, list[int]]]] = []

        @contextmanager
        def cut(self, sites):
            assert not sites
            yield self

        def run(self, segment, tokens, position):
            time.sleep(0.01)
            self.seen.append((position, tokens.tolist()))

    waited = itertools.count()
    token_s, waited_s = rehearsal._timed(
        Cut(), range(100, 110), lambda: (0, 0.01 * next(waited)), n_prompt=3
    )
    assert Cut.seen[0] == (0, [100, 101, 102])
    assert Cut.seen[1:] == [(p, [100 + p]) for p in range(3, 3 + len(Cut.seen) - 1)]
    n = len(Cut.seen) - 1 - rehearsal.WARM_UP
    assert n >= rehearsal.LEAST_TOKENS
    assert 0.01 <= token_s < 1
    assert waited_s == pytest.approx(0.005 / n)


def test_a_file_of_some_bytes_is_read_over_and_over(packed, tmp_path):
    plan = plan_of(packed, 0.2)
    largest = max(use.total for use in uses(op_list(packed.config), packed))
    file = tmp_path / "some"
    file.write_bytes(np.random.default_rng(0).bytes(largest))
    assert largest < plan.missed
    told = rehearsed(packed, plan, file)
    assert told.worked_s + told.waited_s > 0


def test_a_file_that_cannot_be_read_is_a_sentence(packed, tmp_path):
    plan = plan_of(packed, 0.2)
    with pytest.raises(DeviceError, match=r"No such file.*gone"):
        rehearsed(packed, plan, tmp_path / "gone")
    short = tmp_path / "short"
    short.write_bytes(bytes(BLOCK))
    with pytest.raises(DeviceError, match="the file ends before that"):
        rehearsed(packed, plan, short)


@dataclass
class Ordered:
    """As if every matrix had a column order of its own, so that each is a use of its own."""

    records: Records

    def column_order(self, name):
        return name.encode()


def test_column_orders_do_not_make_it_wait_for_ever(packed):
    alone = Ordered(packed.records)
    order = uses(op_list(packed.config), alone)
    together = uses(op_list(packed.config), packed)
    plan = solve(least_window(order), {}, order)
    if "num_experts" not in packed.config:  # experts are one use anyway
        assert plan.window < least_window(together)
    told = rehearse(alone, packed.config, plan, packed.largest_shard, DISK, COMPUTE)
    assert told.worked_s + told.waited_s > 0


def banks_plan(sized):
    banks = [bank.size for bank in sized]
    total = sum(bank.total for bank in banks)
    plan = solve_banks(2 * max(bank.total for bank in banks) + total // 3, {}, banks)
    assert plan.staging
    return plan


def banks_rehearsed(packed, plan, sparsity=0.0, disk=DISK):
    return rehearse_banks(packed, plan, disk, COMPUTE, sparsity=sparsity)


@pytest.mark.parametrize("layers", [2, 6])
def test_banks_of_channels_are_rehearsed_with_the_models_own_weights(tmp_path, layers, monkeypatch):
    monkeypatch.setattr(rehearsal, "MOST_BANK_LAYERS", layers)
    panels = random_packed(
        SHAPES["llama-3.2-1b"], random_recipe(bits=4, outer_bits=8), tmp_path / "panels"
    )
    ops = op_list(panels.config)
    packed = reorder(panels, tmp_path / "channels", banks_of(ops))
    plan = banks_plan(channel_sizes(ops, packed.records))
    told = banks_rehearsed(packed, plan)
    assert told.waited_s > 0
    assert banks_rehearsed(packed, plan, 0.5) is None  # nobody calibrated it
    slow = replace(DISK, sequential_bytes_s=1e4)
    assert banks_rehearsed(packed, plan, disk=slow) is None
    executor = Executor(ops, packed, context=128, n_threads=2)
    tokens = [7 * i % 512 for i in range(128)]
    ones = calibration.importances(packed, ops)
    calibration.save(packed, calibration.calibrate(executor, ops, ones, tokens))
    sparse = banks_rehearsed(packed, banks_plan(channel_sizes(ops, packed.records, 0.5)), 0.5)
    assert sparse.worked_s + sparse.waited_s > 0


def test_layers_in_groups_are_rehearsed_group_by_group(tmp_path, monkeypatch, timed):
    monkeypatch.setattr(rehearsal, "MOST_BANK_LAYERS", 2)
    panels = random_packed(
        SHAPES["llama-3.2-1b"], random_recipe(bits=4, outer_bits=8), tmp_path / "panels"
    )
    ops = op_list(panels.config)
    packed = reorder(panels, tmp_path / "channels", banks_of(ops, 3))
    plan = banks_plan(channel_sizes(ops, packed.records))
    told = banks_rehearsed(packed, plan)
    assert told.worked_s == pytest.approx(6 / 3 * 0.003)
    assert told.waited_s == pytest.approx(2 * 0.002, rel=0.01)


@pytest.mark.parametrize("dense", [[], [0, 1, 2]])
def test_banks_of_experts_are_rehearsed_from_the_first_layer_that_has_some(
    tmp_path, dense, monkeypatch
):
    monkeypatch.setattr(rehearsal, "MOST_BANK_LAYERS", 2)
    shape = {
        **SMALL,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "mlp_only_layers": dense,
    }
    packed = random_packed(shape, random_recipe(bits=4, outer_bits=8), tmp_path / "model")
    plan = banks_plan(expert_sizes(op_list(packed.config), packed.records))
    told = banks_rehearsed(packed, plan)
    assert told.worked_s + told.waited_s > 0
    monkeypatch.setattr(rehearsal, "_timed", lambda *_, **__: (0.005, 0.002))
    told = banks_rehearsed(packed, plan)
    n_layers, with_experts = (4, 1) if dense else (2, 2)
    assert told.worked_s == pytest.approx(8 / n_layers * 0.003)
    assert told.waited_s == pytest.approx((8 - len(dense)) / with_experts * 0.002, rel=0.01)
