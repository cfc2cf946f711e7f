import pytest
from fakes import FakeExecutor

from elute.bench.end_to_end import bench, random_tokens
from elute.errors import BudgetError


def test_every_test_runs_at_every_thread_count_in_turns():
    executors = {1: FakeExecutor(), 2: FakeExecutor()}
    seen = []
    speeds = bench(
        executors, prompt=16, generate=4, repeats=3, progress=lambda *at: seen.append(at)
    )
    assert [(s.test, s.n_threads, s.repeats) for s in speeds] == [
        ("pp16", 1, 3), ("pp16", 2, 3), ("tg4", 1, 3), ("tg4", 2, 3),
    ]  # fmt: skip
    assert all(0 < s.worst_tok_s <= s.median_tok_s <= s.best_tok_s for s in speeds)
    assert seen[-1] == (12, 12)
    prompts = [call for call in executors[1].calls if call == (0, 16)]
    assert len(prompts) == 3


def test_a_test_of_no_tokens_is_left_out():
    speeds = bench({1: FakeExecutor()}, prompt=0, generate=4, repeats=1)
    assert [s.test for s in speeds] == ["tg4"]


def test_a_test_beyond_the_context_is_refused():
    with pytest.raises(BudgetError, match="found 512 tokens, but the context is 64"):
        bench({1: FakeExecutor()})


def test_random_tokens_repeat():
    assert (random_tokens(9, 100) == random_tokens(9, 100)).all()
