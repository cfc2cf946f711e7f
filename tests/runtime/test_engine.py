import pytest
from fakes import END, FakeExecutor, FakeTextStream
from hypothesis import given
from hypothesis import strategies as st

from elute.errors import ShapeError
from elute.runtime.engine import Engine, join
from elute.runtime.sampler import Sampling
from elute.runtime.stops import StopFilter

GREEDY = Sampling(temperature=0)


def engine(script=None, **options):
    executor = FakeExecutor(script=script, **options)
    return Engine(executor, text_stream=FakeTextStream, end_tokens=[END])


def test_answer_ends_at_the_end_token_which_is_not_shown():
    done = join(engine(b"hello").stream(b"x", GREEDY))
    assert (done.text, done.finish_reason, done.stop) == ("hello", "stop", None)
    assert done.tokens == (*b"hello", END)
    assert done.figures.generated_tokens == 6
    assert done.figures.prompt_tokens == 1


def test_ignore_end_goes_on_to_max_tokens():
    done = join(engine(b"hello").stream(b"x", GREEDY, max_tokens=9, ignore_end=True))
    assert done.finish_reason == "length"
    assert len(done.tokens) == 9


def test_max_tokens_and_the_context_end_with_length():
    assert join(engine(b"hello").stream(b"x", GREEDY, max_tokens=2)).finish_reason == "length"
    done = join(engine(b"hello" * 9, context=8).stream(b"x", GREEDY))
    assert (done.finish_reason, len(done.tokens)) == ("length", 8)


def test_characters_are_whole_in_every_chunk():
    text = "né 漢字 🙂!"
    chunks = list(engine(text.encode()).stream(b"x", GREEDY))
    assert "".join(chunk.text for chunk in chunks) == text
    assert all("�" not in chunk.text for chunk in chunks)
    assert [len(chunk.tokens) for chunk in chunks if chunk.text == "🙂"] == [4]


def test_an_unfinished_character_at_the_end_is_shown_as_a_replacement():
    done = join(engine("a🙂".encode()).stream(b"x", GREEDY, max_tokens=3))
    assert done.text == "a�"


def test_a_stop_string_across_tokens_is_never_shown():
    chunks = list(engine(b"one two STOP three").stream(b"x", GREEDY, stop=["STOP"]))
    assert "".join(chunk.text for chunk in chunks) == "one two "
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].stop == "STOP"
    assert all("S" not in chunk.text for chunk in chunks)


def test_text_held_for_a_stop_string_is_shown_when_none_comes():
    assert join(engine(b"one ST").stream(b"x", GREEDY, stop=["STOP"])).text == "one ST"


def test_cancelling_ends_with_its_own_reason_and_leaves_the_engine_usable():
    e = engine(b"hello")
    shown = []
    for chunk in e.stream(b"x", GREEDY, cancelled=lambda: len(shown) == 2):
        shown.append(chunk)
    assert shown[-1].finish_reason == "cancelled"
    assert "".join(chunk.text for chunk in shown) == "he"
    assert join(e.stream(b"x", GREEDY)).text == "hello"


def test_cancelling_the_prompt_gives_an_empty_answer():
    done = join(engine(b"hello").stream(b"x", GREEDY, cancelled=lambda: True))
    assert (done.text, done.finish_reason, done.tokens) == ("", "cancelled", ())


def test_the_figures_of_a_cancelled_prompt_count_what_was_computed(monkeypatch):
    monkeypatch.setattr("elute.runtime.session.PROMPT_CHUNK", 2)
    e = engine(b"hello")
    calls = e.session.executor.calls
    done = join(e.stream(b"abcdef", GREEDY, cancelled=lambda: len(calls) == 2))
    assert done.figures.prompt_tokens == 4


def test_logprobs_follow_the_tokens():
    sampling = Sampling(temperature=0, logprobs=3)
    done = join(engine(b"hi").stream(b"x", sampling))
    assert [entry.token for entry in done.logprobs] == list(done.tokens)
    assert all(len(entry.top) == 3 and entry.top[0][0] == entry.token for entry in done.logprobs)


def test_reuse_is_in_the_figures():
    e = engine(b"hi")
    join(e.stream(b"abcdef", GREEDY))
    assert join(e.stream(b"abcdef", GREEDY)).figures.reused_tokens == 5


def test_bad_arguments_are_refused_before_the_first_chunk():
    with pytest.raises(ShapeError, match="max_tokens: found -1"):
        engine().stream(b"x", GREEDY, max_tokens=-1)
    with pytest.raises(ShapeError, match="stop: found an empty string"):
        engine().stream(b"x", GREEDY, stop=[""])


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_stop_filter_shows_the_text_before_the_first_stop_however_it_is_cut(text, stops, cuts):
    filtered, shown, at = StopFilter(stops), "", 0
    for size in cuts:
        shown += filtered.feed(text[at : at + size])
        at += size
        if filtered.stopped is not None:
            break
    shown += filtered.flush()
    if filtered.stopped is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + filtered.stopped)
        assert not any(stop in shown for stop in stops)
