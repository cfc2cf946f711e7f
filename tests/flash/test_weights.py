"""The law of streaming: the bits of the resident path, under any plan, reader and depth; faults
are one sentence, never a wrong token."""

import os
import shutil
import signal

import numpy as np
import pytest

from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.errors import DeviceError
from elute.flash.plan import least_window, solve
from elute.flash.weights import FlashWeights, resident_bytes, uses
from elute.formats.packed import PackedModel
from elute.model.families import op_list
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
READERS = ["io_uring", "pread"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> PackedModel:
    return random_packed(
        CONFIG, random_recipe(bits=4, outer_bits=6), tmp_path_factory.mktemp("flash") / "model"
    )


def plan_of(packed, share):
    """share: of the planes of linears that may stay, beside the least window."""
    order = uses(op_list(packed.config), packed)
    room = int(share * sum(use.total for use in order))
    return solve(least_window(order) + room, {}, order)


def flash(packed, share, **options) -> FlashWeights:
    return FlashWeights(packed, op_list(packed.config), plan_of(packed, share), **options)


def answers(packed, weights, *, n_threads=2):
    """Logits of a prompt of two chunks, of three tokens after it, and of another prompt."""
    executor = Executor(op_list(packed.config), weights, n_threads=n_threads)
    rows = [executor.forward(PROMPT, 0)]
    for i in range(3):
        rows.append(executor.forward(np.array([7 + i], np.int32), PROMPT.size + i))
    rows.append(executor.forward(PROMPT[::-1].copy()[:50], 20, all_logits=True))
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def wanted(packed):
    return answers(packed, packed)


@pytest.mark.parametrize("share", [0, 0.1, 0.35, 0.7, 2])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_any_budget_gives_the_same_bits(packed, wanted, share, n_threads):
    weights = flash(packed, share)
    assert bool(weights.plan.places) == (share < 1)
    assert np.array_equal(answers(packed, weights, n_threads=n_threads), wanted)
    read, _ = weights.figures()
    assert read >= 6 * weights.plan.missed  # six forwards, and what was read ahead of a seventh


MIXTURE = {
    **CONFIGS["olmoe-1b-7b"],
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> PackedModel:
    return random_packed(
        MIXTURE, random_recipe(bits=4, outer_bits=6), tmp_path_factory.mktemp("flash") / "mixture"
    )


@pytest.mark.parametrize("share", [0, 0.4, 2])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_experts_that_pass_through_give_the_same_bits(mixture, share, n_threads):
    weights = flash(mixture, share)
    assert bool(weights.plan.places) == (share < 1)
    wanted = answers(mixture, mixture, n_threads=1)
    assert np.array_equal(answers(mixture, weights, n_threads=n_threads), wanted)
    read, _ = weights.figures()
    assert read >= 6 * weights.plan.missed


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("depth", [1, 3, 16])
@pytest.mark.parametrize("request_bytes", [4096, 12288, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_any_reader_gives_the_same_bits(packed, wanted, reader, depth, request_bytes, direct):
    weights = flash(
        packed, 0.2, reader=reader, depth=depth, request_bytes=request_bytes, direct=direct
    )
    assert weights.reader == reader
    assert np.array_equal(answers(packed, weights), wanted)


def test_two_executors_of_one_model_do_not_disturb_each_other(packed, wanted):
    first, second = flash(packed, 0), flash(packed, 0.3)
    ops = op_list(packed.config)
    one, two = Executor(ops, first, n_threads=1), Executor(ops, second, n_threads=2)
    for start in range(0, CHUNK, 64):
        part = PROMPT[start : start + 64]
        assert np.array_equal(one.forward(part, start), two.forward(part, start))


def test_what_stays_is_what_the_plan_counts(packed):
    ops = op_list(packed.config)
    for share in (0, 0.4, 2):
        weights = flash(packed, share)
        assert weights._memory.size == resident_bytes(ops, packed) + weights.plan.pinned_bytes


@pytest.fixture
def copied(packed, tmp_path):
    """A copy whose files a test may spoil."""
    shutil.copytree(packed.path, tmp_path / "model")
    return PackedModel.open(tmp_path / "model")


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_shrinks_during_a_run_is_an_error_and_no_token(copied, reader):
    weights = flash(copied, 0, reader=reader)
    executor = Executor(op_list(copied.config), weights, n_threads=2)
    executor.forward(PROMPT[:5], 0)
    file = copied.path / "model-00001.safetensors"
    os.truncate(file, file.stat().st_size // 8 // 4096 * 4096)

    def go_on() -> None:
        for i in range(20):  # what was read ahead still serves some
            executor.forward(PROMPT[:5], 5 + i)

    with pytest.raises(DeviceError, match=r"cannot read \d+ bytes from byte \d+ \(the file ends"):
        go_on()
    with pytest.raises(DeviceError, match="cannot read"):  # and it stays so
        executor.forward(PROMPT[:5], 5)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_too_short_to_load_is_an_error(copied, reader):
    file = copied.path / "model-00001.safetensors"
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(DeviceError, match="the file ends before that"):
        flash(copied, 2, reader=reader)


def test_a_file_that_is_gone_is_an_error(copied):
    (copied.path / "model-00001.safetensors").unlink()
    with pytest.raises(DeviceError, match=r"model-00001.safetensors.*No such file"):
        flash(copied, 0.5)


def test_a_file_replaced_or_deleted_during_a_run_changes_nothing(copied, wanted):
    weights = flash(copied, 0)
    executor = Executor(op_list(copied.config), weights, n_threads=2)
    shutil.rmtree(copied.path)
    assert np.array_equal(executor.forward(PROMPT, 0), wanted[:1])


def test_an_unknown_reader_is_refused(packed):
    with pytest.raises(ValueError, match="reader: found mmap, wanted auto, io_uring or pread"):
        flash(packed, 0, reader="mmap")


def test_a_forked_child_is_told_to_load_for_itself(packed):
    executor = Executor(op_list(packed.config), flash(packed, 0), n_threads=2)
    executor.forward(PROMPT[:5], 0)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs in taking its copy apart dies
        try:
            executor.forward(PROMPT[:5], 5)
        except DeviceError as error:
            del executor
            os._exit(0 if "load the model in it" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    executor.forward(PROMPT[:5], 5)
