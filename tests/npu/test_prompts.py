"""Prompts on a device: the same bits however they are cut, padded, scheduled and kept."""

from __future__ import annotations

import numpy as np
import pytest
from test_executor import relative_error
from tiny import FAMILIES
from tiny_npu import (
    MIXTURES,
    Tiny,
    at_the_edge,
    by_cuts,
    linears,
    plain,
    prompts,
    some_tokens,
    tiny,
)

from elute.errors import BudgetError, ShapeError
from elute.kernels.kv_cache import CacheType
from elute.kernels.lut_matmul import reference as lut_matmul
from elute.model.reference import ReferenceExecutor
from elute.npu import reference
from elute.npu.choices import PLAIN, SHADOWED, choose
from elute.npu.device import Outputs, requantized
from elute.npu.policies import (
    CriticalPath,
    FeedNpu,
    InOrder,
    OutOfOrder,
    Pairs,
    RandomOrder,
    Staggered,
)
from elute.npu.prompts import PromptExecutor
from elute.npu.schedule import Policy
from elute.npu.sim import PROFILES, Keep, Sim
from elute.runtime.executor import CHUNK, isas
from elute.types import F32

POLICIES: list[Policy] = [
    InOrder(),
    Pairs(),
    Pairs(skew=3),
    OutOfOrder(),
    CriticalPath(),
    FeedNpu(),
    Staggered(0.3),
    Staggered(0.3, npu_waits=True),
    *(RandomOrder(seed) for seed in range(6)),
]
# chunk, chunks in flight, threads, share of rows that stay
WAYS = [
    (1, 4, 1, 0.03),
    (7, 3, 2, 0.0),
    (16, 1, 1, 1.0),
    (16, 4, 2, 0.03),
    (33, 2, 2, 1.0),
    (255, 4, 1, 0.0),
]
MODELS = [(f, c) for f in FAMILIES for c in (False, True) if not (c and f in MIXTURES)]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("family", "columns"), MODELS)
def test_no_way_of_running_changes_a_bit(family: str, columns: bool, profile: str) -> None:
    model = tiny(family, columns)
    random = np.random.default_rng([len(family), columns, len(profile)])
    tokens = some_tokens(60, model.ops.vocabulary)
    base = plain(model, profile=profile)
    want = base.prompt(tokens, 0, all_logits=True)
    counts = base.figures().counts
    assert counts.clipped
    assert (counts.saturated > 0) == (PROFILES[profile].outputs is Outputs.INT8)
    ways = random.permutation(WAYS)[:2].tolist()
    for (chunk, in_flight, n_threads, hot_share), policy in zip(
        ways, random.choice(np.array(POLICIES, object), len(ways)), strict=True
    ):
        told = f"{chunk=} {in_flight=} {n_threads=} {hot_share=} {policy}"
        made = prompts(
            model,
            profile=profile,
            chunk=int(chunk),
            in_flight=int(in_flight),
            n_threads=int(n_threads),
            hot_share=hot_share,
            policy=policy,
        )
        cuts = sorted(random.choice(np.arange(1, tokens.size), 3, replace=False).tolist())
        assert np.array_equal(by_cuts(made.prompt, tokens, cuts), want), f"{told} {cuts=}"
        assert np.array_equal(made.prompt(tokens, 0), want[-1:]), told


def test_a_rule_that_is_chosen_from_measured_times_changes_no_bit(monkeypatch) -> None:
    searched = []

    def slowest(graph, times, **given):
        searched.append(graph.n_chunks)
        return InOrder()

    monkeypatch.setattr("elute.npu.prompts.quickest", slowest)
    model = tiny("llama", False)
    tokens = some_tokens(60, model.ops.vocabulary)
    want = plain(model).prompt(tokens, 0, all_logits=True)
    made = prompts(model, chunk=16, n_threads=2)
    for _ in range(3):
        assert np.array_equal(made.prompt(tokens, 0, all_logits=True), want)
        made.prompt(tokens[:16], 0)
    assert searched == [4]  # not before anything was measured, not for one chunk, and once


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_no_policy_changes_a_bit(policy: Policy) -> None:
    model = tiny("qwen2")
    tokens = some_tokens(90, model.ops.vocabulary)
    want = plain(model).prompt(tokens, 0, all_logits=True)
    for in_flight in (1, 2, 4):
        made = prompts(model, chunk=16, in_flight=in_flight, policy=policy, n_threads=2)
        for _ in range(2):  # the second has other times to go by
            got = made.prompt(tokens, 0, all_logits=True)
            assert np.array_equal(got, want), (in_flight, policy)


def test_every_chunk_size_gives_the_same_logits() -> None:
    model = tiny("llama")
    tokens = some_tokens(37, model.ops.vocabulary)
    want = plain(model).prompt(tokens, 0, all_logits=True)
    for chunk in [*range(1, 40, 3), 36, 37, 38, 127, 128, 129, 254, 255, 256]:
        got = prompts(model, chunk=chunk).prompt(tokens, 0, all_logits=True)
        assert np.array_equal(got, want), chunk


@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("linear_isa", isas())
def test_every_instruction_set_gives_the_same_products(linear_isa: str, keep: Keep) -> None:
    model = tiny("qwen2", True)
    tokens = some_tokens(70, model.ops.vocabulary)
    for profile in PROFILES:
        want = plain(model, profile=profile).prompt(tokens, 0, all_logits=True)
        device = Sim(profile, keep=keep)
        made = prompts(model, device=device, linear_isa=linear_isa, hot_share=0.0)
        assert np.array_equal(made.prompt(tokens, 0, all_logits=True), want), profile


@pytest.mark.parametrize("isa", isas())
def test_chunks_are_the_same_on_every_instruction_set(isa: str) -> None:
    model = tiny("qwen3_moe")
    tokens = some_tokens(90, model.ops.vocabulary)
    want = plain(model, isa=isa).prompt(tokens, 0, all_logits=True)
    made = prompts(model, isa=isa, chunk=20, n_threads=3, policy=RandomOrder(3))
    assert np.array_equal(made.prompt(tokens, 0, all_logits=True), want)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("family", "columns"), [("llama", True), ("qwen2", False)])
@pytest.mark.parametrize("times", [2.0, 1e-3])
def test_none_or_every_channel_may_be_an_outlier(
    family: str, columns: bool, times: float, profile: str
) -> None:
    model = tiny(family, columns)
    choices = at_the_edge(model, times)
    tokens = some_tokens(60, model.ops.vocabulary)
    base = plain(model, choices, profile=profile)
    want = base.prompt(tokens, 0, all_logits=True)
    counts = base.figures().counts
    if times > 1:
        assert counts.clipped == 0
        assert base.figures().wanted == 0
    else:
        assert counts.clipped > 0.9 * counts.inputs
    for hot_share, policy in ((0.0, RandomOrder(1)), (1.0, FeedNpu()), (0.03, OutOfOrder())):
        made = prompts(
            model, choices, profile=profile, chunk=13, hot_share=hot_share, policy=policy
        )
        assert np.array_equal(made.prompt(tokens, 0, all_logits=True), want), hot_share
        figures = made.figures()
        assert figures.counts.clipped == counts.clipped
        assert (figures.found > 0) == (hot_share > 0 and figures.wanted > 0)


def oracle(model: Tiny, made: PromptExecutor, tokens: np.ndarray) -> F32:
    """The numpy forward, whose products are those of the device and the shadow in whole numbers."""
    profile = made._device.profile
    linears = {
        product.name: (linear, product)
        for linear in made.linears
        for product in linear.graph.products
    }

    def multiply(x: F32, name: str) -> F32:
        if name not in linears:  # experts and the head
            return lut_matmul.lut_matmul(x, model.source.matrix(name))
        linear, product = linears[name]
        q, starts, channels, residuals = reference.split_outliers(x, product.input_scale)
        w = reference.quantize_weights(model.floats[name], product.weight_scales).astype(np.int64)
        whole = reference.unclipped(q, starts, channels, residuals) if linear.shadow else q
        factors = (product.weight_scales * np.float32(product.input_scale)).astype(np.float32)
        total = (whole.astype(np.int64) @ w.T).astype(np.float32) * factors
        if profile.outputs is Outputs.INT32:
            return total
        of_device = q.astype(np.int64) @ w.T
        result = requantized(of_device.astype(np.int32), product)
        shadow = (whole.astype(np.int64) - q) @ w.T
        y = np.float32(product.output_scale) * result.astype(np.float32)
        y = y + factors * shadow.astype(np.float32)
        y[:] = np.where((result == 127) | (result == -128), total, y)
        return y

    executor = ReferenceExecutor(model.ops, model.floats, linear=multiply, cache_type=CacheType.F16)
    return executor.forward(tokens, 0, all_logits=True)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("family", "columns"), MODELS)
def test_the_products_are_those_of_whole_numbers(family: str, columns: bool, profile: str) -> None:
    """Norms, softmax and rotations differ by some 1e-6 from numpy's: that turns the rounding of
    one value in some thousands, whose output moves by one step of 1/127 of its bound, which all
    tokens after it see in their attention. Most short prompts have none."""
    model = tiny(family, columns)
    made = prompts(model, profile=profile, chunk=3)
    errors = []
    for seed in range(4):
        tokens = some_tokens(6, model.ops.vocabulary, seed)
        got = made.prompt(tokens, 0, all_logits=True)
        errors.append(relative_error(got, oracle(model, made, tokens)))
    assert np.median(errors) < 1e-5, errors
    assert np.max(errors) < 0.1, errors


def test_all_shadows_are_nearer_to_the_model_than_none() -> None:
    model = tiny("qwen2")
    tokens = some_tokens(120, model.ops.vocabulary)
    dense = model.executor().forward(tokens, 0, all_logits=True)
    errors = []
    for choices in (dict.fromkeys(model.statistics, c) for c in (SHADOWED[1], PLAIN[0])):
        got = plain(model, choices).prompt(tokens, 0, all_logits=True)
        errors.append(float(np.median(relative_error(got, dense))))
    with_shadows, without = errors
    assert with_shadows < without, errors


def test_decoding_goes_on_from_the_cache_of_the_device() -> None:
    model = tiny("gemma3_text")
    tokens = some_tokens(60, model.ops.vocabulary)
    one, other = prompts(model, chunk=16), plain(model)
    for made in (one, other):
        made.prompt(tokens[:50], 0)
    for at in range(50, 60):
        got, want = (m.forward(tokens[at : at + 1], at) for m in (one, other))
        assert np.array_equal(got, want), at
    # and a prompt after what was decoded
    assert np.array_equal(one.prompt(tokens[:5], 60), other.prompt(tokens[:5], 60))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_cache_of_codes_is_the_same_too(family: str) -> None:
    model = tiny(family)
    tokens = some_tokens(390, model.ops.vocabulary)
    results = []
    for chunk, cuts in ((256, []), (100, [7, 300]), (31, [])):
        host = model.executor(cache_type=CacheType.Q8)
        device = Sim()
        made = PromptExecutor(host, linears(model, host, device, chunk=chunk), device, chunk=chunk)
        results.append(by_cuts(made.prompt, tokens, cuts))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], plain(model).prompt(tokens, 0, all_logits=True))


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 128])
def test_prompts_need_not_be_multiples_of_a_chunk(n: int) -> None:
    model = tiny("llama")
    tokens = some_tokens(n, model.ops.vocabulary)
    want = plain(model).prompt(tokens, 0, all_logits=True)
    assert np.array_equal(prompts(model).prompt(tokens, 0, all_logits=True), want)


def test_bad_prompts_get_a_sentence_and_change_nothing() -> None:
    model = tiny("llama")
    made = prompts(model)
    n = model.ops.vocabulary
    tokens = some_tokens(50, n)
    want = made.prompt(tokens, 0)
    for bad, position, error, says in [
        (np.zeros(401, np.int32), 0, BudgetError, "context of 400; use a context of 401"),
        (np.zeros(1, np.int32), -1, BudgetError, "positions -1"),
        (np.zeros(0, np.int32), 0, ShapeError, "at least 1"),
        (np.zeros((2, 2), np.int32), 0, ShapeError, "found shape"),
        (np.array([n], np.int32), 0, ShapeError, f"wanted 0 to {n - 1}"),
        (np.array([0.5]), 0, ShapeError, "found type float64"),
        (np.zeros(1, np.int32), 51, ShapeError, "position 51, wanted 0 to the cached 50"),
    ]:
        with pytest.raises(error, match=says) as refused:
            made.prompt(bad, position)
        assert "\n" not in str(refused.value)
    # the cache is as it was
    assert np.array_equal(
        made.forward(tokens[:1], 50), _after(plain(model), tokens).forward(tokens[:1], 50)
    )
    assert np.array_equal(made.prompt(tokens, 0), want)
    whole = some_tokens(400, n)  # just fits
    assert np.array_equal(made.prompt(whole, 0), plain(model).prompt(whole, 0))


def _after(made: PromptExecutor, tokens: np.ndarray) -> PromptExecutor:
    made.prompt(tokens, 0)
    return made


def test_a_prompt_may_have_more_chunks_than_registers() -> None:
    """Chunks of one token: as many as the context has."""
    model = tiny("llama")
    tokens = some_tokens(400, model.ops.vocabulary)
    want = plain(model).prompt(tokens, 0)
    assert np.array_equal(prompts(model, chunk=1).prompt(tokens, 0), want)


@pytest.mark.parametrize("in_flight", [0, -1])
def test_no_chunk_in_flight_is_refused(in_flight: int) -> None:
    with pytest.raises(ShapeError, match=f"found {in_flight} chunks in flight"):
        prompts(tiny("llama"), in_flight=in_flight)


def test_the_default_choices_of_a_calibration_run_and_repeat() -> None:
    for family in ("llama", "qwen3", "gemma3_text", "qwen3_moe"):
        model = tiny(family)
        effects = {name: found.effects for name, found in model.statistics.items()}
        tokens = some_tokens(20, model.ops.vocabulary)
        for pruned in (0.0, 0.75, 1.0):
            choices = choose(effects, pruned)
            want = plain(model, choices).prompt(tokens, 0, all_logits=True)
            got = prompts(model, choices, chunk=CHUNK).prompt(tokens, 0, all_logits=True)
            assert np.isfinite(want).all()
            assert np.array_equal(got, want), (family, pruned)
