"""The native executor against the numpy forward, and the laws that make a token's bits its own."""

from __future__ import annotations

import copy
import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import FAMILIES, MIXTURES, tiny_checkpoint

from elute.errors import BudgetError, DeviceError, ShapeError, UnsupportedError
from elute.kernels.kv_cache import CacheType
from elute.kernels.lut_matmul import reference as lut_matmul
from elute.kernels.registry import Kernel
from elute.model.families import op_list
from elute.model.ops import Experts, OpList, Router
from elute.model.reference import ReferenceExecutor
from elute.pack import quads
from elute.quantize.rtn import quantize
from elute.runtime.executor import CHUNK, MAX_CONTEXT, Executor, isas
from elute.types import F32, OVER_READ, PackedMatrix, QuantizedMatrix


class InMemory:
    """A WeightSource of packed matrices."""

    def __init__(self, matrices: dict[str, QuantizedMatrix], vectors: dict[str, F32]) -> None:
        self._packed: dict[str, PackedMatrix] = {}
        for name, matrix in matrices.items():
            packed = quads.pack(matrix)
            room = np.zeros(packed.planes.size + OVER_READ, np.uint8)
            room[: packed.planes.size] = packed.planes
            object.__setattr__(packed, "planes", room[: packed.planes.size])
            self._packed[name] = packed
        self._vectors = vectors

    def matrix(self, name: str) -> PackedMatrix:
        return self._packed[name]

    def vector(self, name: str) -> F32:
        return self._vectors[name]


Made = tuple[OpList, InMemory, dict[str, F32]]


@pytest.fixture(scope="module")
def made() -> Callable[..., Made]:
    cache: dict[str, Made] = {}

    def make(family: str, *, columns: bool = False, **overrides: object) -> Made:
        key = f"{family} {columns} {overrides}"
        if key not in cache:
            config, weights = tiny_checkpoint(family, **overrides)
            ops = op_list(config)
            rng = np.random.default_rng(5)
            matrices, floats = {}, dict(weights)
            for i, name in enumerate(ops.matrices()):
                w = weights[name]
                order = None
                if columns and "proj" in name:
                    order = rng.permutation(w.shape[1]).astype(np.int32)
                    w = w[:, order]
                bits = (4, 8, 3, 5)[i % 4]
                matrix = quantize(w, bits=bits, group_size=32, symmetric=bits % 2 == 0)
                object.__setattr__(matrix, "columns", order)
                matrices[name] = matrix
                floats[name] = matrix.dequantize()
            vectors = {name: weights[name] for name in ops.vectors()}
            cache[key] = (ops, InMemory(matrices, vectors), floats)
        return cache[key]

    return make


def reference(made: Made, tokens: np.ndarray, cache_type: CacheType = CacheType.F16) -> F32:
    ops, source, floats = made
    linear = lambda x, name: lut_matmul.lut_matmul(x, source.matrix(name))  # noqa: E731
    executor = ReferenceExecutor(ops, floats, linear=linear, cache_type=cache_type)
    return executor.forward(tokens, 0, all_logits=True)


def some_tokens(n: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, vocabulary, n).astype(np.int32)


def check_against_reference(got: F32, want: F32) -> None:
    """Norms, softmax and rotations differ by some 1e-6; where that turns the rounding of one int8
    activation, one column of one product moves by a step. Most tokens see none of it."""
    error = relative_error(got, want)
    assert np.median(error) < 1e-3, error
    assert error.max() < 2e-2, error


def relative_error(got: F32, want: F32) -> F32:
    """-> f32 [M], of each row to its largest logit"""
    error: F32 = np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)
    return error


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_reference_forward(isa: str, family: str, made: Callable[..., Made]) -> None:
    model = made(family)
    tokens = some_tokens(24, model[0].vocabulary)
    got = Executor(model[0], model[1], isa=isa).forward(tokens, 0, all_logits=True)
    check_against_reference(got, reference(model, tokens))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("family", FAMILIES)
def test_q8_forward_is_the_reference_forward(
    isa: str, family: str, made: Callable[..., Made]
) -> None:
    """Attention over q8 is within 1e-5 of float, which turns the rounding of an int8 activation
    within some tokens; a key or value that this moves is seen by all after it."""
    model = made(family)
    tokens = some_tokens(24, model[0].vocabulary)
    executor = Executor(model[0], model[1], isa=isa, cache_type=CacheType.Q8)
    got = executor.forward(tokens, 0, all_logits=True)
    want = reference(model, tokens, CacheType.Q8)
    error = relative_error(got, want)
    assert error[:3].max() < 1e-4, error
    assert error.max() < 5e-2, error
    assert relative_error(got, reference(model, tokens))[:3].max() > 1e-3  # not those of f16


def test_act_order_columns_gather_their_inputs(made: Callable[..., Made]) -> None:
    model = made("llama", columns=True)
    tokens = some_tokens(24, model[0].vocabulary)
    got = Executor(model[0], model[1]).forward(tokens, 0, all_logits=True)
    check_against_reference(got, reference(model, tokens))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("family", ["llama", "gemma3_text", *MIXTURES])
@pytest.mark.parametrize("cache_type", CacheType)
def test_cuts_and_threads_do_not_change_a_bit(
    isa: str, family: str, cache_type: CacheType, made: Callable[..., Made]
) -> None:
    def fresh(n_threads: int) -> Executor:
        return Executor(ops, source, isa=isa, n_threads=n_threads, cache_type=cache_type)

    ops, source, _ = made(family, max_position_embeddings=400)
    tokens = some_tokens(CHUNK + 40, ops.vocabulary)
    whole = fresh(1).forward(tokens, 0, all_logits=True)
    for n_threads, cuts in (
        (1, [1, 2, 5, 70]),
        (2, [64, 65, 66, 67]),
        (3, [3, 40, 255, 256, 257, 290]),  # one token, spans split unevenly
        (5, [280, 281]),
    ):
        executor = fresh(n_threads)
        at = 0
        for cut in [*cuts, tokens.size]:
            part = executor.forward(tokens[at:cut], at, all_logits=True)
            assert np.array_equal(part, whole[at:cut]), (n_threads, at, cut)
            at = cut


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_the_kernel_does_not_change_a_bit(isa: str, family: str, made: Callable[..., Made]) -> None:
    ops, source, _ = made(family, max_position_embeddings=400)
    tokens = some_tokens(60, ops.vocabulary)
    whole = Executor(ops, source, isa=isa, n_threads=2).forward(tokens, 0, all_logits=True)
    for kernel in Kernel:
        executor = Executor(ops, source, isa=isa, n_threads=2, kernel=kernel)
        assert set(executor.kernels) == {3, 4, 5, 8}
        at = 0
        for n in (1, 2, 3, 4, 7, 16, 17, 10):
            part = executor.forward(tokens[at : at + n], at, all_logits=True)
            assert np.array_equal(part, whole[at : at + n]), (kernel, n)
            at += n


@pytest.mark.parametrize(
    ("family", "columns"),
    [
        ("llama", False),
        ("llama", True),
        ("qwen3", False),
        ("gemma3_text", False),
        ("olmoe", False),
    ],
)
def test_rows_that_threads_share_by_channels_are_the_same(
    family: str, columns: bool, made: Callable[..., Made]
) -> None:
    """Wide enough for three parts; widths end within a block of 64 channels."""
    ops, source, _ = made(
        family,
        columns=columns,
        hidden_size=800,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=80,
        intermediate_size=1120,
    )
    tokens = some_tokens(8, ops.vocabulary)
    whole = Executor(ops, source, n_threads=1).forward(tokens, 0, all_logits=True)
    for n_threads in (1, 2, 3, 5):
        executor = Executor(ops, source, n_threads=n_threads)
        for at in range(tokens.size):
            got = executor.forward(tokens[at : at + 1], at)
            assert np.array_equal(got, whole[at : at + 1]), (n_threads, at)


def with_routers(made: Made, weight: float) -> Made:
    """The model with every router's weights replaced: all experts have the same logit."""
    ops, source, floats = made
    routers = {op.weight for op in ops.ops if isinstance(op, Router)}
    assert routers
    equal = {name: np.full_like(floats[name], weight) for name in routers}
    other = copy.copy(source)
    other._vectors = source._vectors | equal
    return ops, other, floats | equal


@pytest.mark.parametrize("family", MIXTURES)
def test_equal_logits_pick_the_experts_of_the_lowest_index(
    family: str, made: Callable[..., Made]
) -> None:
    model = ops, source, _ = with_routers(made(family), 0.01)
    tokens = some_tokens(24, ops.vocabulary)
    got = Executor(ops, source).forward(tokens, 0, all_logits=True)
    check_against_reference(got, reference(model, tokens))
    spoilt = copy.copy(source)
    spoilt._packed = dict(source._packed)
    for op in ops.ops:
        if isinstance(op, Experts):
            for name in (*op.gates[op.top_k :], *op.ups[op.top_k :], *op.downs[op.top_k :]):
                packed = source.matrix(name)
                spoilt._packed[name] = replace(packed, scales=np.full_like(packed.scales, np.nan))
    again = Executor(ops, spoilt).forward(tokens, 0, all_logits=True)
    assert np.array_equal(again, got)  # nothing of the others is computed with


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("top_k", [1, 8])
def test_all_rows_of_a_chunk_may_go_to_the_same_experts(
    isa: str, top_k: int, made: Callable[..., Made]
) -> None:
    model = made("olmoe", num_experts_per_tok=top_k, max_position_embeddings=400)
    ops, source, _ = with_routers(model, 0.0)
    tokens = some_tokens(CHUNK + 10, ops.vocabulary)
    whole = Executor(ops, source, isa=isa, n_threads=3).forward(tokens, 0, all_logits=True)
    one = Executor(ops, source, isa=isa, n_threads=1)
    at = 0
    for n in (1, 1, 2, 5, 6, 7, 40, CHUNK - 52):
        part = one.forward(tokens[at : at + n], at, all_logits=True)
        assert np.array_equal(part, whole[at : at + n]), n
        at += n


def test_act_order_in_experts_is_refused(made: Callable[..., Made]) -> None:
    ops, source, _ = made("mixtral")
    name = next(op for op in ops.ops if isinstance(op, Experts)).ups[1]
    other = copy.copy(source)
    packed = source.matrix(name)
    order = np.arange(packed.shape[1], dtype=np.int32)[::-1].copy()
    other._packed = source._packed | {name: replace(packed, columns=order)}
    with pytest.raises(UnsupportedError, match=rf"{name}: an expert with reordered columns"):
        Executor(ops, other)


def test_the_last_logits_are_the_same_alone(made: Callable[..., Made]) -> None:
    ops, source, _ = made("qwen3")
    tokens = some_tokens(30, ops.vocabulary)
    executor = Executor(ops, source)
    every = executor.forward(tokens, 0, all_logits=True)
    assert np.array_equal(executor.forward(tokens, 0), every[-1:])


def test_positions_are_forgotten_from_where_a_forward_starts(made: Callable[..., Made]) -> None:
    ops, source, _ = made("llama")
    tokens = some_tokens(40, ops.vocabulary)
    fresh = Executor(ops, source).forward(tokens[:20], 0)
    executor = Executor(ops, source)
    executor.forward(tokens, 0)
    executor.forward(tokens[:10], 0)
    assert np.array_equal(executor.forward(tokens[10:20], 10), fresh)


def test_bad_calls_get_a_sentence(made: Callable[..., Made]) -> None:
    ops, source, _ = made("llama")
    executor = Executor(ops, source, context=16)
    for tokens, position, error, says in [
        (np.zeros(17, np.int32), 0, BudgetError, "context of 16; use a context of 17"),
        (np.zeros(1, np.int32), 16, BudgetError, "positions 16 to 16"),
        (np.zeros(1, np.int32), -1, BudgetError, "positions -1"),
        (np.zeros(0, np.int32), 0, ShapeError, "at least 1"),
        (np.array([ops.vocabulary], np.int32), 0, ShapeError, f"wanted 0 to {ops.vocabulary - 1}"),
        (np.array([-1], np.int32), 0, ShapeError, "found id -1"),
        (np.array([2**32]), 0, ShapeError, "found id 4294967296"),
        (np.array([0.5]), 0, ShapeError, "found type float64"),
        (np.zeros(1, np.int32), 1, ShapeError, "position 1, wanted 0 to the cached 0"),
    ]:
        with pytest.raises(error, match=says):
            executor.forward(tokens, position)
    with pytest.raises(ShapeError, match="cache_type: found 'q4', wanted one of f16, q8"):
        Executor(ops, source, cache_type="q4")
    with pytest.raises(DeviceError, match="found 'avx9'"):
        Executor(ops, source, isa="avx9")
    with pytest.raises(DeviceError, match="kernel: found 'gemm', wanted one of auto, lookup, mul"):
        Executor(ops, source, kernel="gemm")
    with pytest.raises(ShapeError, match="threads: found 0"):
        Executor(ops, source, n_threads=0)
    for context in (0, MAX_CONTEXT + 1, 2**31 - 1, 10**12):
        with pytest.raises(ShapeError, match=f"context: found {context}, wanted 1 to"):
            Executor(ops, source, context=context)


def test_weights_of_another_shape_than_the_op_list_says_are_refused(
    made: Callable[..., Made],
) -> None:
    ops, weights, _ = made("qwen2")
    layer = "model.layers.0."
    bias, norm = f"{layer}self_attn.q_proj.bias", f"{layer}input_layernorm.weight"
    for name in (*ops.matrices()[:2], bias, norm):
        other = copy.copy(weights)
        if name in ops.matrices():
            n, k = weights.matrix(name).shape
            short = quantize(np.ones((n - 1, k), np.float32), bits=4, group_size=k, symmetric=True)
            other._packed = weights._packed | InMemory({name: short}, {})._packed
        else:
            other._vectors = weights._vectors | {name: weights.vector(name)[1:]}
        with pytest.raises(ShapeError, match=f"{name} has shape"):
            Executor(ops, other)


def test_two_forwards_at_once_are_refused_or_right(made: Callable[..., Made]) -> None:
    ops, source, _ = made("llama", max_position_embeddings=400)
    tokens = some_tokens(CHUNK + 40, ops.vocabulary)
    executor = Executor(ops, source, n_threads=2)
    want = executor.forward(tokens, 0)
    start, outcomes = threading.Barrier(3), []

    def run() -> None:
        start.wait()
        for _ in range(5):
            try:
                outcomes.append(np.array_equal(executor.forward(tokens, 0), want))
            except UnsupportedError as error:
                outcomes.append("another thread's forward" in str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 15
    assert np.array_equal(executor.forward(tokens, 0), want)


def in_child(holds: Callable[[], bool]) -> bool:
    """Whether `holds` in a forked copy of this process, within 20 seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            os._exit(0 if holds() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_starts_threads_of_its_own(made: Callable[..., Made]) -> None:
    ops, source, _ = made("llama")
    tokens = some_tokens(30, ops.vocabulary)
    executor = Executor(ops, source, n_threads=3)
    executor.forward(tokens[:20], 0)
    fresh = Executor(ops, source, n_threads=1)
    want = fresh.forward(tokens, 0)

    def holds() -> bool:
        nonlocal executor
        same = np.array_equal(executor.forward(tokens[20:], 20), want)
        del executor  # joins the child's threads, not the parent's
        return same

    assert in_child(holds)
    assert np.array_equal(executor.forward(tokens[20:], 20), want)


def test_threads_that_cannot_be_started_are_a_sentence(made: Callable[..., Made]) -> None:
    ops, source, _ = made("llama")

    def holds() -> bool:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
        try:
            Executor(ops, source, n_threads=512)
        except DeviceError as error:
            return "of 512" in str(error) and "use fewer" in str(error)
        return False

    assert in_child(holds)


def through_segments(executor: Executor, tokens: np.ndarray, *, source: InMemory | None) -> F32:
    """Two chunks, turn by turn; products by numpy, or with no source by the segments themselves."""
    half = tokens.size // 2
    parts = [(tokens[:half], 0), (tokens[half:], half)]
    logits = []
    with executor.cut(executor.sites, 2) as segments:
        for i in range(segments.n):
            for chunk, (part, position) in enumerate(parts):
                last = i == segments.n - 1
                found = segments.run(
                    i,
                    part,
                    position,
                    chunk=chunk,
                    whole=source is None,
                    all_logits=True,
                    want_logits=last,
                )
                if last:
                    assert found is not None
                    logits.append(found)
                elif source is not None:
                    site = executor.sites[i]
                    x = segments.register(site.input, chunk=chunk)[: part.size].copy()
                    made_of = zip(site.weights, site.outputs, site.biases, strict=True)
                    for name, output, bias in made_of:
                        y = lut_matmul.lut_matmul(x, source.matrix(name))
                        y = y if bias is None else y + bias
                        segments.register(output, chunk=chunk)[: part.size] = y
    return np.concatenate(logits)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_in_segments_is_the_forward(
    family: str, columns: bool, made: Callable[..., Made]
) -> None:
    ops, source, _ = made(family, columns=columns and family not in MIXTURES)
    tokens = some_tokens(41, ops.vocabulary)
    executor = Executor(ops, source)
    want = executor.forward(tokens, 0, all_logits=True)
    assert np.array_equal(through_segments(executor, tokens, source=None), want)
    assert np.array_equal(through_segments(executor, tokens, source=source), want)
    assert np.array_equal(executor.forward(tokens, 0, all_logits=True), want)


def test_segments_have_the_executor_to_themselves(made: Callable[..., Made]) -> None:
    ops, source, _ = made("llama")
    executor = Executor(ops, source)
    tokens = some_tokens(4, ops.vocabulary)
    with executor.cut(executor.sites[:2]) as segments:
        assert segments.n == 3
        with pytest.raises(UnsupportedError, match="another thread's forward"):
            executor.forward(tokens, 0)
    executor.forward(tokens, 0)
