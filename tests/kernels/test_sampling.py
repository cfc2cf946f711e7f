"""The law of sampling: native and numpy choose the same tokens, on every instruction set."""

import math
import zlib

import levels
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elute import _native
from elute.kernels.sampling import reference

ISAS = _native.isas()
BLOCK = 128  # kPeakBlock
LENGTHS = [1, 2, 7, 8, 9, 16, 17, 31, 33, 127, 128, 129, 255, 257, 1000, 4099]
LARGEST = float(np.finfo(np.float32).max)

each_isa = pytest.mark.parametrize("isa", ISAS)
each_float_isa = pytest.mark.parametrize("isa", levels.float_isas())

OFF = {
    "inverse_temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "gap": -math.inf,
    "repetition": 1.0,
    "presence": 0.0,
    "frequency": 0.0,
    "prompt": np.zeros(0, np.int32),
    "biases": [],
}


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


# ---- the passes over all logits


@each_float_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_block_peaks_are_the_largest_of_each_block(isa, n, rng):
    x = rng.normal(-5, 3, n).astype(np.float32)
    finite, peaks = levels.float_kernels(isa).block_peaks(x)
    assert finite
    assert peaks.tolist() == [x[i : i + BLOCK].max() for i in range(0, n, BLOCK)]


@each_float_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, 8, 127, 128, 140, 143, 144])
def test_one_value_that_is_not_finite_is_seen_anywhere(isa, bad, at):
    x = np.zeros(145, np.float32)
    x[at] = bad
    assert not levels.float_kernels(isa).block_peaks(x)[0]


@each_float_isa
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("spread", [0.0, 3.0, 1e4, LARGEST])
def test_masses_and_their_sums_are_the_reference_bit_for_bit(isa, n, spread, rng):
    x = (rng.uniform(-1, 1, n) * spread).astype(np.float32)
    kernels, factor = levels.float_kernels(isa), np.float32(1.3)
    want = reference.masses(x, x.max(), factor)
    assert kernels.masses(x, x.max(), factor).tolist() == want.tolist()
    sums = [want[i : i + BLOCK].sum(dtype=np.float64) for i in range(0, n, BLOCK)]
    assert kernels.block_masses(x, x.max(), factor).tolist() == sums


def test_a_mass_is_the_exponential_rounded_to_its_unit():
    y = np.linspace(-30, 0, 300_001, dtype=np.float32)
    mass = reference.masses(y, np.float32(0), np.float32(1)).astype(np.float64)
    want = np.exp(y.astype(np.float64))
    assert (abs(mass - want) <= 2.0**-35 + 1.5e-7 * want).all()
    assert (mass * 2**34 % 1 == 0).all()
    assert mass[-1] == 1
    assert mass[0] == 0


# ---- the law


def twins(vocabulary, **changes):
    """The reference, and the native sampler of every instruction set."""
    values = {**OFF, **changes}
    return [
        reference.Sampler(vocabulary, **values),
        *(_native.Sampler(isa, vocabulary, **values) for isa in ISAS),
    ]


def check_same_tokens(logits, uniforms, **changes):
    """Step after step, as penalties remember what was chosen."""
    samplers = twins(logits.size, **changes)
    for uniform in uniforms:
        tokens = [sampler.choose(logits, uniform) for sampler in samplers]
        assert tokens == tokens[:1] * len(tokens), (tokens, uniform, changes)


# Nuclei of thousands, whose ends and draws are found without ranking all: what makes that hard is
# ties, a floor that ends them first, masses of 0, and one bucket that holds everything.
LARGE_NUCLEI = {
    "power law": lambda rng, n: -1.1 * np.log(rng.permutation(n) + 2.7),
    "ties": lambda rng, n: np.round(rng.normal(0, 1, n), 1),
    "all equal": lambda rng, n: np.full(n, -3.0),
    "two values": lambda rng, n: rng.integers(0, 2, n) * 1e-38,
    "far below": lambda rng, n: np.where(rng.integers(0, 3, n) > 0, rng.normal(0, 1, n), -1e38),
    "neighbours": lambda rng, n: 1 + rng.integers(0, 3000, n) * 2.0**-23,
}


@pytest.mark.parametrize("kind", LARGE_NUCLEI)
@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999, math.nextafter(1, 0)])
@pytest.mark.parametrize("gap", [-math.inf, -2.5, -1e-3])
def test_a_large_nucleus_is_the_reference_token_for_token(kind, top_p, gap, rng):
    logits = LARGE_NUCLEI[kind](rng, 20_000).astype(np.float32)
    uniforms = [0.0, *rng.random(6), math.nextafter(1, 0)]
    for inverse_temperature in (0.5, 1.25):
        check_same_tokens(
            logits, uniforms, top_p=top_p, gap=gap, inverse_temperature=inverse_temperature
        )


def test_a_vocabulary_too_large_for_exact_sums_is_ranked(rng):
    logits = LARGE_NUCLEI["power law"](rng, (1 << 19) + 1).astype(np.float32)
    check_same_tokens(logits, [0.0, 0.4, 0.99], top_p=0.95)


uniform = st.one_of(st.floats(0, 1, exclude_max=True), st.just(math.nextafter(1, 0)))


@st.composite
def logit_arrays(draw):
    n = draw(st.sampled_from([1, 2, 9, 128, 129, 700, 2500, 9000]))
    kind = draw(st.sampled_from(["normal", "few values", "all equal", "wide", "extreme"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "normal":
        x = random.normal(0, draw(st.sampled_from([0.01, 1.0, 8.0])), n)
    elif kind == "few values":  # ties everywhere, and both zeros
        x = random.choice([-1.0, -0.0, 0.0, 1.0], n)
    elif kind == "all equal":
        x = np.full(n, random.normal())
    elif kind == "wide":
        x = random.normal(0, 1, n) * 10.0 ** random.uniform(-3, 3, n)
    else:
        x = random.choice([-LARGEST, 0.0, 1.0, LARGEST], n)
    return x.astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    logits=logit_arrays(),
    uniforms=st.lists(uniform, min_size=1, max_size=3),
    temperature=st.sampled_from([1e-6, 0.3, 0.8, 1.0, 7.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 300, 10_000]),
    top_p=st.one_of(st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.floats(0, 1)),
    min_p=st.one_of(st.sampled_from([0.0, 0.05, 1.0]), st.floats(1e-9, 1)),
)
def test_native_filters_and_draws_as_the_reference(
    logits, uniforms, temperature, top_k, top_p, min_p
):
    check_same_tokens(
        logits,
        uniforms,
        inverse_temperature=1 / temperature,
        top_k=top_k,
        top_p=top_p,
        gap=temperature * math.log(min_p) if min_p else -math.inf,
    )


@settings(max_examples=100, deadline=None)
@given(
    logits=logit_arrays(),
    uniforms=st.lists(uniform, min_size=2, max_size=8),
    repetition=st.sampled_from([1.0, 0.01, 0.5, 1.3, 100.0]),
    presence=st.sampled_from([0.0, 0.7, -100.0]),
    frequency=st.sampled_from([0.0, 0.3, -2.0]),
    biases=st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100, width=32), max_size=9),
    prompt=st.lists(st.integers(0, 10**6), max_size=40),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([0.9, 1.0]),
)
def test_native_changes_logits_as_the_reference(
    logits, uniforms, repetition, presence, frequency, biases, prompt, top_k, top_p
):
    check_same_tokens(
        logits,
        uniforms,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        biases=[(token % logits.size, bias) for token, bias in biases.items()],
        prompt=np.array(prompt, np.int32) % logits.size,
        top_k=top_k,
        top_p=top_p,
    )


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999])
def test_a_level_distribution_over_a_large_vocabulary_agrees(top_p, rng):
    """Top-p keeps far more than the first attempt ranks."""
    logits = (-1.1 * np.log(rng.permutation(150_000) + 2.7)).astype(np.float32)
    check_same_tokens(logits, rng.random(3), top_p=top_p)
    check_same_tokens(logits, rng.random(3), top_p=top_p, gap=-9.0)


@pytest.mark.parametrize("vocabulary", [151_936, 262_208, 524_288])
def test_sums_over_the_largest_vocabularies_are_exact(vocabulary, rng):
    level = np.zeros(vocabulary, np.float32)
    check_same_tokens(level, [0.0, 0.3, math.nextafter(1, 0)])
    check_same_tokens(rng.normal(0, 0.1, vocabulary).astype(np.float32), rng.random(4))


@each_isa
def test_the_last_place_is_the_last_token_with_mass(isa):
    logits = np.array([0.0, 0.0, -60.0], np.float32)
    values = {**OFF, "top_p": 1.0}
    assert _native.Sampler(isa, 3, **values).choose(logits, math.nextafter(1, 0)) == 1


# ---- best


@settings(max_examples=60, deadline=None)
@given(logits=logit_arrays(), n=st.sampled_from([0, 1, 5, 1000]))
def test_best_is_the_reference(logits, n):
    want, *found = (sampler.best(logits, n) for sampler in twins(logits.size))
    assert all(got == want for got in found)


@example(spread=0.0)
@given(spread=st.floats(0, 20))
def test_best_gives_the_logarithm_of_the_sum(spread):
    logits = np.random.default_rng(0).normal(0, spread, 1000).astype(np.float32)
    peak, mass, _ = _native.Sampler(ISAS[0], 1000, **OFF).best(logits, 0)
    want = np.log(np.exp(logits.astype(np.float64) - logits.max()).sum())
    assert peak == logits.max()
    assert math.log(mass) == pytest.approx(want, rel=0, abs=1000 * 2.0**-35 / mass + 2e-7)


# ---- refusals


@each_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_chooses_nothing_and_counts_nothing(isa, bad):
    sampler = _native.Sampler(isa, 3, **{**OFF, "top_k": 1, "presence": 5.0})
    assert sampler.choose(np.array([0, bad, 1], np.float32), 0.0) == -1
    good = np.array([0, 2, 1], np.float32)
    assert [sampler.choose(good, 0.0) for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inverse_temperature": 0.0}, "positive inverse_temperature"),
        ({"inverse_temperature": math.inf}, "positive inverse_temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": math.nan}, "top_p"),
        ({"gap": 0.1}, "gap"),
        ({"repetition": 0.0}, "repetition"),
        ({"presence": math.inf}, "finite penalties"),
        ({"biases": [(4, 0.0)]}, "finite biases"),
        ({"biases": [(0, math.nan)]}, "finite biases"),
        ({"prompt": np.array([-1], np.int32)}, "prompt"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _native.Sampler(ISAS[0], 4, **{**OFF, **changes})


def test_logits_of_another_vocabulary_and_places_outside_are_refused():
    sampler = _native.Sampler(ISAS[0], 4, **OFF)
    with pytest.raises(ValueError, match="found 5, wanted 4"):
        sampler.choose(np.zeros(5, np.float32), 0.0)
    for place in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="uniform"):
            sampler.choose(np.zeros(4, np.float32), place)
    with pytest.raises(ValueError, match="vocabulary"):
        _native.Sampler(ISAS[0], 0, **OFF)
