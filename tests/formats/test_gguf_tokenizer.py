"""tokenizer.json rebuilt from GGUF metadata: equal to the original and to transformers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward_text import (
    CORPUS,
    KINDS,
    SENTENCEPIECE_KINDS,
    files,
    metadata,
    sentencepiece_processor,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import EluteError, FormatError, UnsupportedError
from elute.formats.gguf_header import read_header
from elute.formats.gguf_pretokenizers import PRE_TOKENIZERS
from elute.formats.gguf_tokenizer import tokenizer_from_gguf
from elute.formats.tokenizer import Tokenizer


def rebuilt(keys: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_files(tokenizer_from_gguf(keys))


def transformers_backend(keys: Mapping[str, Any]) -> Any:
    """What transformers' AutoTokenizer.from_pretrained(gguf_file=...) encodes with."""
    pytest.importorskip("transformers")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    names = {f"tokenizer.{old}": new for old, new in GGUF_TOKENIZER_MAPPING["tokenizer"].items()}
    grouped = {new: keys[old] for old, new in names.items() if old in keys}
    return convert_gguf_tokenizer(keys["general.architecture"], grouped)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilt_equals_the_original(kind: str) -> None:
    ours, original = rebuilt(metadata(kind)), Tokenizer.from_files(files(kind))
    assert ours.vocabulary_size == original.vocabulary_size
    assert ours.special_tokens.items() <= original.special_tokens.items()
    assert (ours.bos_id, ours.eos_ids) == (original.bos_id, original.eos_ids)
    for text in CORPUS:
        for switches in ({}, {"add_special": False}, {"parse_special": True}):
            ids = original.encode(text, **switches)
            assert ours.encode(text, **switches) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == original.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilt_equals_transformers(kind: str) -> None:
    ours, theirs = rebuilt(metadata(kind)), transformers_backend(metadata(kind))
    if kind == "qwen2":
        from tokenizers import normalizers

        # transformers 5.23 forgets that Qwen2's tokenizer.json composes its text (NFC).
        theirs.normalizer = normalizers.NFC()
    if kind == "smollm":
        _split_digits(theirs)
    for text in CORPUS:
        want = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False, parse_special=True) == want, text


def _split_digits(backend: Any) -> None:
    """transformers 5.23 knows no "smollm" and splits by GPT-2's rule, which keeps numbers whole."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])


@pytest.mark.parametrize("kind", SENTENCEPIECE_KINDS)
def test_rebuilt_equals_sentencepiece(kind: str) -> None:
    """But for three things that transformers does not do either.

    A leading space gets no second one, a block in the text is no space, and runs of Gemma's spaces
    are cut by merges, not longest first.
    """
    ours, processor = rebuilt(metadata(kind)), sentencepiece_processor(kind)
    same = [text for text in CORPUS if not re.match(r" |.*(▁|\s{6})", text, re.DOTALL)]
    assert len(same) > 28
    for text in same:
        assert ours.encode(text, add_special=False) == processor.encode(text), text


def test_default_model_equals_transformers(default_gguf: Path) -> None:
    keys = read_header(default_gguf, np.memmap(default_gguf, np.uint8, "r")).metadata
    ours, theirs = rebuilt(keys), transformers_backend(keys)
    _split_digits(theirs)
    assert (ours.bos_id, ours.eos_ids, ours.vocabulary_size) == (1, (0, 2), 49152)
    for text in [*CORPUS, "In 2024, 1,234.5 of 99 numbers"]:
        ids = theirs.encode(text).ids
        assert ours.encode(text, parse_special=True) == ids, text
        stream = ours.stream(skip_special=False)
        pieces = [*map(stream.feed, ids), stream.flush()]
        assert "".join(pieces) == theirs.decode(ids, skip_special_tokens=False), text


def test_regexes_equal_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shared = PRE_TOKENIZERS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx"} <= shared
    for name in shared:
        assert PRE_TOKENIZERS[name].splits == (GGUF_PRE_TOKENIZER_SPLITS[name],), name


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_all_text(name: str) -> None:
    ours = rebuilt({**metadata("gpt-2"), "tokenizer.ggml.pre": name})
    for text in CORPUS:
        if not PRE_TOKENIZERS[name].nfc:
            assert ours.decode(ours.encode(text, add_special=False)) == text


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("gpt-2", "ab12 345", ["ab", "12", " 345"]),
        ("smollm", "ab12 345", ["ab", "1", "2", " ", "3", "4", "5"]),
        ("llama-bpe", "ab1234's 5", ["ab", "123", "4", "'s", " ", "5"]),
        ("qwen2", "ab12'S 3\n\n x", ["ab", "1", "2", "'S", " ", "3", "\n\n", " x"]),
        ("tekken", "HTMLDoc it's 12", ["HTMLDoc", " it", "'s", " ", "1", "2"]),
        ("gpt-4o", "camelCase it's 1234", ["camel", "Case", " it's", " ", "123", "4"]),
        ("default", "a, b12345", ["a", ",", " b", "123", "45"]),
    ],
)
def test_pre_tokenizer_splits(name: str, text: str, want: list[str]) -> None:
    """With a token for no pair of bytes, and ids only for the split: read the splits themselves."""
    import json

    from tokenizers import Tokenizer as Backend

    made = tokenizer_from_gguf({**metadata("gpt-2"), "tokenizer.ggml.pre": name})
    backend = Backend.from_str(json.dumps(json.loads(made.tokenizer_json)))
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == want


def test_llama_3_takes_a_whole_word_before_its_merges() -> None:
    keys = metadata("gpt-2")
    tokens = [*keys["tokenizer.ggml.tokens"], "Ġzyzzyva"]
    more = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*keys["tokenizer.ggml.token_type"], 1],
    }
    whole = rebuilt({**keys, **more, "tokenizer.ggml.pre": "llama-bpe"})
    assert whole.encode(" zyzzyva", add_special=False) == [len(tokens) - 1]
    merged = rebuilt({**keys, **more})
    assert len(merged.encode(" zyzzyva")) > 1


def test_text_that_spells_a_control_token_is_text() -> None:
    """Even where merges could make it: "<" and "s>" are tokens, and so is their union "<s>"."""
    keys = metadata("llama")
    more = {
        "tokenizer.ggml.tokens": [*keys["tokenizer.ggml.tokens"], "<", ">", "s>"],
        "tokenizer.ggml.token_type": [*keys["tokenizer.ggml.token_type"], 1, 1, 1],
        "tokenizer.ggml.scores": [*keys["tokenizer.ggml.scores"], -900.0, -901.0, 0.0],
    }
    ours = rebuilt({**keys, **more})
    text = ours.encode("x<s>", add_special=False)
    assert [ours.token_text(token) for token in text[-2:]] == ["<", "s>"]
    parsed = ours.encode("x<s>", add_special=False, parse_special=True)
    assert [ours.token_text(token) for token in parsed[-1:]] == ["<s>"]


@pytest.mark.parametrize("kind", ["llama", "gpt-2", "llama-bpe"])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_flags_decide_what_goes_round_a_text(kind: str, bos: bool | None, eos: bool | None) -> None:
    keys = {k: v for k, v in metadata(kind).items() if not k.endswith("add_bos_token")}
    for name, flag in (("bos", bos), ("eos", eos)):
        if flag is not None:
            keys[f"tokenizer.ggml.add_{name}_token"] = np.bool_(flag)
    ids = rebuilt(keys).encode("a")
    adds_bos = kind != "gpt-2" if bos is None else bos
    assert (ids[0] == keys["tokenizer.ggml.bos_token_id"]) == adds_bos
    assert (ids[-1] == keys["tokenizer.ggml.eos_token_id"]) == bool(eos)


def test_space_prefix_is_a_switch() -> None:
    keys = {**metadata("llama"), "tokenizer.ggml.add_space_prefix": False}
    ours = rebuilt(keys)
    assert ours.encode("the", add_special=False) != rebuilt(metadata("llama")).encode("the")[1:]
    assert ours.decode(ours.encode(" the")) == " the"


def test_phi_3_prepends_its_space_always_like_transformers() -> None:
    keys = {**metadata("llama"), "general.architecture": "phi3"}
    ours, theirs = rebuilt(keys), transformers_backend(keys)
    for text in CORPUS:
        want = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False, parse_special=True) == want, text


def test_ends_of_a_turn_come_from_keys_and_known_names() -> None:
    keys = {**metadata("gpt-2"), "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8}
    # 0 is <|endoftext|>, 2 is <|im_end|>
    assert tokenizer_from_gguf(keys).generation_config["eos_token_id"] == [0, 2, 7, 8]
    assert rebuilt(keys).eos_ids == (0, 2, 7, 8)


def test_arrays_may_be_numpy_and_chat_template_is_kept() -> None:
    keys = metadata("llama")
    arrays = {
        "tokenizer.ggml.scores": np.array(keys["tokenizer.ggml.scores"], np.float32),
        "tokenizer.ggml.token_type": np.array(keys["tokenizer.ggml.token_type"], np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.chat_template": "{{ messages }}",
    }
    made = tokenizer_from_gguf({**keys, **arrays})
    assert made.tokenizer_json == tokenizer_from_gguf(keys).tokenizer_json
    assert made.chat_template == "{{ messages }}"


def test_missing_pre_tokenizer_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    keys = {k: v for k, v in metadata("gpt-2").items() if k != "tokenizer.ggml.pre"}
    with caplog.at_level(logging.WARNING):
        missing = tokenizer_from_gguf(keys)
    assert "tokenizer.ggml.pre is missing" in caplog.text
    default = tokenizer_from_gguf({**keys, "tokenizer.ggml.pre": "default"})
    assert missing.tokenizer_json == default.tokenizer_json


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "gemma4", "plamo2", "none"])
def test_other_models_are_refused(model: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{model!r} found, wanted gpt2 .* or llama"):
        tokenizer_from_gguf({"tokenizer.ggml.model": model})


def test_unknown_pre_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'new' found, wanted one of .*, qwen2"):
        tokenizer_from_gguf({**metadata("gpt-2"), "tokenizer.ggml.pre": "new"})


_MISSING = object()
_GGML = "tokenizer.ggml."


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("gpt-2", "model", _MISSING, "missing, wanted a string"),
        ("gpt-2", "model", 3, "found 3, wanted a string"),
        ("gpt-2", "pre", ["a"], "found a list, wanted a string"),
        ("gpt-2", "tokens", _MISSING, "missing or empty, wanted strings"),
        ("gpt-2", "tokens", [], "missing or empty, wanted strings"),
        ("gpt-2", "tokens", "abc", "found a str, wanted an array of strings"),
        ("gpt-2", "tokens", ["a", b"b"], "entry 1 is a bytes, wanted strings"),
        ("gpt-2", "tokens", ["a", "b", "a"], "'a' is both 0 and 2"),
        ("gpt-2", "token_type", [1, 1], "2 entries, wanted 481"),
        ("gpt-2", "token_type", [1.0] * 481, "entry 0 is 1.0, wanted integers"),
        ("gpt-2", "token_type", [1] * 480 + [7], "entry 480 is 7, wanted 1 to 6"),
        ("gpt-2", "merges", _MISSING, "missing, wanted the merges"),
        ("gpt-2", "merges", ["a"], "entry 0 is 'a', wanted two tokens whose union is a token"),
        ("gpt-2", "merges", ["a b", "zz zz"], "entry 1 is 'zz zz'|entry 0 is 'a b'"),
        ("gpt-2", "merges", {"a": "b"}, "found a dict, wanted an array of strings"),
        ("gpt-2", "bos_token_id", 481, "found 481, wanted an id from 0 to 480"),
        ("gpt-2", "eos_token_id", -1, "found -1, wanted an id from 0 to 480"),
        ("gpt-2", "eot_token_id", "2", "found '2', wanted an id from 0 to 480"),
        ("gpt-2", "unknown_token_id", True, "found True, wanted an id"),
        ("gpt-2", "add_bos_token", 1, "found 1, wanted true or false"),
        ("llama", "scores", _MISSING, "missing, wanted numbers"),
        ("llama", "scores", [0.0], "1 entries, wanted 480"),
        ("llama", "scores", ["a"] * 480, "entry 0 is a str, wanted numbers"),
        ("llama", "scores", [float("nan")] * 480, "entry 0 is nan, wanted finite numbers"),
        ("llama", "add_space_prefix", "no", "found 'no', wanted true or false"),
    ],
)
def test_wrong_metadata_is_refused(kind: str, key: str, value: Any, message: str) -> None:
    keys = {**metadata(kind), _GGML + key: value}
    if value is _MISSING:
        del keys[_GGML + key]
    with pytest.raises(FormatError, match=message) as error:
        tokenizer_from_gguf(keys)
    assert f"GGUF {_GGML}{key}" in str(error.value)
    assert "\n" not in str(error.value)


def test_flag_without_its_token_is_refused() -> None:
    keys = {k: v for k, v in metadata("gpt-2").items() if k != _GGML + "eos_token_id"}
    with pytest.raises(FormatError, match=r"add_eos_token: true, but .*eos_token_id is missing"):
        tokenizer_from_gguf({**keys, _GGML + "add_eos_token": True})


_JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-3, 600)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=3)
    | st.lists(st.text(max_size=3) | st.integers(-2, 9), max_size=4)
)


@pytest.mark.parametrize("kind", ["gpt-2", "llama"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_metadata_is_a_tokenizer_or_an_error(kind: str, data: st.DataObject) -> None:
    keys = dict(metadata(kind))
    for key in data.draw(st.lists(st.sampled_from(sorted(keys)), max_size=3)):
        keys[key] = data.draw(_JUNK)
    try:
        ours = rebuilt(keys)
    except EluteError:
        return  # any other exception fails the test
    ours.encode("text")
