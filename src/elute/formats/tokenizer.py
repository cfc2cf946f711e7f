"""Text to token ids and back, over the `tokenizers` library.

tokenizer.json is the law; tokenizer_config.json only names special tokens. Does not know chat
templates or where the files came from.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from elute.errors import FormatError, ShapeError, UnsupportedError
from elute.formats.text_stream import DecoderPlan, TextStream
from elute.types import TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["END_OF_TURN_TOKENS", "TextStream", "Tokenizer", "named_special_tokens"]

# Tokens that end an answer, for models whose generation_config.json does not say.
END_OF_TURN_TOKENS = (
    "<|im_end|>",  # ChatML: SmolLM2, Qwen
    "<|endoftext|>",  # SmolLM2, Qwen and GPT-2 outside a chat
    "<|eot_id|>",  # Llama 3: end of turn
    "<|eom_id|>",  # Llama 3: end of message before a tool's answer
    "<|end_of_text|>",  # Llama 3, Granite outside a chat
    "<end_of_turn>",  # Gemma
    "<|end|>",  # Phi
)

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, UTF-8 cannot
# A vocab or merges with its object or list; text inside a string cannot begin like that unescaped.
# Possessive throughout: nothing is kept to come back to.
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_LIST = rf'\[[^"\[\]]*+(?:{_STRING}[^"\[\]]*+)*+\]'
_BULK = re.compile(
    r'(?<!\\)("(?:vocab|merges)"\s*+:\s*+)'
    rf'(?:\{{[^"{{}}]*+(?:{_STRING}[^"{{}}]*+)*+\}}|'
    rf'\[[^"\[\]]*+(?:(?:{_STRING}|{_LIST})[^"\[\]]*+)*+\])',
    re.DOTALL,
)
_TOKEN_SWITCHES = ("single_word", "lstrip", "rstrip", "normalized", "special")


def named_special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names: {"bos_token": "<s>", ...}.

    Raises FormatError for a name whose value is neither text nor an added-token object.
    """
    named = {}
    extra = tokenizer_config.get("extra_special_tokens")
    sources: list[tuple[str, Any]] = [
        (key, value)
        for key, value in tokenizer_config.items()
        if key.endswith("_token") and not isinstance(value, bool)  # add_bos_token is a switch
    ]
    if isinstance(extra, Mapping):
        sources += [(str(key), value) for key, value in extra.items()]
    for key, value in sources:
        if value is not None:
            named[key] = _token_content(key, value)
    return named


def _token_content(key: str, value: object) -> str:
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str) or _SURROGATE.search(content):
        raise FormatError(
            f"tokenizer_config.json: {key} is {value!r}, wanted a token's text or an object "
            "with its content; fetch the file again"
        )
    return content


class Tokenizer:
    """A vocabulary with its rules. Thread safe; made by from_files.

    bos_id              None when the model names no beginning token
    eos_ids             ids that end a generation, ascending; may be empty
    special_tokens      {"bos_token": "<s>", ...} as tokenizer_config.json names them
    special_texts       all that parse_special finds, named or not
    decoder             how tokens become text
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    special_texts: frozenset[str]
    decoder: DecoderPlan

    def __init__(self, backend: Backend, decoder: DecoderPlan, files: TokenizerFiles) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._texts: dict[int, str | None] = {}  # what token_text has looked up
        self.decoder = decoder
        self.special_tokens = named_special_tokens(files.tokenizer_config)
        _add_config_tokens(backend, files.tokenizer_config)
        added = backend.get_added_tokens_decoder()
        self.special_texts = frozenset(t.content for t in added.values() if t.special)
        bos = self.special_tokens.get("bos_token")
        ids = self._generation_ids(files.generation_config, "bos_token_id")
        self.bos_id = backend.token_to_id(bos) if bos is not None else next(iter(ids), None)
        self.eos_ids = self._end_ids(files.generation_config)

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> Tokenizer:
        """Raises FormatError for text that is not a tokenizer.json, and for a special token that
        tokenizer_config.json names but the vocabulary lacks; UnsupportedError for a model or a
        decoder of a kind that elute does not read.
        """
        from tokenizers import Tokenizer as Backend

        spec = _settings(files.tokenizer_json)
        try:
            backend = Backend.from_str(files.tokenizer_json)
        except Exception as error:  # the library raises bare Exception for everything
            raise FormatError(f"tokenizer.json: {error}; fetch the file again") from error
        _check_added_tokens(spec.get("added_tokens") or (), backend)
        _check_post_processor(spec.get("post_processor"))
        # A call of transformers neither truncates nor pads, whatever the file was saved with.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, DecoderPlan.from_json(spec.get("decoder")), files)

    @cached_property
    def vocabulary_size(self) -> int:
        """1 + the largest id with a token; an embedding may have more rows.

        Looks at the whole vocabulary, the first time.
        """
        return 1 + max(self._backend.get_vocab().values(), default=-1)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        add_special     add what the model wants round a text (BOS, ...). tokenizer.json's
                        post-processor decides; add_bos_token and add_eos_token of
                        tokenizer_config.json do not, as in transformers 5.
        parse_special   text that spells a special token becomes that token: needed for a rendered
                        chat, and a way to forge turns if done to a user's text. Added tokens that
                        are not special are always found.

        Raises FormatError for text with a lone surrogate, which no UTF-8 can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FormatError(
                f"text: character {error.start} is the lone surrogate "
                f"U+{ord(text[error.start]):04X}, wanted Unicode text; decode the input with "
                "errors='replace'"
            ) from error
        with self._lock:  # the switch belongs to the shared object, not to the call
            self._backend.encode_special_tokens = not parse_special
            return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; ids without a token (padding rows of an embedding) add nothing.

        Raises ShapeError for a negative id.
        """
        for token in ids:
            self._check_id(token)
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A decoder for one answer, fed token by token."""
        return TextStream(self, skip_special=skip_special)

    def token_text(self, token: int, *, skip_special: bool = False) -> str | None:
        """The vocabulary's spelling of a token; None for an id without one and for one to skip.

        Raises ShapeError for a negative id.
        """
        if token not in self._texts:
            self._check_id(token)
            self._texts[token] = self._backend.id_to_token(token)
        text = self._texts[token]
        return None if skip_special and text in self.special_texts else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text, maybe part of a character; b'' if it has no token.

        Raises ShapeError for a negative id.
        """
        text = self.token_text(token)
        return b"" if text is None else self.decoder.token_bytes(text)

    def token_id(self, text: str) -> int | None:
        """The id of the token with this spelling."""
        token: int | None = self._backend.token_to_id(text)
        return token

    def _check_id(self, token: int) -> None:
        if token < 0:
            raise ShapeError(f"token id {token}: wanted 0 to {self.vocabulary_size - 1}")

    def _generation_ids(self, generation_config: Mapping[str, Any], key: str) -> Iterator[int]:
        value = generation_config.get(key)
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is None:
                continue
            if type(token) is not int or not self._has_id(token):
                raise FormatError(
                    f"generation_config.json: {key} is {value!r}, wanted ids from 0 to "
                    f"{self.vocabulary_size - 1}; correct the file"
                )
            yield token

    def _has_id(self, token: int) -> bool:
        """Whether an id is in 0 .. vocabulary_size-1, the size asked for only where it matters."""
        if not 0 <= token < 1 << 32:
            return False
        return self._backend.id_to_token(token) is not None or token < self.vocabulary_size

    def _end_ids(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        ids = set(self._generation_ids(generation_config, "eos_token_id"))
        names: list[str] = []
        if not ids:
            names += [token for token in END_OF_TURN_TOKENS if token in self.special_texts]
        if eos := self.special_tokens.get("eos_token"):
            names.append(eos)
        for name in names:
            token = self._backend.token_to_id(name)
            assert token is not None  # both kinds of name were found in the vocabulary
            ids.add(token)
        return tuple(sorted(ids))


def _settings(tokenizer_json: str) -> dict[str, Any]:
    """What tokenizer.json says, apart from vocabulary and merges: a vocab or merges is null here.

    They are nearly all of the file, and only the library needs them. As Python objects they take
    0.5 s and 120 MB for a vocabulary of 256k. The library refuses those that are not JSON.
    """
    try:
        try:
            spec = json.loads(_BULK.sub(r"\1null", tokenizer_json))
        except json.JSONDecodeError:
            spec = json.loads(tokenizer_json)  # fails too, and tells the place in the file
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"tokenizer.json: not JSON: {error}; fetch the file again") from error
    if not isinstance(spec, dict):
        raise FormatError(
            f"tokenizer.json: found a {type(spec).__name__}, wanted an object; fetch the file again"
        )
    model = spec.get("model")
    # tokenizers 0.23 slices every merge by this prefix unchecked: a wrong one aborts the process.
    if isinstance(model, Mapping) and model.get("continuing_subword_prefix"):
        raise UnsupportedError(
            "tokenizer.json: the model's continuing_subword_prefix is "
            f"{model['continuing_subword_prefix']!r}, wanted none; elute reads byte-level and "
            "SentencePiece tokenizers, which have none"
        )
    return spec


def _check_added_tokens(added_tokens: Sequence[Mapping[str, Any]], backend: Backend) -> None:
    """The library gives an added token another id, silently, where its own does not follow."""
    for token in added_tokens:
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise FormatError(
                f"tokenizer.json: added token {token['content']!r} has id {token['id']}, but "
                f"the vocabulary gives it {found}; fetch the file again"
            )


def _check_post_processor(post_processor: object) -> None:
    """The library panics, with a stack on stderr, when a template uses an undefined token."""
    if not isinstance(post_processor, Mapping):
        return
    for part in post_processor.get("processors") or ():
        _check_post_processor(part)
    if post_processor.get("type") != "TemplateProcessing":
        return
    defined = post_processor.get("special_tokens") or {}
    for piece in [*(post_processor.get("single") or ()), *(post_processor.get("pair") or ())]:
        token = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
        if isinstance(token, Mapping) and token.get("id") not in defined:
            raise FormatError(
                f"tokenizer.json: the post-processor adds {token.get('id')!r} without defining it, "
                f"wanted one of {sorted(defined)}; fetch the file again"
            )


def _add_config_tokens(backend: Backend, tokenizer_config: Mapping[str, Any]) -> None:
    """Find in a text, and call special, what tokenizer_config.json says, as transformers does.

    Differs: transformers gives a token that the vocabulary lacks a new id, for which the embedding
    has no row; that is an error here.
    """
    from tokenizers import AddedToken

    _add_listed_tokens(backend, tokenizer_config.get("added_tokens_decoder") or {})
    named = dict(named_special_tokens(tokenizer_config))
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = tokenizer_config.get(key) or ()
        if isinstance(extra, list | tuple):
            named.update({f"{key}[{i}]": _token_content(key, t) for i, t in enumerate(extra)})
        elif not isinstance(extra, Mapping):  # a map was read with the named tokens
            raise FormatError(
                f"tokenizer_config.json: {key} is {extra!r}, wanted a list of tokens"
                "; fetch the file again"
            )
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for key, content in named.items():
        if backend.token_to_id(content) is None:
            raise FormatError(
                f"tokenizer_config.json: {key} is {content!r}, which the vocabulary of "
                "tokenizer.json lacks; fetch both files again"
            )
        known = added.get(content)
        if known is None:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        elif not known.special:
            known.special = True
            backend.add_special_tokens([known])


def _add_listed_tokens(backend: Backend, listed: object) -> None:
    """added_tokens_decoder: {"480": {"content": "<think>", "lstrip": false, ...}}."""
    from tokenizers import AddedToken

    where = "tokenizer_config.json: added_tokens_decoder"
    if not isinstance(listed, Mapping):
        raise FormatError(
            f"{where} is a {type(listed).__name__}, wanted a map; fetch the file again"
        )
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for key, token in listed.items():
        content = _token_content(f"added_tokens_decoder[{key}]", token)
        found = backend.token_to_id(content)
        if str(found) != str(key):
            raise FormatError(
                f"{where}[{key}] is {content!r}, but the vocabulary of tokenizer.json gives it "
                f"{found}; fetch both files again"
            )
        if not isinstance(token, Mapping):
            continue
        switches = {name: token[name] for name in _TOKEN_SWITCHES if name in token}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise FormatError(
                    f"{where}[{key}]: {name} is {value!r}, wanted true or false"
                    "; fetch the file again"
                )
        wanted = AddedToken(content, **switches)
        if repr(wanted) != repr(added.get(content)):
            backend.add_tokens([wanted])
