import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elute.errors import DeviceError, ShapeError
from elute.runtime.sampler import Sampler, Sampling, log_softmax_at

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def draws(logits, n=2000, **settings_):
    sampler = Sampler(Sampling(**{**PLAIN, "seed": 1, **settings_}), vocabulary=len(logits))
    logits = np.asarray(logits, np.float32)
    return np.array([sampler.sample(logits).token for _ in range(n)])


def probabilities(logits):
    e = np.exp(np.asarray(logits, np.float64) - max(logits))
    return e / e.sum()


def test_greedy_takes_the_lowest_id_among_equals():
    sampler = Sampler(Sampling(temperature=0), vocabulary=4)
    assert sampler.sample(np.array([1, 3, 3, 2], np.float32)).token == 1


def test_same_seed_draws_the_same_tokens_and_another_seed_does_not():
    logits = np.linspace(0, 1, 50)
    assert (draws(logits, 50, seed=7) == draws(logits, 50, seed=7)).all()
    assert (draws(logits, 50, seed=7) != draws(logits, 50, seed=8)).any()


def test_without_a_seed_the_drawn_one_repeats_the_tokens():
    logits = np.linspace(0, 1, 50, dtype=np.float32)
    first = Sampler(Sampling(**PLAIN), vocabulary=50)
    tokens = [first.sample(logits).token for _ in range(20)]
    again = Sampler(Sampling(**PLAIN, seed=first.seed), vocabulary=50)
    assert [again.sample(logits).token for _ in range(20)] == tokens


def test_draws_follow_the_distribution_at_a_temperature():
    logits = [0.0, 1.0, 2.0, -1.0]
    share = np.bincount(draws(logits, 20000, temperature=0.5), minlength=4) / 20000
    want = probabilities([2 * x for x in logits])
    # five standard deviations of a binomial share
    assert (abs(share - want) <= 5 * np.sqrt(want * (1 - want) / 20000) + 1e-9).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e-3])
def test_a_cold_temperature_is_greedy_and_overflows_nothing(temperature):
    assert set(draws([1.0, 30.0, 29.9, -50.0], 20, temperature=temperature)) == {1}


def test_top_k_keeps_k_and_breaks_ties_by_id():
    assert set(draws([1, 2, 2, 2, 0], top_k=2)) == {1, 2}


def test_top_k_one_is_greedy():
    assert set(draws([1, 5, 2], top_k=1)) == {1}


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(draws(logits, top_p=0.49)) == {0}
    assert set(draws(logits, top_p=0.51)) == {0, 1}
    assert set(draws(logits, top_p=0.81)) == {0, 1, 2}
    assert set(draws(logits, top_p=0.0)) == {0}


def test_top_p_counts_within_what_top_k_left():
    # of the top three alone, 0.5 is 0.526: the first token is enough for top_p 0.52
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(draws(logits, top_k=3, top_p=0.52)) == {0}
    assert set(draws(logits, top_p=0.52)) == {0, 1}


def test_min_p_is_relative_to_the_best_token():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(draws(logits, min_p=0.31)) == {0, 1}
    assert set(draws(logits, min_p=1.0)) == {0}


def test_repetition_penalty_covers_prompt_and_answer():
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    sampler = Sampler(sampling, vocabulary=3, prompt=[0])
    logits = np.array([3.0, 2.0, 1.6], np.float32)
    assert [sampler.sample(logits).token for _ in range(3)] == [1, 2, 0]


def test_repetition_penalty_lowers_negative_logits_too():
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), vocabulary=2, prompt=[0])
    assert sampler.sample(np.array([-1.0, -1.5], np.float32)).token == 1


def test_presence_penalty_counts_once_and_frequency_penalty_every_time():
    logits = np.array([2.0, 0.9], np.float32)
    presence = Sampler(Sampling(temperature=0, presence_penalty=1.0), vocabulary=2, prompt=[0])
    assert [presence.sample(logits).token for _ in range(3)] == [0, 0, 0]  # 1.0 beats 0.9
    frequency = Sampler(Sampling(temperature=0, frequency_penalty=1.0), vocabulary=2)
    assert [frequency.sample(logits).token for _ in range(3)] == [0, 0, 1]


def test_logit_bias_bans_and_forces_and_leaves_the_logits_alone():
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    kept = logits.copy()
    assert (
        Sampler(Sampling(temperature=0, logit_bias={0: -100.0}), vocabulary=3).sample(logits).token
        == 1
    )
    assert (
        Sampler(Sampling(temperature=0, logit_bias={2: 100.0}), vocabulary=3).sample(logits).token
        == 2
    )
    assert (logits == kept).all()


def test_logprobs_are_of_the_model_before_bias_and_temperature():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampling = Sampling(temperature=0, logit_bias={2: 100.0}, logprobs=2)
    choice = Sampler(sampling, vocabulary=3).sample(logits)
    assert choice.token == 2
    assert choice.logprob.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in choice.logprob.top] == [0, 1]
    assert choice.logprob.top[0][1] == pytest.approx(math.log(0.5), abs=1e-6)
    none = Sampler(Sampling(temperature=0, logprobs=0), vocabulary=3).sample(logits)
    assert none.logprob.top == ()
    assert none.logprob.logprob == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_logit_is_a_device_error_that_names_it(bad):
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(DeviceError, match=r"logits: token 1 has .*inf|logits: token 1 has nan"):
        Sampler(Sampling(), vocabulary=3).sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", 101.0),
        ("seed", -1),
        ("logprobs", -1),
        ("logprobs", True),
        ("logit_bias", {5: 101.0}),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(name, value):
    with pytest.raises(ShapeError, match=f"sampling: {name}") as caught:
        Sampling(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(ShapeError, match="names token 3, wanted 0 to 2"):
        Sampler(Sampling(logit_bias={3: 1.0}), vocabulary=3)


@given(
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 60),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.01, 100),
    bias=st.floats(-100, 100),
)
def test_every_setting_in_range_chooses_a_token(
    seed, temperature, top_k, top_p, min_p, penalty, bias
):
    sampler = Sampler(
        Sampling(temperature, top_k, top_p, min_p, penalty, bias, bias, seed, {3: bias}, 2),
        vocabulary=50,
        prompt=[1, 1, 4],
    )
    logits = np.random.default_rng(seed).normal(0, 5, 50).astype(np.float32)
    for _ in range(3):
        choice = sampler.sample(logits)
        assert 0 <= choice.token < 50
        assert choice.logprob.logprob <= 1e-6


def test_log_softmax_at_matches_the_definition():
    logits = np.random.default_rng(0).normal(0, 5, (7, 33)).astype(np.float32)
    tokens = np.arange(7) * 4
    want = [math.log(probabilities(row)[t]) for row, t in zip(logits, tokens, strict=True)]
    assert log_softmax_at(logits, tokens) == pytest.approx(want, rel=1e-5)
