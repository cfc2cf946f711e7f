"""Typed reads of a GGUF's tokenizer.* metadata; does not know what the keys mean together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elute.errors import FormatError


class TokenizerKeys:
    """Typed reads of the metadata; every mismatch is a FormatError that names the key."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def text_or_none(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise FormatError(
                f"GGUF {key}: found {_kind(value)}, wanted a string; convert the model again"
            )
        return value

    def text(self, key: str) -> str:
        value = self.text_or_none(key)
        if value is None:
            raise FormatError(f"GGUF {key}: missing, wanted a string; convert the model again")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if hasattr(value, "item"):  # a numpy scalar
            value = value.item()
        if not isinstance(value, bool):
            raise FormatError(
                f"GGUF {key}: found {value!r}, wanted true or false; convert the model again"
            )
        return value

    def adds(self, which: str, named: Mapping[str, str], *, default: bool) -> bool:
        """Whether a text gets this token; by default only if the file names it."""
        key, token = f"tokenizer.ggml.add_{which}_token", f"{which}_token"
        adds = self.flag(key, default=default and token in named)
        if adds and token not in named:
            raise FormatError(
                f"GGUF {key}: true, but tokenizer.ggml.{which}_token_id is missing; "
                "convert the model again"
            )
        return adds

    def array_or_none(self, key: str, kinds: tuple[type, ...], what: str) -> list[Any] | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if hasattr(value, "tolist"):  # a numpy array
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise FormatError(
                f"GGUF {key}: found {_kind(value)}, wanted an array of {what}"
                "; convert the model again"
            )
        for i, item in enumerate(value):
            if type(item) not in kinds:
                raise FormatError(
                    f"GGUF {key}: entry {i} is {_kind(item)}, wanted {what}"
                    "; convert the model again"
                )
        return list(value)

    def array(self, key: str, kinds: tuple[type, ...], what: str, n_tokens: int) -> list[Any]:
        """An array with one entry a token."""
        value = self.array_or_none(key, kinds, what)
        if value is None:
            raise FormatError(f"GGUF {key}: missing, wanted {what}; convert the model again")
        if len(value) != n_tokens:
            raise FormatError(
                f"GGUF {key}: {len(value)} entries, wanted {n_tokens} like tokenizer.ggml.tokens"
                "; convert the model again"
            )
        return value

    def token_id(self, key: str, n_tokens: int) -> int | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if hasattr(value, "item"):
            value = value.item()
        if type(value) is not int or not 0 <= value < n_tokens:
            raise FormatError(
                f"GGUF {key}: found {value!r}, wanted an id from 0 to {n_tokens - 1}"
                "; convert the model again"
            )
        return value


def _kind(value: object) -> str:
    return f"{value!r:.40}" if isinstance(value, int | float) else f"a {type(value).__name__}"
