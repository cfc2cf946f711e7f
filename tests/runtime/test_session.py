import contextlib
import threading

import numpy as np
import pytest
from fakes import VOCABULARY, FakeExecutor

from elute.errors import BudgetError, ShapeError, UnsupportedError
from elute.runtime import session as session_module
from elute.runtime.sampler import Sampler, Sampling, log_softmax_at
from elute.runtime.session import Session

GREEDY = Sampling(temperature=0)


def sampler(sampling=GREEDY):
    return Sampler(sampling, vocabulary=VOCABULARY)


def generate(session, prompt, n):
    return [choice.token for choice in session.generate(prompt, sampler(), max_tokens=n)]


def test_second_prompt_reuses_the_longest_common_prefix():
    executor = FakeExecutor()
    session = Session(executor)
    answer = generate(session, [1, 2, 3], 4)
    assert session.history == (1, 2, 3, *answer[:-1])
    executor.calls.clear()
    generate(session, [1, 2, 3, *answer, 9], 1)
    assert executor.calls == [(6, 2)]  # the last token of the answer was never put in, and 9


def test_the_last_prompt_token_is_always_computed_again():
    executor = FakeExecutor()
    session = Session(executor)
    first = generate(session, [1, 2, 3], 1)
    executor.calls.clear()
    assert generate(session, [1, 2, 3], 1) == first
    assert executor.calls == [(2, 1)]


def test_a_reused_prefix_gives_the_same_tokens_as_a_fresh_session():
    session = Session(FakeExecutor())
    generate(session, [5, 6, 7, 8], 5)
    assert generate(session, [5, 6, 1, 2], 6) == generate(Session(FakeExecutor()), [5, 6, 1, 2], 6)


def test_reset_forgets_the_prefix():
    executor = FakeExecutor()
    session = Session(executor)
    generate(session, [1, 2], 1)
    session.reset()
    assert session.reusable([1, 2]) == 0


def test_a_prompt_beyond_the_context_is_an_error_with_both_numbers():
    executor = FakeExecutor(context=8)
    with pytest.raises(
        BudgetError, match=r"found 11 tokens, but the context is 8.*12.*by 3 tokens"
    ):
        Session(executor).generate(list(range(11)), sampler())
    assert executor.calls == []


def test_generation_stops_at_the_end_of_the_context():
    session = Session(FakeExecutor(context=8))
    tokens = generate(session, [1, 2, 3], None)
    assert len(tokens) == 8 - 3 + 1  # the last one is chosen from a full cache
    assert len(session.history) == 8


def test_a_prompt_that_fills_the_context_still_gives_one_token():
    assert len(generate(Session(FakeExecutor(context=4)), [1, 2, 3, 4], None)) == 1


def test_max_tokens_zero_computes_the_prompt_and_chooses_nothing():
    executor = FakeExecutor()
    assert generate(Session(executor), [1, 2], 0) == []
    assert executor.calls == [(0, 2)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "found 0 tokens"), ([1, -1], "found token -1"), ([1, 999], "token 999, wanted 0 to 256")],
)
def test_a_bad_prompt_is_refused_at_the_call(prompt, message):
    with pytest.raises(ShapeError, match=message):
        Session(FakeExecutor()).generate(prompt, sampler())


def test_closing_the_generator_leaves_the_session_usable():
    session = Session(FakeExecutor())
    choices = session.generate([1, 2, 3], sampler())
    next(choices)
    next(choices)
    choices.close()
    assert generate(session, [1, 2, 3], 4) == generate(Session(FakeExecutor()), [1, 2, 3], 4)


def test_an_exception_in_forward_leaves_the_session_usable():
    class Interrupted(FakeExecutor):
        armed = True

        def forward(self, tokens, position, *, all_logits=False):
            logits = super().forward(tokens, position, all_logits=all_logits)
            if self.armed and position:
                self.armed = False
                raise KeyboardInterrupt
            return logits

    session = Session(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        generate(session, [1, 2, 3], 4)
    assert session.history == (1, 2, 3)
    assert generate(session, [1, 2, 3], 4) == generate(Session(FakeExecutor()), [1, 2, 3], 4)


def test_cancelling_stops_between_prompt_chunks(monkeypatch):
    monkeypatch.setattr(session_module, "PROMPT_CHUNK", 4)
    executor = FakeExecutor()
    seen = []
    session = Session(executor)
    choices = session.generate(
        list(range(10)),
        sampler(),
        on_prompt=lambda done, total: seen.append((done, total)),
        cancelled=lambda: len(executor.calls) == 2,
    )
    assert list(choices) == []
    assert executor.calls == [(0, 4), (4, 4)]
    assert seen == [(0, 10), (4, 10), (8, 10)]
    assert session.reusable(list(range(10))) == 8


def test_a_second_generation_ends_the_first_with_an_error():
    session = Session(FakeExecutor())
    first = session.generate([1, 2, 3], sampler())
    next(first)
    second = session.generate([4, 5], sampler())
    next(second)
    with pytest.raises(UnsupportedError, match="another generation began"):
        next(first)
    assert next(second) is not None


def test_threads_cannot_run_the_executor_at_the_same_time():
    inside, worst = 0, 0

    class Counting(FakeExecutor):
        def forward(self, tokens, position, *, all_logits=False):
            nonlocal inside, worst
            inside += 1
            worst = max(worst, inside)
            try:
                return super().forward(tokens, position, all_logits=all_logits)
            finally:
                inside -= 1

    session = Session(Counting())

    def run():
        with contextlib.suppress(UnsupportedError):
            generate(session, [1, 2, 3], 20)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1


def test_a_generation_that_begins_during_a_forward_of_another_thread_is_not_shifted():
    inside, go_on = threading.Event(), threading.Event()

    class Pausing(FakeExecutor):
        def forward(self, tokens, position, *, all_logits=False):
            logits = super().forward(tokens, position, all_logits=all_logits)
            if position == 3 and not go_on.is_set():
                inside.set()
                go_on.wait(10)
            return logits

    def first():
        with contextlib.suppress(UnsupportedError):
            generate(session, [1, 2, 3], 5)

    session = Session(Pausing())
    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(10)
    answers = []
    threads.append(threading.Thread(target=lambda: answers.append(generate(session, [1, 9], 4))))
    threads[1].start()
    threads[1].join(0.2)  # long enough to reach the lock that the first one holds
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert answers == [generate(Session(FakeExecutor()), [1, 9], 4)]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_score_equals_one_forward_over_all_tokens(rows, monkeypatch):
    monkeypatch.setattr(session_module, "LOGITS_BYTES", 4 * VOCABULARY * rows)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    whole = FakeExecutor().forward(np.array(tokens[:-1], np.int32), 0, all_logits=True)
    want = log_softmax_at(whole, np.array(tokens[1:]))
    session = Session(FakeExecutor())
    assert (session.score(tokens) == want).all()
    assert session.score([7]).shape == (0,)


def test_logits_skip_the_rows_before_first():
    executor = FakeExecutor()
    parts = list(Session(executor).logits([1, 2, 3, 4, 5, 6], 3))
    assert [(first, len(rows)) for first, rows in parts] == [(3, 2)]
    assert executor.calls == [(0, 3), (3, 2)]
