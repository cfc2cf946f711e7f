"""What a model must read and multiply for a token: the floors that its speed is held against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from elute.kernels.kv_cache import CacheType, position_bytes
from elute.model.ops import Attention, Experts, Head, Linear, OpList, Router
from elute.model.weights import weight_shapes
from elute.types import PackedMatrix, WeightSource


@dataclass(frozen=True)
class CachedLayer:
    """What one position of the key-value cache takes in a layer, and how far back the layer looks.

    window  positions that it sees, None for all
    """

    position_bytes: int
    window: int | None


@dataclass(frozen=True)
class Traffic:
    """Of one model.

    model_bytes     all weights, each once: planes, scales, offsets, norms, biases
    n_params        weights of all of them
    bits_per_weight of the matrices, scales and offsets included
    step_bytes      what one token reads of the matrices and routers: all but the experts that it
                    does not pick, and the embedding, of which it reads a row that is not counted
    linear_weights  of the matrices that every token multiplies; head_weights of the one that only
                    tokens with logits do
    """

    model_bytes: int
    n_params: int
    bits_per_weight: float
    step_bytes: int
    linear_weights: int
    head_weights: int
    layers: tuple[CachedLayer, ...]

    def bytes_per_token(self, n_gen: int, depth: int) -> float:
        """Mean over `n_gen` single tokens from position `depth` on, key-value cache included."""
        cached = sum(
            layer.position_bytes * min(position + 1, layer.window or position + 1)
            for layer in self.layers
            for position in range(depth, depth + n_gen)
        )
        return self.step_bytes + cached / n_gen

    def cache_bytes(self, context: int) -> int:
        """Of `context` positions; layers that look back less far keep all the same."""
        return context * sum(layer.position_bytes for layer in self.layers)

    def prompt_operations(self, n_tokens: int) -> int:
        """Multiplies and adds with weights in a prompt of which the last token wants logits."""
        return 2 * (n_tokens * self.linear_weights + self.head_weights)


def traffic(ops: OpList, weights: WeightSource, cache_type: CacheType = CacheType.F16) -> Traffic:
    """Counts what `weights` holds for `ops`."""
    n_bytes: dict[str, int] = {}
    n_weights: dict[str, int] = {}
    for name in ops.matrices():
        packed = weights.matrix(name)
        n_bytes[name] = packed_bytes(packed)
        n_weights[name] = packed.shape[0] * packed.shape[1]
    shapes = weight_shapes(ops)
    n_vector = sum(math.prod(shapes[name]) for name in ops.vectors())
    linear = [name for op in ops.ops if isinstance(op, Linear) for name in op.weights]
    routers = sum(math.prod(shapes[op.weight]) for op in ops.ops if isinstance(op, Router))
    experts = [op for op in ops.ops if isinstance(op, Experts)]

    def picked(sizes: Mapping[str, int]) -> int:
        """Of the experts that a token picks, were all of one size."""
        return sum(
            op.top_k * sum(sizes[name] for name in op.matrices()) // len(op.gates) for op in experts
        )

    head = [op.weight for op in ops.ops if isinstance(op, Head)]
    return Traffic(
        model_bytes=sum(n_bytes.values()) + 4 * n_vector,
        n_params=sum(n_weights.values()) + n_vector,
        bits_per_weight=8 * sum(n_bytes.values()) / sum(n_weights.values()),
        step_bytes=sum(n_bytes[name] for name in (*linear, *head)) + picked(n_bytes) + 4 * routers,
        linear_weights=sum(n_weights[name] for name in linear) + picked(n_weights) + routers,
        head_weights=sum(n_weights[name] for name in head),
        layers=tuple(
            CachedLayer(
                position_bytes(cache_type, n_kv_heads=op.n_kv_heads, head_width=op.head_width),
                op.window,
            )
            for op in ops.ops
            if isinstance(op, Attention)
        ),
    )


def packed_bytes(packed: PackedMatrix) -> int:
    """Planes, scales and offsets."""
    parts = (packed.planes, packed.scales, packed.offsets)
    return sum(part.nbytes for part in parts if part is not None)
