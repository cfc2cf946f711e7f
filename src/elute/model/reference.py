"""The reference forward of any op list, in numpy and f32: the native executor's oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import BudgetError, ShapeError
from elute.kernels.kv_cache import CacheType, rounded
from elute.model.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    Experts,
    Gate,
    Head,
    Linear,
    OpList,
    RmsNorm,
    Rope,
    RopeTable,
    Router,
)
from elute.model.weights import check_weights
from elute.types import F32, I32

# y f32 [M, N] = matmul(x f32 [M, K], name of a weight [N, K])
LinearFunction = Callable[[F32, str], F32]


class ReferenceExecutor:
    """Runs an op list token by token or in chunks; the signature of the native executor.

    weights   every name of ops.matrices() and ops.vectors(), in any float type; with `linear`,
              of the matrices only the embedding is read
    context   positions that the cache may hold; ops.context by default
    linear    multiplies in place of x @ weights[name].T: packed arithmetic, the same forward
    cache_type  rounds keys and values as the native executor's cache does; None does not

    Raises FormatError for a missing weight, ShapeError for one that the op list does not fit.
    """

    def __init__(
        self,
        ops: OpList,
        weights: Mapping[str, npt.NDArray[Any]],
        *,
        context: int | None = None,
        linear: LinearFunction | None = None,
        cache_type: CacheType | None = None,
    ) -> None:
        self.ops = ops
        self.context = ops.context if context is None else context
        embedded = {op.weight for op in ops.ops if isinstance(op, Embed)}
        multiplied = set(ops.matrices()) - embedded
        read = [
            name
            for name in (*ops.matrices(), *ops.vectors())
            if linear is None or name not in multiplied
        ]
        shapes = {name: weights[name].shape for name in read if name in weights}
        check_weights(ops, shapes.get, names=read, where="weights")
        self._weights: dict[str, F32] = {
            name: np.asarray(weights[name], dtype=np.float32) for name in read
        }
        self._linear = self._multiply if linear is None else linear
        self._cache_type = cache_type
        self._cached = 0  # positions in the cache
        # Per layer f32 [n_kv_heads, capacity, head_width]; capacity grows by doubling.
        empty = np.empty((ops.n_kv_heads, 0, ops.head_width), np.float32)
        self._keys: list[F32] = [empty] * ops.n_layers
        self._values: list[F32] = [empty] * ops.n_layers

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        """Appends `tokens` at `position`, dropping what the cache held from there on.

        tokens    i32 [M]
        -> logits f32 [1, vocabulary] after the last token, or [M, vocabulary]

        Raises BudgetError beyond the context, ShapeError for no token, a token outside the
        vocabulary or a position beyond what the cache holds.
        """
        tokens = np.asarray(tokens, dtype=np.int32)
        self._check(tokens, position)
        self._cached = position  # until all is written: an interrupted forward leaves no mixture
        registers: dict[str, F32] = {}
        logits: F32 | None = None
        positions = np.arange(position, position + len(tokens))
        turns = {name: _turns(table, positions) for name, table in self.ops.rope_tables.items()}
        for op in self.ops.ops:
            if isinstance(op, Embed):
                registers[op.output] = self._weights[op.weight][tokens] * np.float32(op.scale)
            elif isinstance(op, RmsNorm):
                registers[op.output] = _rms_norm(registers[op.input], self._weights[op.weight], op)
            elif isinstance(op, Linear):
                for name, output, bias in zip(op.weights, op.outputs, op.biases, strict=True):
                    registers[output] = self._linear(registers[op.input], name)
                    if bias is not None:
                        registers[output] = registers[output] + self._weights[bias]
            elif isinstance(op, Rope):
                registers[op.register] = _rope(
                    registers[op.register], op.head_width, *turns[op.table]
                )
            elif isinstance(op, Attention):
                registers[op.output] = self._attention(registers, op, position)
            elif isinstance(op, Gate):
                registers[op.output] = (
                    _activate(registers[op.gate], op.activation) * registers[op.up]
                )
            elif isinstance(op, Router):
                registers[op.output] = registers[op.input] @ self._weights[op.weight].T
            elif isinstance(op, Experts):
                shares = _shares(registers[op.logits], op.top_k, normalized=op.normalized)
                registers[op.output] = self._experts(registers[op.input], shares, op)
            elif isinstance(op, Add):
                registers[op.output] = registers[op.output] + registers[op.input]
            elif isinstance(op, Head):
                x = registers[op.input] if all_logits else registers[op.input][-1:]
                logits = _softcap(self._linear(x, op.weight), op.softcap)
        assert logits is not None, "an op list ends in a Head"
        self._cached = position + len(tokens)
        return logits

    def _check(self, tokens: I32, position: int) -> None:
        if tokens.ndim != 1 or not tokens.size:
            raise ShapeError(
                f"forward: tokens has shape {list(tokens.shape)}, wanted [M] with M >= 1; "
                f"pass at least one token"
            )
        if not 0 <= position <= self._cached:
            raise ShapeError(
                f"forward: position is {position}, wanted 0 to the cached {self._cached}; "
                f"run the tokens before it first"
            )
        end = position + tokens.size
        if end > self.context:
            raise BudgetError(
                f"forward: {end} positions are needed, and the context holds {self.context}; "
                f"shorten the prompt or open the model with a longer context"
            )
        outside = tokens[(tokens < 0) | (tokens >= self.ops.vocabulary)]
        if outside.size:
            raise ShapeError(
                f"forward: found token {outside[0]}, wanted 0 to {self.ops.vocabulary - 1}; "
                f"use this model's tokenizer"
            )

    def _multiply(self, x: F32, name: str) -> F32:
        y: F32 = x @ self._weights[name].T
        return y

    def _experts(self, x: F32, shares: F32, op: Experts) -> F32:
        """-> f32 [M, width of output]"""
        y = np.zeros((len(x), self.ops.registers[op.output]), np.float32)
        for expert in np.flatnonzero(shares.any(axis=0)):
            rows = np.flatnonzero(shares[:, expert])
            gate = self._linear(x[rows], op.gates[expert])
            up = self._linear(x[rows], op.ups[expert])
            down = self._linear(_activate(gate, op.activation) * up, op.downs[expert])
            y[rows] += shares[rows, expert, None] * down
        return y

    def _attention(self, registers: Mapping[str, F32], op: Attention, position: int) -> F32:
        """-> f32 [M, n_heads * head_width]"""
        m = len(registers[op.query])
        end = position + m
        self._keys[op.layer] = self._append(self._keys[op.layer], registers[op.key], position)
        self._values[op.layer] = self._append(self._values[op.layer], registers[op.value], position)
        # A window of w sees w - 1 positions before the first query: nothing older is multiplied.
        start = 0 if op.window is None else max(0, position - op.window + 1)
        keys = self._keys[op.layer][:, start:end]
        values = self._values[op.layer][:, start:end]

        per_kv_head = op.n_heads // op.n_kv_heads
        # [M, n_kv_heads, per_kv_head, D] -> [n_kv_heads, per_kv_head * M, D]: a product a key head
        by_head = registers[op.query].reshape(m, op.n_kv_heads, per_kv_head, op.head_width)
        query = by_head.transpose(1, 2, 0, 3).reshape(op.n_kv_heads, -1, op.head_width)
        scores: F32 = query @ keys.transpose(0, 2, 1)
        scores = _softcap(scores * np.float32(op.scale), op.softcap)
        scores = scores.reshape(op.n_kv_heads, per_kv_head, m, end - start)

        query_at = np.arange(position, end)[:, None]
        key_at = np.arange(start, end)[None, :]
        seen = key_at <= query_at
        if op.window is not None:
            seen &= key_at > query_at - op.window
        scores = np.where(seen, scores, np.float32(-np.inf))
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        output: F32 = scores.reshape(op.n_kv_heads, -1, end - start) @ values
        output = output.reshape(op.n_kv_heads, per_kv_head, m, op.head_width)
        return output.transpose(2, 0, 1, 3).reshape(m, -1)

    def _append(self, cache: F32, register: F32, position: int) -> F32:
        """Writes f32 [M, n_kv_heads * head_width] at `position`. -> the cache, grown if need be."""
        n_kv_heads, capacity, head_width = cache.shape
        end = position + len(register)
        if end > capacity:
            larger = np.empty(
                (n_kv_heads, min(self.context, max(end, 2 * capacity)), head_width), np.float32
            )
            larger[:, :position] = cache[:, :position]
            cache = larger
        heads = register.reshape(-1, n_kv_heads, head_width)
        if self._cache_type is not None:
            heads = rounded(heads, self._cache_type)
        cache[:, position:end] = heads.transpose(1, 0, 2)
        return cache


def _rms_norm(x: F32, weight: F32, op: RmsNorm) -> F32:
    heads = x.reshape(len(x), -1, op.head_width or x.shape[1])
    mean_square = np.square(heads).mean(axis=-1, keepdims=True)
    normed: F32 = heads / np.sqrt(mean_square + np.float32(op.eps))
    return (normed * (weight + np.float32(op.weight_offset))).reshape(x.shape)


def _shares(logits: F32, top_k: int, *, normalized: bool) -> F32:
    """-> f32 [M, n_experts]: 0 for all but the top_k of a row."""
    weights: F32 = np.exp(logits - logits.max(axis=1, keepdims=True))
    picked = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]  # equal ones: the lower first
    shares: F32 = np.zeros_like(weights)
    np.put_along_axis(shares, picked, np.take_along_axis(weights, picked, axis=1), axis=1)
    shares /= (shares if normalized else weights).sum(axis=1, keepdims=True)
    return shares


def _turns(table: RopeTable, positions: npt.NDArray[Any]) -> tuple[F32, F32]:
    """-> cos, sin f32 [M, 1, head_width/2], angles rounded to f32 as transformers does."""
    angles = positions.astype(np.float32)[:, None, None] * table.inverse_frequencies
    factor = np.float32(table.factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def _rope(x: F32, head_width: int, cos: F32, sin: F32) -> F32:
    heads = x.reshape(len(x), -1, head_width)
    low, high = np.split(heads, 2, axis=-1)
    turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.reshape(x.shape)


def _activate(x: F32, activation: Activation) -> F32:
    if activation is Activation.SILU:
        with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
            silu: F32 = x / (1 + np.exp(-x))
        return silu
    if activation is Activation.GELU_TANH:
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
        gelu: F32 = np.float32(0.5) * x * (1 + np.tanh(inner))
        return gelu
    relu2: F32 = np.square(np.maximum(x, 0))
    return relu2


def _softcap(x: F32, cap: float | None) -> F32:
    if cap is None:
        return x
    capped: F32 = np.float32(cap) * np.tanh(x / np.float32(cap))
    return capped
