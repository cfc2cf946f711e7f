"""A conversation to token ids, in which nobody's words can forge a turn. Knows no model."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

MARK_DIGITS = 24  # 80 random bits: a message cannot guess one


class ChatTokenizer(Protocol):
    @property
    def special_texts(self) -> Collection[str]: ...

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...


def chat_tokens(
    render: Callable[[Sequence[Mapping[str, Any]]], str],
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
) -> list[int]:
    """Renders `messages` and encodes them; only the template's own special tokens become tokens.

    A message that spells a special token ("<|im_end|>") has it read as text. Messages without one
    give exactly encode(render(messages), parse_special=True), as transformers does; it has no
    such guard. Raises as `render` and `encode` do.
    """
    # The template cannot be asked which characters were a message's, so each such spelling goes
    # through it as a number that stands for it: digits outlive trim, tojson and upper.
    spelling_of: dict[str, str] = {}
    spellings = _any_of(tokenizer.special_texts)

    def mark(found: re.Match[str]) -> str:
        number = f"{secrets.randbelow(10**MARK_DIGITS):0{MARK_DIGITS}}"
        spelling_of[number] = found[0]
        return number

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return spellings.sub(mark, value)
        if isinstance(value, Mapping):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list | tuple) else value

    if tokenizer.special_texts:
        messages = [marked(message) for message in messages]
    text = render(messages)
    if not spelling_of:
        return tokenizer.encode(text, add_special=False, parse_special=True)
    tokens: list[int] = []
    for piece in re.split(f"({_any_of(spelling_of).pattern})", text):
        if piece in spelling_of:
            tokens += tokenizer.encode(spelling_of[piece], add_special=False)
        elif piece:
            tokens += tokenizer.encode(piece, add_special=False, parse_special=True)
    return tokens


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in longest_first))
