"""The law of banks: the bits of the resident path in panel order, under any budget, predictor,
layer group, reader, depth and gap, at any sparsity; faults are one sentence, never a wrong
token."""

import json
import os
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.errors import BudgetError, DeviceError, EluteError
from elute.flash.banks import Predictor, active_rows, bank_uses, banks_of, channel_sizes
from elute.flash.plan import BankSize, solve_banks
from elute.flash.sparsity import Threshold
from elute.flash.weights import FlashWeights
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.model.ops import Linear
from elute.pack.quads import unpack_codes
from elute.pack.reorder import bank_codes, dequantized, reorder
from elute.runtime import calibration
from elute.runtime.executor import CHUNK, Executor

CONFIG = {
    **CONFIGS["llama-3.2-1b"],
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
PROMPT = np.arange(CHUNK + 37, dtype=np.int32) % 512
GROUPS = [1, 2, 3]


@pytest.fixture(scope="module")
def panels(tmp_path_factory) -> PackedModel:
    return random_packed(
        CONFIG, random_recipe(bits=4, outer_bits=6), tmp_path_factory.mktemp("banks") / "panels"
    )


@pytest.fixture(scope="module")
def folders(panels, tmp_path_factory) -> dict[int, PackedModel]:
    folder = tmp_path_factory.mktemp("channels")
    ops = op_list(panels.config)
    return {group: reorder(panels, folder / str(group), banks_of(ops, group)) for group in GROUPS}


def thresholds(packed, value):
    """Of every input; some 60 % of normally distributed values are below 0.84."""
    ops = op_list(packed.config)
    return {
        op.weights[0]: Threshold(np.ones(ops.registers[op.input], np.float32), value * scale)
        for op in ops.ops
        if isinstance(op, Linear)
        for scale in [0.05 if "down" in op.weights[0] or "o_proj" in op.weights[0] else 1]
    }


def plan_of(packed, share):
    sizes = [sized.size for sized in channel_sizes(op_list(packed.config), packed.records)]
    total, largest = sum(size.total for size in sizes), max(size.total for size in sizes)
    return solve_banks(2 * largest + int(share * total), {}, sizes)


def answers(packed, weights, value, *, n_threads=2):
    """Logits of a prompt of two chunks, of four tokens after it, and of another prompt."""
    executor = Executor(op_list(packed.config), weights, n_threads=n_threads)
    if value:
        executor.sparsify(thresholds(packed, value))
    rows = [executor.forward(PROMPT, 0)]
    for i in range(4):
        rows.append(executor.forward(np.array([7 + i], np.int32), PROMPT.size + i))
    rows.append(executor.forward(PROMPT[::-1].copy()[:50], 20, all_logits=True))
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def wanted(panels):
    return {value: answers(panels, panels, value) for value in (0, 0.3, 0.84, 100)}


def test_sparsity_changes_what_is_wanted(wanted):
    assert len({rows.tobytes() for rows in wanted.values()}) == len(wanted)


@pytest.mark.parametrize("group", GROUPS)
def test_reordering_keeps_every_code_and_scale(panels, folders, group):
    packed = PackedModel.open(folders[group].path)
    assert len(packed.banks) == 4 * -(-5 // group)
    for name, record in panels.records.items():
        if packed.in_bank(name) is None:
            if len(record.shape) == 1:
                assert np.array_equal(packed.vector(name), panels.vector(name))
            else:
                assert np.array_equal(packed.matrix(name).planes, panels.matrix(name).planes)
            continue
        matrix = panels.matrix(name)
        assert np.array_equal(
            bank_codes(packed, name), unpack_codes(matrix.planes, matrix.shape, matrix.bits)
        )
        assert np.array_equal(packed.in_bank(name).scales, matrix.scales)


@pytest.mark.parametrize("value", [0, 0.3, 0.84, 100])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_resident_banks_give_the_bits_of_panels(folders, wanted, value, n_threads):
    packed = folders[1]
    assert np.array_equal(answers(packed, packed, value, n_threads=n_threads), wanted[value])


@pytest.mark.parametrize("value", [0, 0.84])
@pytest.mark.parametrize("share", [0, 0.2, 0.7, 2])
@pytest.mark.parametrize("group", GROUPS)
def test_any_budget_and_layer_group_give_the_same_bits(folders, wanted, value, share, group):
    packed = folders[group]
    plan = plan_of(packed, share)
    assert plan.staging > 0 or share > 0.5
    weights = FlashWeights(packed, op_list(packed.config), plan)
    assert np.array_equal(answers(packed, weights, value), wanted[value])


@pytest.mark.parametrize("predictor", Predictor)
@pytest.mark.parametrize("share", [0, 0.4])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_any_predictor_gives_the_same_bits(folders, wanted, predictor, share, n_threads):
    packed = folders[1]
    weights = FlashWeights(
        packed, op_list(packed.config), plan_of(packed, share), predictor=predictor
    )
    assert np.array_equal(answers(packed, weights, 0.84, n_threads=n_threads), wanted[0.84])
    found = weights.banks.figures()
    assert found["blocks"] == found["cached"] + found["predicted"] + found["missed"]
    assert (found["predicted_reads"] > 0) == (predictor is not Predictor.NONE)


@pytest.mark.parametrize("reader", ["io_uring", "pread"])
@pytest.mark.parametrize("depth", [1, 5, 64])
@pytest.mark.parametrize("request_bytes", [4096, 20480, 1 << 20])
@pytest.mark.parametrize("gap_bytes", [0, 4096, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_any_reader_gives_the_same_bits(
    folders, wanted, reader, depth, request_bytes, gap_bytes, direct
):
    packed = folders[2]
    weights = FlashWeights(
        packed,
        op_list(packed.config),
        plan_of(packed, 0.1),
        reader=reader,
        bank_depth=depth,
        request_bytes=request_bytes,
        gap_bytes=gap_bytes,
        direct=direct,
    )
    assert weights.reader == reader
    assert np.array_equal(answers(packed, weights, 0.84), wanted[0.84])


def test_what_is_used_often_stays(folders):
    """All slots fill, and at a share of the blocks some of those wanted are there."""
    packed = folders[1]
    weights = FlashWeights(packed, op_list(packed.config), plan_of(packed, 0.5))
    answers(packed, weights, 0.84)
    found = weights.banks.figures()
    assert found["cached"] > 0.3 * found["blocks"]
    assert found["read_bytes"] >= found["wanted_bytes"]


def test_without_gaps_and_predictions_nothing_is_read_that_is_not_wanted(folders):
    packed = folders[1]
    weights = FlashWeights(
        packed,
        op_list(packed.config),
        plan_of(packed, 0.2),
        gap_bytes=0,
        predictor=Predictor.NONE,
    )
    answers(packed, weights, 0.84)
    found = weights.banks.figures()
    assert found["read_bytes"] == found["wanted_bytes"] > 0


def test_the_rows_that_were_wanted_are_those_whose_activations_count(folders):
    packed = folders[1]
    ops = op_list(packed.config)
    weights = FlashWeights(packed, ops, plan_of(packed, 0))
    executor = Executor(ops, weights)
    executor.sparsify(thresholds(packed, 0.84))
    executor.forward(PROMPT[:5], 0)
    executor.forward(PROMPT[5:6], 5)
    shares = [active_rows(weights.banks, use, 256).mean() for use in (0, 4, 8)]
    assert all(0.2 < share < 0.6 for share in shares), shares


def test_inputs_after_a_norm_are_predicted_by_the_layer_before(folders):
    packed = folders[1]
    uses = bank_uses(op_list(packed.config), packed.records)
    assert [use.like for use in uses[:8]] == [0, 1, 2, 3, 0, 5, 2, 7]


def test_two_executors_of_one_folder_do_not_disturb_each_other(folders):
    packed = folders[1]
    ops = op_list(packed.config)
    one = Executor(ops, FlashWeights(packed, ops, plan_of(packed, 0)), n_threads=1)
    two = Executor(ops, FlashWeights(packed, ops, plan_of(packed, 0.3)), n_threads=2)
    for executor in (one, two):
        executor.sparsify(thresholds(packed, 0.84))
    for i in range(20):
        assert np.array_equal(one.forward(PROMPT[i : i + 1], i), two.forward(PROMPT[i : i + 1], i))


def test_a_budget_below_two_banks_is_refused():
    sizes = [BankSize("a", 10, 8192), BankSize("b", 3, 4096)]
    with pytest.raises(BudgetError, match=r"found 0 MB, wanted at least 0 .*blocks 0"):
        solve_banks(90_000, {}, sizes)
    three = [sizes[0], replace(sizes[0], name="c"), replace(sizes[1], n_blocks=20)]
    plan = solve_banks(2 * 81920 + 50_000, {}, three)
    assert plan.staging == 2 * 81920
    assert plan.total <= plan.budget
    assert plan.missed == 3 * 81920 - plan.slot_bytes
    assert all(plan.slots.values())
    assert solve_banks(10**6, {"process": 1000}, sizes).staging == 0


@pytest.fixture
def copied(folders, tmp_path):
    shutil.copytree(folders[1].path, tmp_path / "model")
    return PackedModel.open(tmp_path / "model")


def test_a_file_that_shrinks_is_an_error(copied):
    ops = op_list(copied.config)
    executor = Executor(ops, FlashWeights(copied, ops, plan_of(copied, 0)))
    executor.forward(PROMPT[:4], 0)
    (file,) = copied.path.glob("*.safetensors")
    os.truncate(file, 8192)
    with pytest.raises(DeviceError, match=r"model-00001\.safetensors: cannot read .* file ends"):
        executor.forward(PROMPT[4:40], 4)


def test_a_file_that_is_deleted_is_read_on(copied, folders):
    ops = op_list(copied.config)
    executor = Executor(ops, FlashWeights(copied, ops, plan_of(copied, 0)))
    shutil.rmtree(copied.path)
    resident = Executor(ops, folders[1])
    for i in range(3):
        token = PROMPT[i : i + 1]
        assert np.array_equal(executor.forward(token, i), resident.forward(token, i))


def test_a_flipped_bit_is_found_where_it_is_checked(copied):
    ops = op_list(copied.config)
    name = next(iter(copied.banks))
    bank = copied.banks[name]
    at = copied.shards[bank.file].offset(name + ".channels") + 5000
    sums = copied.page_sums()
    with (copied.path / bank.file).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 16]))
    executor = Executor(ops, FlashWeights(copied, ops, plan_of(copied, 0), sums=sums))
    with pytest.raises(DeviceError, match=r"CRC-32C is .* run elute verify"):
        executor.forward(PROMPT[:40], 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["banks"].popitem(), "found no bank"),
        (lambda m: next(iter(m["banks"].values())).update(n_rows=8), "do not fit the bank"),
        (lambda m: next(iter(m["banks"].values())).update(row_bytes=0), "row_bytes"),
        (lambda m: m.update(layout=3), "layout is 3, newer"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(copied, change, match):
    path = copied.path / "elute.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(EluteError, match=match):
        PackedModel.open(copied.path)


def test_norms_of_weights_are_the_same_in_blocks_and_take_little_memory(
    panels, folders, monkeypatch
):
    ops = op_list(panels.config)
    wanted = {
        op.weights[0]: np.sqrt(
            sum(
                np.square(dequantized(panels, name).astype(np.float64)).sum(axis=0)
                for name in op.weights
            )
        ).astype(np.float32)
        for op in ops.ops
        if isinstance(op, Linear)
    }
    for weights in (1, 100 * 640, 1 << 30):
        monkeypatch.setattr(calibration, "_BLOCK_WEIGHTS", weights)
        found = calibration.importances(folders[2], ops, weighted=True)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    largest = max(np.prod(record.shape) for record in panels.records.values())
    monkeypatch.setattr(calibration, "_BLOCK_WEIGHTS", 1)
    tracemalloc.start()
    calibration.importances(folders[2], ops, weighted=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 64 * 640 + (1 << 20) < 32 * largest
