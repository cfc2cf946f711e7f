"""Token ids to text, one token at a time: whole characters, and exactly the text of a full decode.

Knows the three ways in which a tokenizer.json spells its decoder; does not know models or chats.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

from elute.errors import FormatError, UnsupportedError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SUPPORTED = "ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse and a left Strip"


@cache
def byte_alphabet() -> Mapping[str, int]:
    """Byte-level BPE's 256 characters -> the byte that each stands for.

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100, U+0101, ...
    Source: GPT-2's encoder (Radford et al. 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return alphabet


@lru_cache(maxsize=1 << 16)
def byte_level_bytes(token: str) -> bytes:
    """What a token spells in byte_alphabet(); one with any other character is text.

    Cached: a token of an answer is mostly one that was decoded before.
    """
    alphabet = byte_alphabet()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()


@dataclass(frozen=True)
class DecoderPlan:
    """What a tokenizer.json's decoder does to a list of tokens, in this order.

    byte_level      tokens are spelled in byte_alphabet(); one with any other character is text
    replacements    (old, new) in every token
    first_drops     removed from the first token instead of replaced (Metaspace); "" is none
    byte_fallback   a token <0xNN> is that byte; a run that is not UTF-8 is one U+FFFD a byte
    strip           (character, count): at most this many are taken off the front of the whole text
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    first_drops: str = ""
    byte_fallback: bool = False
    strip: tuple[str, int] = ("", 0)

    @classmethod
    def from_json(cls, decoder: Mapping[str, Any] | None) -> DecoderPlan:
        """Raises UnsupportedError for a decoder that cannot be followed token by token."""
        if decoder is None:
            raise UnsupportedError(
                f"tokenizer.json: no decoder found, wanted {_SUPPORTED}; use another model"
            )
        try:
            return _plan(decoder["decoders"] if decoder["type"] == "Sequence" else [decoder])
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"tokenizer.json: the decoder lacks or misspells {error}, wanted {_SUPPORTED}"
                "; use another model"
            ) from error

    def byte_of(self, token: str) -> int | None:
        """The byte that a byte-fallback token stands for."""
        match = _BYTE_TOKEN.fullmatch(self.replaced(token)) if self.byte_fallback else None
        return int(match[1], 16) if match else None

    def replaced(self, token: str) -> str:
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token

    def token_bytes(self, token: str) -> bytes:
        """The bytes that a token stands for away from the start of the text."""
        if self.byte_level:
            return byte_level_bytes(token)
        byte = self.byte_of(token)
        return self.replaced(token).encode() if byte is None else bytes([byte])


def _plan(kinds: Sequence[Mapping[str, Any]]) -> DecoderPlan:
    names = [kind["type"] for kind in kinds]
    if names == ["ByteLevel"]:
        return DecoderPlan(byte_level=True)
    if names == ["Metaspace"]:
        mark: str = kinds[0]["replacement"]
        # Files older than tokenizers 0.15 say add_prefix_space instead of prepend_scheme.
        always = "always" if kinds[0].get("add_prefix_space", True) else "never"
        drops = mark if kinds[0].get("prepend_scheme", always) != "never" else ""
        return DecoderPlan(replacements=((mark, " "),), first_drops=drops)
    replacements = []
    while names and names[0] == "Replace":
        replace, kinds, names = kinds[0], kinds[1:], names[1:]
        if not replace["pattern"].get("String"):
            raise UnsupportedError(
                f"tokenizer.json: the decoder replaces the pattern {replace['pattern']}, wanted a "
                "plain string; use another model"
            )
        replacements.append((replace["pattern"]["String"], replace["content"]))
    byte_fallback = names[:1] == ["ByteFallback"]
    kinds, names = kinds[byte_fallback:], names[byte_fallback:]
    strip = ("", 0)
    if names == ["Fuse", "Strip"] and kinds[1]["stop"] == 0:
        strip = (kinds[1]["content"], kinds[1]["start"])
    elif names not in ([], ["Fuse"]):
        raise UnsupportedError(
            f"tokenizer.json: decoder steps {names} found, wanted {_SUPPORTED}; use another model"
        )
    return DecoderPlan(replacements=tuple(replacements), byte_fallback=byte_fallback, strip=strip)


class _Pieces(Protocol):
    """Text that is final; what is not yet final stays inside."""

    def feed(self, token: str) -> str: ...

    def flush(self) -> str: ...


class _ByteLevelPieces:
    """The bytes of all tokens are one UTF-8 text; a character waits for its last byte."""

    def __init__(self, plan: DecoderPlan) -> None:
        self._plan = plan
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: str) -> str:
        return self._utf8.decode(self._plan.token_bytes(token))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _SentencePieces:
    """Tokens are text, except runs of byte tokens.

    A run waits for its end, because decoding rejects it as a whole: one wrong byte turns also the
    good characters before it into U+FFFD.
    """

    def __init__(self, plan: DecoderPlan) -> None:
        self._plan = plan
        self._run = bytearray()
        self._first_drops = plan.first_drops
        self._strip_char, self._strip_left = plan.strip

    def feed(self, token: str) -> str:
        byte = self._plan.byte_of(token)
        if byte is not None:
            self._run.append(byte)
            return ""
        if self._first_drops:
            token = token.replace(self._first_drops, "")
            self._first_drops = ""
        return self._stripped(self._end_run() + self._plan.replaced(token))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip_char:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class TokenTexts(Protocol):
    """What a stream asks of a tokenizer."""

    @property
    def decoder(self) -> DecoderPlan: ...

    def token_text(self, token: int, *, skip_special: bool) -> str | None:
        """The vocabulary's spelling; None for an id without a token, or a special token to skip."""


class TextStream:
    """Feed token ids, get text; the pieces and flush() join to exactly Tokenizer.decode of all ids.

    A piece holds whole characters only. U+FFFD comes out where decode gives it: for bytes that no
    later token can complete. Not thread safe.
    """

    def __init__(self, tokenizer: TokenTexts, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        plan = tokenizer.decoder
        self._pieces: _Pieces = _ByteLevelPieces(plan) if plan.byte_level else _SentencePieces(plan)

    def feed(self, token: int) -> str:
        """-> the characters that this token completes, often ''."""
        text = self._tokenizer.token_text(token, skip_special=self._skip_special)
        return "" if text is None else self._pieces.feed(text)

    def flush(self) -> str:
        """-> what an unfinished character at the end decodes to; call once, at the end."""
        return self._pieces.flush()
