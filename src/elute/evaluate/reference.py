"""The float reference of a model: its weights as f32 in the numpy forward. An oracle, slow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.formats.packed import PackedModel
from elute.kernels import kv_cache
from elute.model.families import op_list
from elute.model.ops import OpList
from elute.model.reference import ReferenceExecutor
from elute.pack.reorder import dequantized
from elute.types import F32, I32, Checkpoint, QuantizedMatrix


class _Weights(Mapping[str, npt.NDArray[Any]]):
    """Float tensors by name, made when they are asked for."""

    def __init__(self, ops: OpList, model: PackedModel | Checkpoint) -> None:
        self._model = model
        self._vectors = frozenset(ops.vectors())
        available = model.names if isinstance(model, PackedModel) else model.names()
        wanted = (*ops.matrices(), *ops.vectors())
        self._names = [name for name in wanted if name in set(available)]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        if isinstance(self._model, PackedModel):
            if name in self._vectors:
                return self._model.vector(name)
            return dequantized(self._model, name)
        stored = self._model.read(name)
        return stored.dequantize() if isinstance(stored, QuantizedMatrix) else stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class FloatExecutor:
    """ReferenceExecutor with the attributes that sessions ask for."""

    def __init__(
        self,
        model: PackedModel | Checkpoint,
        *,
        context: int | None = None,
        cache_type: str | None = None,
    ) -> None:
        """cache_type: how keys and values are rounded; None: not. Raises as op_list,
        kv_cache.cache_type and ReferenceExecutor do.
        """
        ops = op_list(model.config)
        kind = (
            None
            if cache_type is None
            else kv_cache.cache_type(cache_type, head_width=ops.head_width)
        )
        self._executor = ReferenceExecutor(
            ops, _Weights(ops, model), context=context, cache_type=kind
        )
        self.context = self._executor.context
        self.vocabulary = ops.vocabulary

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        return self._executor.forward(np.asarray(tokens), position, all_logits=all_logits)


def reference_executor(
    path: Path, *, context: int | None = None, cache_type: str | None = None
) -> FloatExecutor:
    """Of a packed folder its codes as floats; of any other source the weights as it holds them."""
    from elute.formats import open_checkpoint
    from elute.runtime.store import is_packed

    model = PackedModel.open(path) if is_packed(path) else open_checkpoint(path)
    return FloatExecutor(model, context=context, cache_type=cache_type)
