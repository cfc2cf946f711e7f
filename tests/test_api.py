import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import END, FakeExecutor, FakeTemplate, FakeTokenizer

import elute
from elute.api import Model


def model(script=None, *, template=True, **options):
    return Model(
        FakeExecutor(script=script, **options),
        FakeTokenizer(),
        name="fake",
        path=Path("fake"),
        template=FakeTemplate() if template else None,
        sampling=elute.Sampling(temperature=0),
    )


def test_import_is_light_and_exports_at_most_twelve_names():
    code = (
        "import sys, time; t = time.perf_counter(); import elute; s = time.perf_counter() - t;"
        "assert 'numpy' not in sys.modules; assert len(elute.__all__) <= 12;"
        "assert all(hasattr(elute, name) for name in elute.__all__); print(s)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


def test_unknown_names_are_attribute_errors_and_dir_lists_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        elute.nothing  # noqa: B018
    assert set(elute.__all__) <= set(dir(elute))


def test_generate_continues_the_text_as_it_is():
    done = model(b"hello").generate("x", max_tokens=3)
    assert (done.text, done.finish_reason) == ("hel", "length")


def test_stream_and_generate_agree():
    chunks = list(model(b"hello").stream("x"))
    assert "".join(chunk.text for chunk in chunks) == model(b"hello").generate("x").text == "hello"


def test_closing_a_stream_leaves_the_model_usable():
    m = model(b"hello")
    chunks = m.stream("x")
    assert next(chunks).text == "h"
    chunks.close()
    done = m.generate("x")
    assert (done.text, done.figures.reused_tokens) == ("hello", 0)


def test_chat_goes_through_the_template():
    m = model(b"hi")
    done = m.chat("who?")
    assert done.text == "hi"
    assert bytes(m.executor.cache[:10]) == b"<user>who?"
    assert m.executor.cache[10] == END  # special tokens of the template are tokens


def test_a_message_that_spells_a_special_token_is_text():
    prompt = model().prompt([{"role": "user", "content": "a<end>b"}])
    assert prompt == [*b"<user>a<end>b", END, *b"<assistant>"]


def test_a_second_turn_reuses_the_first():
    m = model(b"hi", context=256)
    messages = [{"role": "user", "content": "who?"}]
    first = m.chat(messages)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "and?"},
    ]
    second = m.chat(messages)
    # the whole first prompt and the answer without its end token, which was never computed
    assert second.figures.reused_tokens == first.figures.prompt_tokens + 2


def test_chat_without_a_template_says_so():
    with pytest.raises(elute.UnsupportedError, match=r"no chat template.*--raw"):
        model(template=False).chat("who?")


def test_sampling_options_change_single_fields():
    m = model()
    a = m.generate("x", max_tokens=5, temperature=1.0, seed=3)
    b = m.generate("x", max_tokens=5, sampling=elute.Sampling(temperature=1.0, seed=3))
    assert a.seed == 3
    assert a.tokens != m.generate("x", max_tokens=5).tokens
    assert b.seed == 3
    with pytest.raises(elute.ShapeError, match="temperature"):
        m.generate("x", temperature=-1)


def test_score_is_the_log_probability_of_each_token():
    m = model()
    score = m.score("abc")
    greedy = m.generate("ab", max_tokens=1, logprobs=0)
    assert score.logprobs[0] is None
    assert len(score.tokens) == len(score.logprobs) == 3
    again = m.score([*b"ab", greedy.tokens[0]])
    assert again.logprobs[2] == pytest.approx(greedy.logprobs[0].logprob, abs=1e-6)
    assert math.isclose(score.total, score.logprobs[1] + score.logprobs[2])


def test_tokenize_can_read_special_tokens_as_text():
    m = model()
    assert m.tokenize("a<end>") == [97, END]
    assert m.tokenize("a<end>", special=False) == list(b"a<end>")


def test_a_closed_model_refuses_and_closes_twice():
    with model(b"hi") as m:
        assert m.generate("x").text == "hi"
    m.close()
    with pytest.raises(elute.DeviceError, match="closed"):
        m.generate("x")


def test_a_stream_that_is_open_at_close_ends_with_an_error():
    m = model()
    chunks = m.stream("x")
    next(chunks)
    m.close()
    with pytest.raises(elute.UnsupportedError):
        list(chunks)


@pytest.mark.parametrize("ids", [np.array([104, 105]), [np.int64(104), np.int32(105)], (104, 105)])
def test_token_ids_may_be_numpys(ids):
    assert model().prompt(ids) == [104, 105]


@pytest.mark.parametrize(
    "prompt", [[1, "a"], [None], [1.5], np.array([1.0]), {"role": "user"}, b"ab", None, 5]
)
def test_a_prompt_of_another_kind_is_refused(prompt):
    with pytest.raises(elute.ShapeError, match=r"found .*, wanted text, token ids, or messages"):
        model().generate(prompt)


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(elute.BudgetError, match=r"found 65 tokens, but the context is 64"):
        model().generate("x" * 65)
