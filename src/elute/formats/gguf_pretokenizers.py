"""The pre-tokenizers that GGUF files name in tokenizer.ggml.pre, as tokenizer.json spells them.

A name stands for what the model's own tokenizer.json does before byte-level BPE: a normalizer,
splits, and whether a word that is a token skips the merges. Knows names and regexes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elute.errors import UnsupportedError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
# A word is capitals then small letters, or capitals alone; letters without case are both.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER
_SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}|{_SYMBOLS_SLASH}|{_SPACES}"
_GPT4O = (
    rf"{_CASED}*{_LOWER}+{_CONTRACTIONS}?|{_CASED}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SYMBOLS_SLASH}|{_SPACES}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """What happens to a text before byte-level BPE.

    splits          regexes, each applied to the pieces that the one before left; a match is a piece
    nfc             the text is first composed to Unicode NFC
    ignore_merges   a piece that is a token becomes it, whatever the merges would make
    adds_bos        the default where the file has no tokenizer.ggml.add_bos_token
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def normalizer_json(self) -> dict[str, Any] | None:
        return {"type": "NFC"} if self.nfc else None

    def pre_tokenizer_json(self) -> dict[str, Any]:
        steps: list[dict[str, Any]] = [
            {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": False,
            }
            for regex in self.splits
        ]
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return {"type": "Sequence", "pretokenizers": [*steps, {**to_bytes, "use_regex": False}]}


_LLAMA3_KIND = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
_QWEN2_KIND = PreTokenizer((_QWEN2,), nfc=True)
_DIGITS_KIND = PreTokenizer((r"\p{N}", _GPT2))
_GPT2_KIND = PreTokenizer((_GPT2,))
_GPT4O_KIND = PreTokenizer((_GPT4O,))

# Sources: each model's tokenizer.json; llama.cpp's src/llama-vocab.cpp for which name means which.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    # llama.cpp's guess for files older than tokenizer.ggml.pre; no model's own rule.
    "default": PreTokenizer(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
    "gpt-2": _GPT2_KIND,
    "phi-2": _GPT2_KIND,
    "smollm": _DIGITS_KIND,
    "starcoder": _DIGITS_KIND,
    "refact": _DIGITS_KIND,
    "codeshell": _DIGITS_KIND,
    "llama3": _LLAMA3_KIND,
    "llama-v3": _LLAMA3_KIND,
    "llama-bpe": _LLAMA3_KIND,
    "falcon3": _LLAMA3_KIND,
    "dbrx": PreTokenizer((_LLAMA3,)),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2": _QWEN2_KIND,
    "deepseek-r1-qwen": _QWEN2_KIND,
    "megrez": _QWEN2_KIND,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "gpt-4o": _GPT4O_KIND,
    "llama4": _GPT4O_KIND,
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Raises UnsupportedError for an unknown name: a guess would garble every prompt."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise UnsupportedError(
            f"GGUF tokenizer.ggml.pre: pre-tokenizer {name!r} found, wanted one of "
            f"{', '.join(sorted(PRE_TOKENIZERS))}; use the model's Hugging Face folder, which has "
            "a tokenizer.json"
        ) from None
