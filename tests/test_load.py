"""elute.load on files: a tiny packed model, answered by the native executor."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_folder import save_tiny_folder

import elute
from elute.api import model_sampling
from elute.evaluate.reference import reference_executor
from elute.runtime.sampler import log_softmax_at


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(folder, cache):
    with elute.load(folder, cache_dir=cache, threads=1) as loaded:
        yield loaded


def test_load_gives_what_the_files_say(model):
    assert model.context == 128
    assert model.can_chat
    assert (model.sampling.temperature, model.sampling.top_p) == (0.6, 0.9)
    assert 4 < model.bits_per_weight < 9
    assert model.detokenize(model.tokenize("the cat 🙂")) == "the cat 🙂"


def test_greedy_answers_repeat_and_do_not_depend_on_threads(model, folder, cache):
    first = model.generate("the cat", max_tokens=20, temperature=0)
    assert first.finish_reason in ("length", "stop")
    assert model.generate("the cat", max_tokens=20, temperature=0).tokens == first.tokens
    with elute.load(folder, cache_dir=cache, threads=2) as other:
        assert other.generate("the cat", max_tokens=20, temperature=0).tokens == first.tokens


def test_a_reused_prefix_does_not_change_the_answer(model, folder, cache):
    model.generate("the cat and the dog sat", max_tokens=4, temperature=0)
    reused = model.generate("the cat and the rain", max_tokens=12, temperature=0)
    assert reused.figures.reused_tokens > 0
    with elute.load(folder, cache_dir=cache, threads=1) as fresh:
        again = fresh.generate("the cat and the rain", max_tokens=12, temperature=0)
    assert again.tokens == reused.tokens


def test_seeded_answers_repeat(model):
    a = model.generate("the", max_tokens=12, temperature=1.5, seed=4)
    assert model.generate("the", max_tokens=12, temperature=1.5, seed=4).text == a.text
    assert model.generate("the", max_tokens=12, temperature=1.5, seed=5).tokens != a.tokens


def test_score_is_near_the_float_reference_of_the_packed_codes(model):
    score = model.score("the cat sat on the mat")
    reference = reference_executor(model.path)
    tokens = np.array(score.tokens)
    logits = reference.forward(tokens[:-1].astype(np.int32), 0, all_logits=True)
    want = log_softmax_at(logits, tokens[1:])
    # int8 activations: each of 15 matmuls in a row errs by about 1/254 of a block's largest value
    assert np.array(score.logprobs[1:], float) == pytest.approx(want, abs=0.5)


@pytest.mark.parametrize("kind", [Path, str])
def test_a_cache_folder_also_keeps_what_was_measured(folder, tmp_path, kernels_file, kind):
    kernels_file.unlink(missing_ok=True)
    elute.load(folder, cache_dir=kind(tmp_path)).close()
    assert (tmp_path / "packed").is_dir()
    assert json.loads((tmp_path / "kernels.json").read_text())["machines"]
    assert not kernels_file.exists()


def test_a_context_beyond_the_training_is_announced(folder, cache, caplog):
    assert elute.load(folder, cache_dir=cache, context=128).context == 128
    assert not caplog.records
    assert elute.load(folder, cache_dir=cache, context=129).context == 129
    assert "context 129 is beyond the 128 tokens" in caplog.text


def test_context_threads_and_isa_are_checked(folder, cache):
    small = elute.load(folder, cache_dir=cache, context=8)
    with pytest.raises(elute.BudgetError, match="but the context is 8"):
        small.generate("the cat sat on the mat and on the hills")
    with pytest.raises(elute.DeviceError, match="isa: found 'mmx'"):
        elute.load(folder, cache_dir=cache, isa="mmx")
    with pytest.raises(elute.ShapeError, match="threads"):
        elute.load(folder, cache_dir=cache, threads=0)
    with pytest.raises(elute.ShapeError, match="cache_type: found 'f8', wanted one of f16, q8"):
        elute.load(folder, cache_dir=cache, cache_type="f8")


def test_a_q8_cache_answers_alike_with_and_without_a_reused_prefix(folder, cache):
    with elute.load(folder, cache_dir=cache, cache_type="q8", threads=2) as model:
        first = model.generate("the cat sat on", max_tokens=8, temperature=0)
        again = model.generate("the cat sat on", max_tokens=8, temperature=0)
        assert again.figures.reused_tokens > 0
        assert again.tokens == first.tokens
    with elute.load(folder, cache_dir=cache, threads=1) as model:
        q8, f16 = (
            score.logprobs[1:]
            for score in (
                elute.load(folder, cache_dir=cache, cache_type="q8").score("the cat sat on"),
                model.score("the cat sat on"),
            )
        )
    assert q8 != f16
    assert q8 == pytest.approx(f16, abs=0.2)


def test_model_sampling_reads_what_the_authors_advise():
    assert model_sampling({}) == elute.Sampling()
    assert model_sampling({"do_sample": False, "temperature": 0.6}).temperature == 0
    assert model_sampling({"top_k": 20, "unknown": 3}).top_k == 20
    with pytest.raises(
        elute.FormatError, match=re.escape("generation_config.json: sampling: top_p")
    ):
        model_sampling({"top_p": 7})


def test_a_model_without_a_template_loads_and_does_not_chat(tmp_path):
    folder = save_tiny_folder(tmp_path / "model", template=False)
    with elute.load(folder, cache_dir=tmp_path / "cache") as model:
        assert not model.can_chat
        assert model.generate("the", max_tokens=2).tokens
        with pytest.raises(elute.UnsupportedError, match="no chat template"):
            model.chat("the")


def test_a_broken_template_stops_chats_and_nothing_else(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for x in %}")
    with elute.load(folder, cache_dir=tmp_path / "cache") as model:
        assert model.generate("the", max_tokens=2).tokens
        with pytest.raises(elute.FormatError, match=r"chat template, line 1: .* or use --raw"):
            model.chat("the")


def test_broken_files_are_one_sentence(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 60}))
    with pytest.raises(elute.EluteError) as caught:
        elute.load(folder, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
