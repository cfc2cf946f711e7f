"""The simulated walk: cases that can be counted by hand, and what holds for any plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import forwards

from elute.flash.plan import BLOCK, Plan, Use, least_window, solve
from elute.flash.walk import Disk, walk

MB = 1 << 20


def disk(bytes_s=1e9, latency_s=0.0, request_bytes_s=1e12, request_bytes=MB, depth=8):
    return Disk(bytes_s, latency_s, request_bytes_s, request_bytes, depth)


def all_streamed(uses, window):
    places, at = {}, 0
    for use in uses:
        for name, size in zip(use.names, use.n_bytes, strict=True):
            at = 0 if at + size > window else at
            places[name] = at
            at += size
    total = sum(use.total for use in uses)
    return Plan(0, {}, (), 0, places, window, total)


def test_without_flash_it_is_the_sum_of_the_work():
    uses = [Use(("a",), (BLOCK,)), Use(("b",), (BLOCK,))]
    found = walk(solve(4 * BLOCK, {}, uses), uses, use_s=[1.0, 2.0], rest_s=0.5, disk=disk())
    assert (found.seconds, found.waited_s) == (3.5, 0.0)


def test_a_slow_disk_is_the_limit_and_a_fast_one_hides_behind_the_work():
    uses = [Use((str(i),), (10 * MB,)) for i in range(6)]
    plan = all_streamed(uses, 30 * MB)
    slow = walk(plan, uses, use_s=[1e-4] * 6, rest_s=0, disk=disk(bytes_s=1e9))
    assert slow.seconds == pytest.approx(60 * MB / 1e9, rel=0.01)
    assert slow.waited_s == pytest.approx(slow.seconds - 6e-4, rel=0.01)
    fast = walk(plan, uses, use_s=[0.1] * 6, rest_s=0, disk=disk(bytes_s=1e9))
    assert fast.seconds == pytest.approx(0.6)
    assert fast.waited_s == pytest.approx(0, abs=1e-9)


def test_a_window_of_one_use_does_one_after_the_other():
    uses = [Use((str(i),), (10 * MB,)) for i in range(4)]
    plan = all_streamed(uses, 10 * MB)
    found = walk(plan, uses, use_s=[0.02] * 4, rest_s=0, disk=disk(bytes_s=1e9, latency_s=0.001))
    assert found.seconds == pytest.approx(4 * (0.02 + 10 * MB / 1e9), rel=0.1)
    assert found.waited_s == pytest.approx(found.seconds - 0.08)


def test_few_requests_under_way_do_not_get_the_whole_rate():
    uses = [Use((str(i),), (MB,)) for i in range(8)]
    plan = all_streamed(uses, MB)
    one = disk(bytes_s=4e9, latency_s=1e-4, request_bytes_s=1e9)
    found = walk(plan, uses, use_s=[0.0] * 8, rest_s=0, disk=one)
    assert found.seconds == pytest.approx(8 * (1e-4 + MB / 1e9))
    many = [Use((str(i),), (64 * MB,)) for i in range(8)]
    wide = walk(all_streamed(many, 192 * MB), many, use_s=[0.0] * 8, rest_s=0, disk=one)
    assert wide.seconds == pytest.approx(8 * 64 * MB / 4e9, rel=0.01)


@given(forwards(), st.integers(0, 400), st.floats(0, 0.01), st.floats(1e6, 1e10))
def test_it_is_never_below_the_bound_nor_above_one_after_the_other(uses, blocks, use_s, rate):
    plan = solve(least_window(uses) + blocks * BLOCK, {}, uses)
    work = [use_s] * len(uses)
    found = walk(plan, uses, use_s=work, rest_s=0.001, disk=disk(bytes_s=rate))
    flash_s, work_s = plan.missed / rate, sum(work) + 0.001
    assert found.seconds >= max(flash_s, work_s) * (1 - 1e-6) - 1e-9
    assert found.seconds <= (flash_s + work_s) * (1 + 1e-6) + 1e-9 + len(plan.places) * MB / 1e12
    assert found.waited_s == pytest.approx(found.seconds - work_s, abs=1e-6)
