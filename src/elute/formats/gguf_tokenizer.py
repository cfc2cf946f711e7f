"""Rebuild tokenizer.json from the metadata of a GGUF file: byte-level BPE and SentencePiece BPE.

Knows the tokenizer.ggml.* keys and their meaning in llama.cpp; does not read files or tokenize.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from elute.errors import FormatError, UnsupportedError
from elute.formats.gguf_pretokenizers import PreTokenizer, pre_tokenizer
from elute.formats.gguf_tokenizer_keys import TokenizerKeys
from elute.formats.tokenizer import END_OF_TURN_TOKENS
from elute.types import TokenizerFiles

_log = logging.getLogger(__name__)

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's spelling of a space
_NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Gemma's scores do not follow the order of its merges, its token order does.
_MERGES_BY_POSITION = frozenset({"gemma", "gemma2", "gemma3"})
# Phi-3 prepends the space with a normalizer: also before text that begins with one.
_ALWAYS_PREPENDS = frozenset({"phi3"})


class TokenType(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Never the result of a merge: text that spells "<s>" or "<0x0A>" is text.
_NOT_FROM_TEXT = frozenset({TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE})


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> TokenizerFiles:
    """The Hugging Face tokenizer files that a GGUF's metadata describes.

    metadata    all keys of the file, arrays as sequences or numpy arrays; general.architecture and
                tokenizer.* are read
    -> files whose generation_config lists every id that ends a turn

    Equal to the model's own tokenizer.json on text. Known limit: a SentencePiece model puts its
    leading space only before text that does not begin with one, as transformers 5 does;
    llama.cpp and the sentencepiece library put it always.

    Raises FormatError for missing keys, wrong types, ids out of range and lengths that disagree;
    UnsupportedError for a kind of tokenizer or pre-tokenizer that elute does not know.
    """
    keys = TokenizerKeys(metadata)
    model = keys.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"GGUF tokenizer.ggml.model: {model!r} found, wanted gpt2 (byte-level BPE) or llama "
            "(SentencePiece BPE); elute has no other tokenizer"
        )
    tokens = _tokens(keys)
    types = _types(keys, len(tokens))
    named = {
        name: tokens[token]
        for name, key in _NAMED_IDS.items()
        if (token := keys.token_id(f"tokenizer.ggml.{key}", len(tokens))) is not None
    }
    if model == "gpt2":
        kind = _named_pre_tokenizer(keys)
        spec = _byte_level_spec(keys, tokens, kind)
        bos_by_default = kind.adds_bos
    else:
        spec = _sentencepiece_spec(keys, tokens, types, named)
        bos_by_default = True
    vocabulary = {token: i for i, token in enumerate(tokens)}
    adds_bos = keys.adds("bos", named, default=bos_by_default)
    adds_eos = keys.adds("eos", named, default=False)
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types, named),
        **spec,
        "post_processor": _post_processor(
            [named["bos_token"]] if adds_bos else [],
            [named["eos_token"]] if adds_eos else [],
            vocabulary,
        ),
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
    }
    return TokenizerFiles(
        tokenizer_json=json.dumps(spec, ensure_ascii=False),
        tokenizer_config=config,
        chat_template=keys.text_or_none("tokenizer.chat_template"),
        generation_config=_generation_config(keys, tokens, types, named, vocabulary),
    )


def _tokens(keys: TokenizerKeys) -> list[str]:
    key = "tokenizer.ggml.tokens"
    tokens = keys.array_or_none(key, (str,), "strings")
    if not tokens:
        raise FormatError(f"GGUF {key}: missing or empty, wanted strings; convert the model again")
    # llama.cpp's names for tokens without text, so that they stay distinct.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if (first := seen.setdefault(token, i)) != i:
            raise FormatError(
                f"GGUF {key}: {token!r} is both {first} and {i}, wanted distinct tokens"
                "; convert the model again"
            )
    return tokens


def _types(keys: TokenizerKeys, n_tokens: int) -> list[TokenType]:
    key = "tokenizer.ggml.token_type"
    if keys.array_or_none(key, (int,), "integers") is None:
        return [TokenType.NORMAL] * n_tokens
    types = keys.array(key, (int,), "integers", n_tokens)
    known = {int(kind): kind for kind in TokenType}
    for i, kind in enumerate(types):
        if kind not in known:
            raise FormatError(
                f"GGUF {key}: entry {i} is {kind}, wanted 1 to {max(known)}"
                "; convert the model again"
            )
    return [known[kind] for kind in types]


def _named_pre_tokenizer(keys: TokenizerKeys) -> PreTokenizer:
    name = keys.text_or_none("tokenizer.ggml.pre")
    if name is None:
        name = "default"
        _log.warning(
            "GGUF tokenizer.ggml.pre is missing: splitting text by llama.cpp's default, which may "
            "not be the model's own; convert the model again to be sure"
        )
    return pre_tokenizer(name)


def _byte_level_spec(
    keys: TokenizerKeys, tokens: Sequence[str], kind: PreTokenizer
) -> dict[str, Any]:
    merges = _listed_merges(keys, set(tokens))
    if merges is None:
        raise FormatError(
            "GGUF tokenizer.ggml.merges: missing, wanted the merges of byte-level BPE; "
            "convert the model again"
        )
    return {
        "normalizer": kind.normalizer_json(),
        "pre_tokenizer": kind.pre_tokenizer_json(),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": _bpe(tokens, merges, ignore_merges=kind.ignore_merges),
    }


def _sentencepiece_spec(
    keys: TokenizerKeys, tokens: list[str], types: list[TokenType], named: Mapping[str, str]
) -> dict[str, Any]:
    architecture = keys.text_or_none("general.architecture")
    _respell_spaces(tokens, types)
    merges = _listed_merges(keys, set(tokens))
    if merges is None:
        key = "tokenizer.ggml.scores"
        scores = keys.array(key, (float, int), "numbers", len(tokens))
        for i, score in enumerate(scores):
            if not math.isfinite(score):
                raise FormatError(
                    f"GGUF {key}: entry {i} is {score}, wanted finite numbers"
                    "; convert the model again"
                )
        if architecture in _MERGES_BY_POSITION:
            scores = [-i for i in range(len(tokens))]
        merges = _merges_from_scores(tokens, types, scores)
    prefix = keys.flag("tokenizer.ggml.add_space_prefix", default=True)
    normalizer: dict[str, Any] | None = None
    pre: dict[str, Any] | None = None
    to_block: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not prefix:
        normalizer = to_block
    elif architecture in _ALWAYS_PREPENDS:
        prepend = {"type": "Prepend", "prepend": _SPACE}
        normalizer = {"type": "Sequence", "normalizers": [prepend, to_block]}
    else:
        pre = {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": "first",
            "split": False,
        }
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(
            tokens, merges, unknown=named.get("unk_token"), fuse_unk=True, byte_fallback=True
        ),
    }


def _respell_spaces(tokens: list[str], types: list[TokenType]) -> None:
    """Gemma's runs of spaces are spaces in a GGUF, but text reaches the merges as blocks.

    They become what merges make: as tokens found before the merges, they would match blocks that
    the text itself holds, but no spaces.
    """
    known = set(tokens)
    for i, token in enumerate(tokens):
        if len(token) > 1 and not token.strip(" ") and (blocks := _SPACE * len(token)) not in known:
            tokens[i], types[i] = blocks, TokenType.NORMAL


def _listed_merges(keys: TokenizerKeys, vocabulary: set[str]) -> list[tuple[str, str]] | None:
    key = "tokenizer.ggml.merges"
    lines = keys.array_or_none(key, (str,), "strings")
    if lines is None:
        return None
    merges = []
    for i, line in enumerate(lines):
        # The first half is never empty, so a space at the front belongs to it.
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= vocabulary:
            raise FormatError(
                f"GGUF {key}: entry {i} is {line!r}, wanted two tokens whose union is a token; "
                "convert the model again"
            )
        merges.append((left, right))
    return merges


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[TokenType], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens, best token first.

    Equal scores: the longer left half first, then the longer right half, then the order of the
    file; the order of transformers' convert_gguf_tokenizer, which decides how a run of one
    character is cut.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind in _NOT_FROM_TEXT:
            continue
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((score, left, right))
    ranked.sort(key=lambda entry: (entry[0], len(entry[1]), len(entry[2])), reverse=True)
    return [(left, right) for _, left, right in ranked]


def _bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    *,
    unknown: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }


def _added_tokens(
    tokens: Sequence[str], types: Sequence[TokenType], named: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Tokens that are found in a text before anything splits it."""
    specials = set(named.values())
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind is TokenType.CONTROL or token in specials,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) or token in specials
    ]


def _post_processor(
    before: Sequence[str], after: Sequence[str], ids: Mapping[str, int]
) -> dict[str, Any]:
    def special(token: str, sequence: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": sequence}}

    def text(name: str, sequence: int) -> list[dict[str, Any]]:
        return [
            *(special(token, sequence) for token in before),
            {"Sequence": {"id": name, "type_id": sequence}},
            *(special(token, sequence) for token in after),
        ]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]}
            for token in (*before, *after)
        },
    }


def _generation_config(
    keys: TokenizerKeys,
    tokens: Sequence[str],
    types: Sequence[TokenType],
    named: Mapping[str, str],
    vocabulary: Mapping[str, int],
) -> dict[str, Any]:
    ends = {
        keys.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
        for key in ("eos", "eot", "eom")
    }
    added = (TokenType.CONTROL, TokenType.USER_DEFINED)
    ends |= {
        vocabulary[token]
        for token in END_OF_TURN_TOKENS
        if token in vocabulary and types[vocabulary[token]] in added
    }
    config: dict[str, Any] = {}
    if eos := sorted(token for token in ends if token is not None):
        config["eos_token_id"] = eos
    for name, key in (("bos_token", "bos_token_id"), ("pad_token", "pad_token_id")):
        if name in named:
            config[key] = vocabulary[named[name]]
    return config
