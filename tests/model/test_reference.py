"""The reference executor as an executor: cache, limits, hooks. Its numbers: test_families.py."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tiny import tiny_checkpoint

from elute.errors import BudgetError, FormatError, ShapeError
from elute.kernels.kv_cache import CacheType
from elute.model.families import op_list
from elute.model.ops import OpList
from elute.model.reference import ReferenceExecutor

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def checkpoint() -> tuple[dict[str, Any], Weights]:
    return tiny_checkpoint("qwen3", use_sliding_window=True, sliding_window=5, max_window_layers=1)


@pytest.fixture(scope="module")
def ops(checkpoint: tuple[dict[str, Any], Weights]) -> OpList:
    return op_list(checkpoint[0])


@pytest.fixture(scope="module")
def weights(checkpoint: tuple[dict[str, Any], Weights]) -> Weights:
    return checkpoint[1]


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 288, 40, dtype=np.int32)


def test_last_logits_are_the_last_row_of_all(ops, weights, tokens) -> None:
    every = ReferenceExecutor(ops, weights).forward(tokens, 0, all_logits=True)
    last = ReferenceExecutor(ops, weights).forward(tokens, 0)
    assert every.shape == (40, 288)
    assert last.shape == (1, 288)
    assert every.dtype == last.dtype == np.float32
    # One row and many take different paths through BLAS: each sums K = 64 products.
    np.testing.assert_allclose(last[0], every[-1], atol=64 * 1.2e-7 * np.abs(every).max())


def test_going_back_forgets_what_came_after(ops, weights, tokens) -> None:
    executor = ReferenceExecutor(ops, weights)
    executor.forward(tokens, 0)
    again = executor.forward(tokens[10:20], 10)
    fresh = ReferenceExecutor(ops, weights)
    fresh.forward(tokens[:10], 0)
    np.testing.assert_allclose(again, fresh.forward(tokens[10:20], 10), rtol=1e-5, atol=1e-5)
    with pytest.raises(ShapeError, match="position is 30, wanted 0 to the cached 20; run"):
        executor.forward(tokens[30:], 30)


def test_an_interrupted_forward_leaves_only_what_came_before(ops, weights, tokens) -> None:
    interrupt = False

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        if interrupt and name == "model.layers.1.mlp.down_proj.weight":
            raise KeyboardInterrupt
        return x @ weights[name].T

    executor = ReferenceExecutor(ops, weights, linear=linear)
    executor.forward(tokens[:20], 0)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        executor.forward(tokens[30:35], 10)
    interrupt = False
    with pytest.raises(ShapeError, match="wanted 0 to the cached 10"):
        executor.forward(tokens[20:], 20)
    fresh = ReferenceExecutor(ops, weights).forward(tokens[:20], 0)
    np.testing.assert_allclose(executor.forward(tokens[10:20], 10), fresh, rtol=1e-4, atol=1e-4)


def test_context_is_a_limit_with_both_numbers(ops, weights, tokens) -> None:
    executor = ReferenceExecutor(ops, weights, context=16)
    executor.forward(tokens[:15], 0)
    executor.forward(tokens[15:16], 15)
    with pytest.raises(BudgetError, match="17 positions are needed, and the context holds 16; sh"):
        executor.forward(tokens[16:17], 16)
    with pytest.raises(BudgetError, match=r"129 positions .* holds 128"):
        ReferenceExecutor(ops, weights).forward(np.zeros(129, np.int32), 0)


@pytest.mark.parametrize(
    ("tokens", "position", "message"),
    [
        ([], 0, r"tokens has shape \[0\], wanted \[M\]"),
        ([[1, 2]], 0, r"tokens has shape \[1, 2\], wanted \[M\]"),
        ([1, 288], 0, "found token 288, wanted 0 to 287"),
        ([-1], 0, "found token -1, wanted 0 to 287"),
        ([1], 1, "position is 1, wanted 0 to the cached 0"),
        ([1], -1, "position is -1, wanted 0"),
    ],
)
def test_bad_tokens_are_refused(ops, weights, tokens, position: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ReferenceExecutor(ops, weights).forward(np.array(tokens, np.int32), position)


def test_missing_and_misshapen_weights_are_named(ops, weights) -> None:
    name = "model.layers.1.self_attn.k_norm.weight"
    fewer = {key: weight for key, weight in weights.items() if key != name}
    with pytest.raises(FormatError, match=rf"weights: found no tensor {name}, wanted .*\[32\]"):
        ReferenceExecutor(ops, fewer)
    with pytest.raises(ShapeError, match=rf"{name} has shape \[64\], and config.json wants \[32\]"):
        ReferenceExecutor(ops, {**weights, name: np.ones(64, np.float32)})


def test_linear_replaces_every_multiplication(ops, weights, tokens) -> None:
    called: list[str] = []

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        called.append(name)
        return x @ weights[name].T

    embedding = "model.embed_tokens.weight"
    needed = {name: weights[name] for name in (*ops.vectors(), embedding)}
    got = ReferenceExecutor(ops, needed, linear=linear).forward(tokens, 0)
    assert (got == ReferenceExecutor(ops, weights).forward(tokens, 0)).all()
    assert called == [name for name in ops.matrices() if name != embedding]


def test_f16_cache_equals_rounded_keys_and_values(ops, weights, tokens) -> None:
    """One layer attends to what it stored: its keys are rounded after norm and rope, not before."""
    exact = ReferenceExecutor(ops, weights).forward(tokens, 0)
    rounded = ReferenceExecutor(ops, weights, cache_type=CacheType.F16)
    got = rounded.forward(tokens, 0)
    assert (got != exact).any()
    # f16 rounds by 2**-11; two layers of attention and MLP make less than 64 times that of it here.
    assert np.abs(got - exact).max() < 2**-11 * 64 * np.abs(exact).max()
    for cache in (*rounded._keys, *rounded._values):
        stored = cache[:, : len(tokens)]
        assert (stored == stored.astype(np.float16)).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_of_other_float_types_are_widened(ops, weights, tokens, dtype) -> None:
    narrow = {name: weight.astype(dtype) for name, weight in weights.items()}
    widened = {name: weight.astype(np.float32) for name, weight in narrow.items()}
    got = ReferenceExecutor(ops, narrow).forward(tokens, 0)
    assert (got == ReferenceExecutor(ops, widened).forward(tokens, 0)).all()
