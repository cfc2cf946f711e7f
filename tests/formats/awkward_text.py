"""Text that tokenizers get wrong, and tiny tokenizers of each kind, trained on it in a blink."""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

from elute.types import TokenizerFiles

CORPUS = [
    "",
    " ",
    "   ",
    "a",
    "Hello, world!",
    " leading space",
    "  two leading spaces",
    "trailing spaces   ",
    "runs  of   spaces    and\ttabs\t\tand \t mixed",
    "\n",
    "\n\n",
    "line\nline\r\nline\r\rline\n\n\nend\n",
    " \n \n  \n",
    "\u00a0no-break\u2003em\u3000ideographic\u200bzero",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F ½ Ⅻ ٣٤ ೪೨",
    "I'm you're WE'LL they'VE it's 'tis don’t",
    "def f(x):\n\tif x:\n        return {'a': [1, 2]}  # done\n",
    '{"key": "value", "n": [1e-9, null, true]}\\n\\t',
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] hi [/INST]</s><unk><pad>",
    "text<|im_end|><|im_end|>  <|im_end|> x",
    "<start_of_turn>user\n<end_of_turn> <0x0A> <0xFF>",
    "日本語のテキスト。中文字符，没有空格。한국어 문장입니다.",
    "ภาษาไทยไม่มีช่องว่าง คำไทย",
    "العربية من اليمين إلى اليسار ‏\u202eRLO\u202c עברית",
    "हिन्दी में क्षत्रिय தமிழ் ភាសាខ្មែរ မြန်မာ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇯🇵 e\u0301 é ｅ",
    "\u0301lone mark \u0e34 \u200d\ufe0f",
    "NFC e\u0301 against NFD \u00e9, ﬁ Å \u212b \u1100\u1161\u11a8",
    "\0nul\0 \x01\x07\x1b[0m \x7f\x85 \ufeffbom \ufffd \uffff \U0010ffff",
    "▁literal▁block ▁▁ ▁ Ġdot Ċ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa    aaaa" * 3,
    "antidisestablishmentarianism" * 40,
    "https://example.org/a_b-c?d=e&f=%20#g  user@example.org",
    "CamelCaseWord snake_case_word SCREAMING kebab-case",
    "“quotes” ‘single’ — dash … ellipsis «guillemets»",
    "∑∫√ x² + y² ≤ z² → ∞ \N{MATHEMATICAL BOLD CAPITAL A}",
]

_TRAINING = [
    "the quick brown fox jumps over the lazy dog and the other fox was not quick at all",
    "I'm sure you're here; they've 1234 apples, 56 pears. It's don't we'll",
    "def f(x):\n    return x + 1\n\nclass A:\n        pass\n",
    "Hello, world! Hello again, user and assistant. trailing spaces   end",
    "日本語のテキスト 中文字符 한국어 ภาษาไทย العربية हिन्दी 👩‍👩‍👧‍👦 é",
    "aaaa aaa aa aaaaaaaa     and      runs   of  spaces",
] * 4

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTE_LEVEL_KINDS = ("qwen2", "llama-bpe", "smollm", "gpt-2")
_GEMMA_SPACES = ["▁" * n for n in range(2, 6)]
_USER_DEFINED = {"llama": ["<think>"], "gemma3": ["\n\n", *_GEMMA_SPACES, "<think>"]}
SENTENCEPIECE_KINDS = ("llama", "gemma3")
KINDS = BYTE_LEVEL_KINDS + SENTENCEPIECE_KINDS


def _byte_level_parts(kind: str) -> tuple[Any, Any]:
    """Normalizer and pre-tokenizer as the kind's tokenizer.json has them."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if kind in ("smollm", "gpt-2"):
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        return None, pre_tokenizers.Sequence([digits, level]) if kind == "smollm" else level
    regex = _CL100K_SPLIT.replace("DIGITS", "" if kind == "qwen2" else "{1,3}")
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return normalizers.NFC() if kind == "qwen2" else None, pre_tokenizers.Sequence([split, level])


def _byte_level(kind: str) -> TokenizerFiles:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    normalizer, tokenizer.pre_tokenizer = _byte_level_parts(kind)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    if kind == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A",
            pair="<|endoftext|> $A <|endoftext|> $B",
            special_tokens=[("<|endoftext|>", 0)],
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    return TokenizerFiles(tokenizer.to_str(), config)


@cache
def sentencepiece_processor(kind: str) -> Any:
    """A trained model; "gemma3" has no dummy prefix and defines runs of spaces and turn marks."""
    import sentencepiece

    model = io.BytesIO()
    gemma = kind == "gemma3"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in _TRAINING for line in text.split("\n")]),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        user_defined_symbols=_USER_DEFINED[kind],
        control_symbols=["<start_of_turn>", "<end_of_turn>"] if gemma else [],
        minloglevel=2,
        **({"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} if gemma else {}),
        **({"bos_piece": "<bos>", "eos_piece": "<eos>"} if gemma else {}),
    )
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    return processor


def _sentencepiece(kind: str) -> TokenizerFiles:
    """What transformers makes of tokenizer.model (its SentencePieceExtractor), as it saves it."""
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer, LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    processor = sentencepiece_processor(kind)
    ids = range(processor.vocab_size())
    vocabulary = {processor.id_to_piece(i): i for i in ids}
    names = {"llama": {}, "gemma3": {"mask_token": None}}[kind]
    tokenizer = {"llama": LlamaTokenizer, "gemma3": GemmaTokenizer}[kind](
        vocab=vocabulary, merges=generate_merges(vocabulary), add_bos_token=True, **names
    )
    defined = ["<think>"] + (["\n\n"] if kind == "gemma3" else [])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    controls = [processor.id_to_piece(i) for i in ids if processor.is_control(i)]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in controls])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens_map}
    return TokenizerFiles(tokenizer.backend_tokenizer.to_str(), config)


@cache
def files(kind: str) -> TokenizerFiles:
    return _sentencepiece(kind) if kind in SENTENCEPIECE_KINDS else _byte_level(kind)


@cache
def metadata(kind: str) -> dict[str, Any]:
    """The same tokenizer as a GGUF converter writes it."""
    if kind in SENTENCEPIECE_KINDS:
        return _sentencepiece_metadata(kind)
    spec = json.loads(files(kind).tokenizer_json)
    added = {token["content"]: 3 if token["special"] else 4 for token in spec["added_tokens"]}
    vocabulary = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [added.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": kind == "llama-bpe",
    }


def _sentencepiece_metadata(kind: str) -> dict[str, Any]:
    processor = sentencepiece_processor(kind)
    tokens, types, scores = [], [], []
    for i in range(processor.vocab_size()):
        piece, score = processor.id_to_piece(i), processor.get_score(i)
        sort = 1
        if processor.is_unknown(i):
            sort = 2
        elif processor.is_control(i):
            sort = 3
        elif processor.is_byte(i):
            sort = 6
        elif piece in _USER_DEFINED[kind]:
            sort, piece, score = 4, piece.replace("▁", " "), -1000.0  # as llama.cpp's converter
        tokens.append(piece)
        types.append(sort)
        scores.append(score)
    made: dict[str, Any] = {
        "general.architecture": kind,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_space_prefix": kind != "gemma3",
    }
    if kind == "gemma3":
        made["tokenizer.ggml.padding_token_id"] = processor.pad_id()
    return made
