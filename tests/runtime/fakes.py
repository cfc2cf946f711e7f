"""A model and a tokenizer that need no files: deterministic, tiny, strict about their callers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elute.errors import BudgetError
from elute.types import F32, I32

END = 256  # the fake tokenizer's end token; 0..255 are bytes
VOCABULARY = 257


class FakeExecutor:
    """Logits are a hash of the last three tokens of the cache; or a script of tokens to say.

    Remembers every call, so that tests see what was computed again.
    """

    n_threads = 1
    isa = "fake"

    def __init__(
        self, *, context: int = 64, vocabulary: int = VOCABULARY, script: bytes | None = None
    ) -> None:
        self.context = context
        self.vocabulary = vocabulary
        self.script = None if script is None else [*script, END]
        self.said = 0
        self.cache: list[int] = []
        self.calls: list[tuple[int, int]] = []  # position, tokens

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        assert tokens.dtype == np.int32
        assert tokens.size
        assert position <= len(self.cache), "a hole in the cache"
        if position + tokens.size > self.context:
            raise BudgetError("fake: beyond the context")
        del self.cache[position:]
        self.calls.append((position, tokens.size))
        rows = []
        for token in tokens:
            self.cache.append(int(token))
            rows.append(self._logits())
        return np.stack(rows if all_logits else rows[-1:])

    def _logits(self) -> F32:
        if self.script is not None:
            logits = np.zeros(self.vocabulary, np.float32)
            logits[self._next_of_script()] = 20.0
            return logits
        random = np.random.Generator(np.random.PCG64([1, *self.cache[-3:]]))
        return random.normal(0, 3, self.vocabulary).astype(np.float32)

    def _next_of_script(self) -> int:
        """The script goes on after the longest part of it that the cache ends with."""
        assert self.script is not None
        for length in range(len(self.script) - 1, 0, -1):
            if self.cache[-length:] == self.script[:length]:
                return self.script[length]
        return self.script[0]


class FakeTextStream:
    def __init__(self) -> None:
        self._bytes = b""

    def feed(self, token: int) -> str:
        if token == END:
            return ""
        self._bytes += bytes([token])
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            text = self._bytes.decode(errors="replace")
        self._bytes = b""
        return text

    def flush(self) -> str:
        text, self._bytes = self._bytes.decode(errors="replace"), b""
        return text


class FakeTokenizer:
    """One token a byte."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = (END,)
    special_texts = ("<end>",)
    vocabulary_size = VOCABULARY

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        parts = text.split("<end>") if parse_special else [text]
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += ([END] if i else []) + list(part.encode())
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(i for i in ids if i != END).decode(errors="replace")

    def stream(self) -> FakeTextStream:
        return FakeTextStream()


class FakeTemplate:
    """`<user>hi<end><assistant>`"""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **_: Any,
    ) -> str:
        turns = "".join(f"<{m['role']}>{m['content']}<end>" for m in messages)
        return turns + ("<assistant>" if add_generation_prompt else "")
