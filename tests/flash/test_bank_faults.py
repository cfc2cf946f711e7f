"""What a bad disk does to weights that come by banks: the same bits, later, or a DeviceError that
names file and offset; never a wrong token, a hang or a crash."""

import faulthandler

import numpy as np
import pytest
from test_banks import PROMPT, answers, folders, panels, plan_of, thresholds, wanted
from test_faults import HANG_S, HARMLESS, offset_of

from elute.errors import DeviceError
from elute.flash.weights import FlashWeights
from elute.model.families import op_list
from elute.runtime.executor import Executor

__all__ = ["folders", "panels", "wanted"]  # fixtures

READERS = ["io_uring", "pread"]
# Reads of one cache, counted from 1: a prompt takes some 40, a token some 60.
WHILE_RUNNING = [1, 30, 95, 173]


@pytest.fixture(autouse=True)
def _no_hang():
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def cached(packed, faults, *, below="auto", checked=False, depth=16):
    return FlashWeights(
        packed,
        op_list(packed.config),
        plan_of(packed, 0.1),
        reader=f"faulty:{below} {faults}",
        request_bytes=16384,
        bank_depth=depth,
        sums=packed.page_sums() if checked else None,
    )


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize("faults", HARMLESS)
@pytest.mark.parametrize("checked", [False, True])
def test_what_harms_nothing_changes_no_bit(folders, wanted, below, faults, checked):
    weights = cached(folders[1], faults, below=below, checked=checked)
    assert np.array_equal(answers(folders[1], weights, 0.84), wanted[0.84])


@pytest.mark.parametrize("depth", [1, 2, 64])
def test_nor_does_it_at_any_depth(folders, wanted, depth):
    weights = cached(folders[1], "late%50 full%50 short%50 again%20", checked=True, depth=depth)
    assert np.array_equal(answers(folders[1], weights, 0.84), wanted[0.84])


def run_until_it_fails(executor):
    executor.forward(PROMPT[:60], 0)
    for i in range(60, 90):
        executor.forward(PROMPT[i : i + 1], i)


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize("nth", WHILE_RUNNING)
def test_a_read_that_fails_is_an_error_and_stays_one(folders, wanted, below, nth):
    packed = folders[1]
    executor = Executor(op_list(packed.config), cached(packed, "", below=below))
    executor.sparsify(thresholds(packed, 0.84))
    run_until_it_fails(executor)  # without a fault it does not
    # What is loaded before is read by a stream of its own, whose reads count apart.
    try:
        weights = cached(packed, f"eio@{nth}", below=below)
    except DeviceError as error:
        offset_of(error, packed)
        return
    executor = Executor(op_list(packed.config), weights)
    executor.sparsify(thresholds(packed, 0.84))
    for _ in range(2):
        with pytest.raises(DeviceError) as caught:
            run_until_it_fails(executor)
        offset_of(caught.value, packed)
    fresh = FlashWeights(packed, op_list(packed.config), plan_of(packed, 0.1))
    assert np.array_equal(answers(packed, fresh, 0.84), wanted[0.84])


def open_and_run(packed, faults):
    executor = Executor(op_list(packed.config), cached(packed, faults, checked=True))
    executor.sparsify(thresholds(packed, 0.84))
    run_until_it_fails(executor)


@pytest.mark.parametrize("nth", WHILE_RUNNING)
def test_a_bit_that_flips_on_the_way_is_found_where_reads_are_checked(folders, nth):
    with pytest.raises(DeviceError, match="CRC-32C") as caught:
        open_and_run(folders[1], f"flip@{nth}")
    offset_of(caught.value, folders[1])


def test_a_slow_disk_is_waited_for(folders, wanted):
    waited = []
    for faults in ("", "slow=20"):
        weights = cached(folders[1], faults, below="pread")
        assert np.array_equal(answers(folders[1], weights, 0.84), wanted[0.84])
        waited.append(weights.figures()[1])
    assert waited[1] > 2 * waited[0]
