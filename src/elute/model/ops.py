"""The op list: what a model computes for some tokens, as data. Knows no weights and no kernel.

A family (model/families/) writes one from a config; model/reference.py runs it in numpy, the native
executor in C++. Registers are named f32 buffers [tokens, width]. Weights are Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from elute.types import F32


class Activation(StrEnum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"  # max(x, 0)**2


@dataclass(frozen=True)
class Embed:
    """output = w[token] * scale"""

    weight: str
    output: str
    scale: float = 1.0


@dataclass(frozen=True)
class RmsNorm:
    """output = x / rms(x) * (w + weight_offset), of a register or each head. May be in place."""

    input: str
    weight: str
    output: str
    eps: float
    head_width: int | None = None
    weight_offset: float = 0.0  # gemma stores w - 1


@dataclass(frozen=True)
class Linear:
    """outputs[i] = input @ weights[i].T + biases[i]: one quantization and one set of tables."""

    input: str
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    biases: tuple[str | None, ...]


@dataclass(frozen=True)
class Rope:
    """In place: channel i of a head turns with i + head_width/2 by position * inverse frequency."""

    register: str
    head_width: int
    table: str  # key of OpList.rope_tables


@dataclass(frozen=True)
class Attention:
    """Appends key and value to the cache of `layer`, then causal softmax(q k^T * scale) v.

    Grouped-query: n_heads / n_kv_heads successive query heads read one key head.
    window: a query at position p sees keys at positions p-window+1 .. p.
    softcap: s = softcap * tanh(s / softcap).
    May be in place: output is query.
    """

    query: str
    key: str
    value: str
    output: str
    layer: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Gate:
    """output = activation(gate) * up. May be in place: output is gate."""

    gate: str
    up: str
    output: str
    activation: Activation


@dataclass(frozen=True)
class Router:
    """output = input @ w.T, the logits of a layer's experts. Weights and product are f32: a small
    error here is not a small error of the result, it is another expert."""

    input: str
    weight: str  # [n_experts, width of input]
    output: str


@dataclass(frozen=True)
class Experts:
    """output = sum over the top_k experts e of a row: share_e * down_e(activation(gate_e) * up_e).

    The top_k have the largest logits, of equal ones those of the lower index. Shares are softmax
    over all logits, divided by the sum of those picked where `normalized`. Added in ascending order
    of experts. May be in place: output is input. What becomes of `logits` is undefined.

    gates, ups  [expert] names of weights [width, width of input]; downs the other way round
    """

    input: str
    logits: str
    output: str
    gates: tuple[str, ...]
    ups: tuple[str, ...]
    downs: tuple[str, ...]
    width: int
    top_k: int
    normalized: bool
    activation: Activation

    def matrices(self) -> tuple[str, ...]:
        """Expert by expert: gate, up, down."""
        by_expert = zip(self.gates, self.ups, self.downs, strict=True)
        return tuple(name for names in by_expert for name in names)


@dataclass(frozen=True)
class Add:
    """output += input"""

    input: str
    output: str


@dataclass(frozen=True)
class Head:
    """logits = input @ w.T, then softcap as in Attention."""

    input: str
    weight: str
    softcap: float | None = None


Op = Embed | RmsNorm | Linear | Rope | Attention | Gate | Router | Experts | Add | Head


@dataclass(frozen=True, eq=False)
class RopeTable:
    """cos and sin of position * inverse_frequencies, both times `factor` (yarn's attention)."""

    inverse_frequencies: F32  # [head_width / 2]
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class OpList:
    ops: tuple[Op, ...]
    registers: Mapping[str, int]  # name -> width
    n_layers: int
    n_kv_heads: int
    head_width: int
    vocabulary: int
    context: int  # positions the model was trained for
    rope_tables: Mapping[str, RopeTable] = field(default_factory=dict)

    def matrices(self) -> tuple[str, ...]:
        """Names of the weights that are stored as codes, each once, in order of first use."""
        names: dict[str, None] = {}
        for op in self.ops:
            if isinstance(op, Embed | Head):
                names[op.weight] = None
            elif isinstance(op, Linear):
                names.update(dict.fromkeys(op.weights))
            elif isinstance(op, Experts):
                names.update(dict.fromkeys(op.matrices()))
        return tuple(names)

    def runs(self) -> tuple[tuple[str, ...], ...]:
        """Of matrices() the names that are to lie in one file: the experts of a layer."""
        return tuple(op.matrices() for op in self.ops if isinstance(op, Experts))

    def vectors(self) -> tuple[str, ...]:
        """Names of the weights that stay f32, each once: norms and biases, [N], routers [N, K]."""
        names: dict[str, None] = {}
        for op in self.ops:
            if isinstance(op, RmsNorm | Router):
                names[op.weight] = None
            elif isinstance(op, Linear):
                names.update((bias, None) for bias in op.biases if bias is not None)
        return tuple(names)
