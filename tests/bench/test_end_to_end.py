import pytest
from fakes import FakeExecutor

from elute.bench.ceilings import Ceilings
from elute.bench.end_to_end import (
    SpeedTest,
    bench,
    context_of,
    random_tokens,
    speed_tests,
)
from elute.errors import BudgetError


def test_names_and_tokens_are_llama_benchs():
    tests = speed_tests(512, 128, (0, 4096, 0))
    assert [test.name for test in tests] == ["pp512", "tg128", "pp512@d4096", "tg128@d4096"]
    assert [test.n_tokens for test in tests] == [512, 128, 512, 128]
    assert context_of(tests) == 4096 + 512


def test_every_test_runs_at_every_thread_count_in_turns():
    executors = {1: FakeExecutor(), 2: FakeExecutor()}
    seen = []
    speeds = bench(executors, speed_tests(16, 4), repeats=3, progress=lambda *at: seen.append(at))
    assert [(s.test.name, s.n_threads, len(s.seconds)) for s in speeds] == [
        ("pp16", 1, 3), ("pp16", 2, 3), ("tg4", 1, 3), ("tg4", 2, 3),
    ]  # fmt: skip
    assert all(0 < s.worst_tok_s <= s.median_tok_s <= s.best_tok_s for s in speeds)
    assert all(s.ratio is None and s.ceilings is None for s in speeds)
    assert seen[-1] == (12, 12)
    prompts = [call for call in executors[1].calls if call == (0, 16)]
    assert len(prompts) == 3


def test_the_rival_takes_turns_and_is_first_every_other_time():
    turns = []

    class Ours(FakeExecutor):
        def forward(self, tokens, position, **options):
            if len(tokens) == 16:
                turns.append("ours")
            return super().forward(tokens, position, **options)

    def rival(test, n_threads):
        assert (test, n_threads) == (SpeedTest(16, 0), 2)
        turns.append("theirs")
        return 1e3

    (speed,) = bench({2: Ours()}, speed_tests(16, 0), repeats=3, rival=rival)
    assert turns == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert speed.rival_seconds == (1e3,) * 3
    assert speed.rival_median_tok_s == 16 / 1e3
    assert speed.ratio == sorted(1e3 / s for s in speed.seconds)[1]


def test_a_depth_is_filled_once_and_not_timed():
    executor = FakeExecutor()
    tests = speed_tests(4, 2, (0, 40))
    bench({1: executor}, tests, repeats=2)
    assert executor.calls.count((0, 40)) == 1
    assert executor.calls[-3:] == [(40, 4), (40, 1), (41, 1)]


def test_the_ceilings_are_medians_of_those_round_each_run():
    bandwidths = iter([9.0, 1.0, 2.0, 2.0, 7.0, 0.5])
    (speed,) = bench(
        {1: FakeExecutor()},
        speed_tests(4, 0),
        repeats=3,
        ceilings=lambda n_threads: Ceilings((next(bandwidths),), 10.0 * n_threads),
    )
    assert speed.ceilings == Ceilings((2.0,), 10.0)


def test_a_test_of_no_tokens_is_left_out():
    assert [test.name for test in speed_tests(0, 4)] == ["tg4"]


def test_a_test_beyond_the_context_is_refused():
    with pytest.raises(BudgetError, match="found 512 tokens, but the context is 64"):
        bench({1: FakeExecutor()}, speed_tests(512, 128))


def test_random_tokens_repeat():
    assert (random_tokens(9, 100) == random_tokens(9, 100)).all()
