"""Checkpoints that exist only in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from elute.types import QuantizedMatrix, StoredCodes, TokenizerFiles

Tensor = np.ndarray | QuantizedMatrix


class MemoryCheckpoint:
    """Tensors by name: arrays, or (shape, function that makes the array when it is read)."""

    source = "memory"

    def __init__(
        self,
        tensors: Mapping[str, Tensor | tuple[tuple[int, ...], Callable[[], Tensor]]],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.tensors = tensors
        self.config = {"model_type": "llama"} if config is None else config

    def tokenizer_files(self) -> TokenizerFiles:
        return TokenizerFiles(
            tokenizer_json='{"version": "1.0"}',
            tokenizer_config={"eos_token": "</s>"},
            chat_template="{{ messages }}\n",
            generation_config={"eos_token_id": 2},
        )

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self.tensors[name]
        return tensor[0] if isinstance(tensor, tuple) else tensor.shape

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor[1]() if isinstance(tensor, tuple) else tensor

    def codes(self, name: str, *, headers_only: bool = False) -> StoredCodes | None:
        tensor = self.read(name)
        if not isinstance(tensor, QuantizedMatrix):
            return None
        order = None if tensor.columns is None else tensor.columns.tobytes()
        return StoredCodes(tensor.bits, tensor.group_size, tensor.affine, tensor.zero, order)
