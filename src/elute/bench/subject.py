"""What is measured: a packed model, or a random one of a published shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elute.bench.random_weights import RandomWeights
from elute.bench.shapes import shape_config
from elute.bench.traffic import Traffic, traffic
from elute.kernels.kv_cache import CacheType
from elute.kernels.kv_cache import cache_type as chosen_cache_type
from elute.model.families import op_list
from elute.model.ops import Experts, Head, Linear, OpList
from elute.types import Affine, PackedMatrix, WeightSource

if TYPE_CHECKING:
    from elute.formats.packed import PackedModel
    from elute.quantize.recipe import Recipe

TERNARY = (2, 1)  # bits and zero of ternary codes


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in memory.

    name    path, id or shape
    stored  bits, and columns that share a scale, of most linear weights and of the head
    gguf    a file with the same weights, where there is one
    """

    name: str
    config: Mapping[str, Any]
    ops: OpList
    weights: WeightSource
    stored: str
    traffic: Traffic
    cache_type: CacheType = CacheType.F16
    gguf: Path | None = None

    @property
    def short_name(self) -> str:
        """As records name it: no folder of this machine."""
        if self.gguf is not None:
            return self.gguf.name
        path = Path(self.name)
        return path.name if path.exists() else self.name

    @property
    def model_type(self) -> str:
        """As llama-bench puts it: family, size, storage."""
        size = self.traffic.n_params
        shown = f"{size / 1e9:.2f}B" if size >= 1e9 else f"{size / 1e6:.0f}M"
        return f"{self.config['model_type']} {shown} {self.stored}"


def random_subject(
    shape: str, recipe: Recipe, *, vocabulary: int | None = None, cache_type: str = "f16"
) -> Subject:
    """CONFIGS[shape] with random weights. Raises BudgetError when memory does not hold them."""
    config = shape_config(shape, vocabulary=vocabulary)
    ops = op_list(config)
    name = (
        shape
        if vocabulary in (None, shape_config(shape)["vocab_size"])
        else f"{shape}-v{vocabulary}"
    )
    return _subject(name, config, ops, RandomWeights(ops, recipe), cache_type=cache_type)


def packed_subject(name: str, packed: PackedModel, *, cache_type: str = "f16") -> Subject:
    """A packed model; gguf is the file that it was made from, where that still exists."""
    source = Path(packed.source)
    requantized = bool(packed.recipe.get("requantize"))
    same = source.suffix == ".gguf" and source.is_file() and not requantized
    return _subject(
        name,
        packed.config,
        op_list(packed.config),
        packed,
        cache_type=cache_type,
        gguf=source if same else None,
    )


def _subject(
    name: str,
    config: Mapping[str, Any],
    ops: OpList,
    weights: WeightSource,
    *,
    cache_type: str,
    gguf: Path | None = None,
) -> Subject:
    kind = chosen_cache_type(cache_type, head_width=ops.head_width)
    stored, read = stored_as(ops, weights), traffic(ops, weights, kind)
    return Subject(name, config, ops, weights, stored, read, kind, gguf)


def stored_as(ops: OpList, weights: WeightSource) -> str:
    """Such as "2-bit g64; head 8-bit g32": the storage of most linear weights and of the head."""
    kinds: Counter[str] = Counter()
    head = ""
    for op in ops.ops:
        if isinstance(op, Linear | Experts):
            for name in op.weights if isinstance(op, Linear) else op.matrices():
                packed = weights.matrix(name)
                kinds[_kind(packed)] += packed.shape[0] * packed.shape[1]
        elif isinstance(op, Head):
            head = _kind(weights.matrix(op.weight))
    linear = kinds.most_common(1)[0][0]
    return linear if head == linear else f"{linear}; head {head}"


def _kind(packed: PackedMatrix) -> str:
    """Such as "4-bit g32", "4-bit+offset g64", "ternary row"."""
    bits = f"{packed.bits}-bit"
    if packed.affine is not Affine.SYMMETRIC:
        bits += "+offset"
    elif (packed.bits, packed.zero) == TERNARY:
        bits = "ternary"
    whole_row = packed.group_size == packed.shape[1]
    return f"{bits} row" if whole_row else f"{bits} g{packed.group_size}"
