"""Tokenizer and TextStream: equal to transformers on awkward text, and to themselves in pieces."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from awkward_text import BYTE_LEVEL_KINDS, CORPUS, KINDS, files
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import EluteError, FormatError, ShapeError, UnsupportedError
from elute.formats.text_stream import DecoderPlan, byte_alphabet
from elute.formats.tokenizer import Tokenizer, _settings
from elute.types import TokenizerFiles

_TOKENIZERS: dict[str, Tokenizer] = {}


def tokenizer(kind: str) -> Tokenizer:
    if kind not in _TOKENIZERS:
        _TOKENIZERS[kind] = Tokenizer.from_files(files(kind))
    return _TOKENIZERS[kind]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ours, transformers' AutoTokenizer of the same folder)"""
    transformers = pytest.importorskip("transformers")
    kind = request.param
    folder: Path = tmp_path_factory.mktemp(kind)
    (folder / "tokenizer.json").write_text(files(kind).tokenizer_json, encoding="utf-8")
    config = json.dumps(dict(files(kind).tokenizer_config))
    (folder / "tokenizer_config.json").write_text(config)
    return tokenizer(kind), transformers.AutoTokenizer.from_pretrained(folder)


def test_encode_equals_transformers(pair: Any) -> None:
    ours, theirs = pair
    for text in CORPUS:
        assert ours.encode(text, parse_special=True) == theirs(text)["input_ids"], text
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special=False, parse_special=True) == bare, text


def test_encode_of_special_strings_as_text_equals_transformers(pair: Any) -> None:
    ours, theirs = pair
    for text in CORPUS:
        want = theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.encode(text, parse_special=False) == want, text


def test_decode_equals_transformers(pair: Any) -> None:
    ours, theirs = pair
    for text in CORPUS:
        ids = ours.encode(text, parse_special=True)
        for skip in (True, False):
            want = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special=skip) == want, text


def test_special_tokens_equal_transformers(pair: Any) -> None:
    ours, theirs = pair
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.vocabulary_size == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_of_corpus_equals_decode(kind: str) -> None:
    ours = tokenizer(kind)
    for text in CORPUS:
        ids = ours.encode(text, parse_special=True)
        for skip in (True, False):
            stream = ours.stream(skip_special=skip)
            pieces = [*map(stream.feed, ids), stream.flush()]
            assert "".join(pieces) == ours.decode(ids, skip_special=skip), text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_stream_of_any_ids_equals_decode(kind: str, data: st.DataObject) -> None:
    """Random ids make invalid bytes of every sort, also in the middle of a character."""
    ours = tokenizer(kind)
    # Half of the draws from the low ids, where SentencePiece keeps its special tokens and bytes.
    token = st.integers(0, 270) | st.integers(0, ours.vocabulary_size + 3)
    ids = data.draw(st.lists(token, max_size=24))
    skip = data.draw(st.booleans())
    stream = ours.stream(skip_special=skip)
    pieces = [*map(stream.feed, ids), stream.flush()]
    assert "".join(pieces) == ours.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(raw=st.binary(max_size=24))
@settings(max_examples=40, deadline=None)
def test_stream_of_any_bytes_equals_decode(kind: str, raw: bytes) -> None:
    ours = tokenizer(kind)
    names = {byte: char for char, byte in byte_alphabet().items()}
    spell = names.__getitem__ if kind in BYTE_LEVEL_KINDS else "<0x{:02X}>".format
    ids = [token for byte in raw if (token := ours.token_id(spell(byte))) is not None]
    assert len(ids) == len(raw)
    stream = ours.stream()
    assert "".join([*map(stream.feed, ids), stream.flush()]) == ours.decode(ids)
    assert b"".join(map(ours.token_bytes, ids)) == raw


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_stream_never_shows_half_a_character(kind: str, text: str) -> None:
    ours = tokenizer(kind)
    stream = ours.stream()
    ids = ours.encode(text.replace("\ufffd", ""))
    assert "\ufffd" not in "".join([*map(stream.feed, ids), stream.flush()])


@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_stream_shows_a_character_with_its_last_byte(kind: str) -> None:
    ours = tokenizer(kind)
    names = {byte: char for char, byte in byte_alphabet().items()}
    stream = ours.stream()
    pieces = [stream.feed(ours.token_id(names[byte]) or 0) for byte in "é👍".encode()]
    assert pieces == ["", "é", "", "", "", "👍"]
    assert stream.flush() == ""


def test_stream_strips_the_leading_space_once() -> None:
    ours = tokenizer("llama")
    space = ours.token_id("▁")
    assert space is not None
    stream = ours.stream()
    assert [stream.feed(space), stream.feed(space), stream.flush()] == ["", " ", ""]


def test_token_bytes_join_to_the_text() -> None:
    for kind in KINDS:
        ours = tokenizer(kind)
        for text in CORPUS:
            joined = b"".join(map(ours.token_bytes, ours.encode(text, add_special=False)))
            assert ours.decode(ours.encode(text, add_special=False)) in joined.decode()


def test_ids_without_a_token_are_silent_and_negative_ids_refused() -> None:
    ours = tokenizer("smollm")
    beyond = ours.vocabulary_size + 5
    assert ours.decode([beyond]) == ours.stream().feed(beyond) == ""
    assert ours.token_bytes(beyond) == b""
    for call in (lambda: ours.decode([-1]), lambda: ours.token_bytes(-1)):
        with pytest.raises(ShapeError, match="token id -1: wanted 0 to 480"):
            call()


def test_byte_alphabet_equals_tokenizers() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def _with(kind: str, **changes: Any) -> TokenizerFiles:
    return dataclasses.replace(files(kind), **changes)


def _edited(kind: str, **changes: Any) -> TokenizerFiles:
    return _with(kind, tokenizer_json=json.dumps(json.loads(files(kind).tokenizer_json) | changes))


@pytest.mark.parametrize(
    ("generation", "want"),
    [
        ({}, (0, 2)),  # <|endoftext|>, <|im_end|>
        ({"eos_token_id": 1}, (1, 2)),  # and tokenizer_config's own <|im_end|>
        ({"eos_token_id": [1, 5]}, (1, 2, 5)),
        ({"eos_token_id": None}, (0, 2)),
    ],
)
def test_end_ids(generation: dict[str, Any], want: tuple[int, ...]) -> None:
    assert Tokenizer.from_files(_with("smollm", generation_config=generation)).eos_ids == want


@pytest.mark.parametrize("bad", [481, -1, "2", True, [0, 999]])
def test_end_ids_outside_the_vocabulary_are_refused(bad: Any) -> None:
    with pytest.raises(FormatError, match=r"eos_token_id is .*, wanted ids from 0 to 480"):
        Tokenizer.from_files(_with("smollm", generation_config={"eos_token_id": bad}))


def test_bos_falls_back_to_the_generation_config() -> None:
    made = _with("smollm", tokenizer_config={}, generation_config={"bos_token_id": 1})
    assert Tokenizer.from_files(made).bos_id == 1
    assert Tokenizer.from_files(_with("smollm", tokenizer_config={})).bos_id is None


def test_saved_truncation_and_padding_do_not_apply() -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    made = Tokenizer.from_files(_edited("smollm", truncation=cut, padding=pad))
    assert made.encode("a b c d") == tokenizer("smollm").encode("a b c d")
    assert len(made.encode("a")) == 1


def test_add_bos_token_of_the_config_is_ignored_like_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**files("smollm").tokenizer_config, "add_bos_token": True, "add_eos_token": True}
    (tmp_path / "tokenizer.json").write_text(files("smollm").tokenizer_json, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_files(_with("smollm", tokenizer_config=config))
    assert ours.encode("a") == theirs("a")["input_ids"] == tokenizer("smollm").encode("a")


def test_token_that_only_the_config_calls_special_is_special(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        **files("smollm").tokenizer_config,
        "pad_token": {"content": "<think>", "lstrip": False},
        "additional_special_tokens": ["the"],
    }
    (tmp_path / "tokenizer.json").write_text(files("smollm").tokenizer_json, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<think>"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_files(_with("smollm", tokenizer_config=config))
    for text in ("in the<think> there", "<think>"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_switches_of_added_tokens_in_the_config_win_like_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    switches = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
    listed = {"480": {"content": "<think>", "special": True, **switches}}
    config = {**files("smollm").tokenizer_config, "added_tokens_decoder": listed}
    (tmp_path / "tokenizer.json").write_text(files("smollm").tokenizer_json, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_files(_with("smollm", tokenizer_config=config))
    for text in ("a <think>  b", "<think>"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert len(ours.encode("a <think>  b", parse_special=True)) == 3


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("value", ["<nowhere>", {"content": "<nowhere>"}])
def test_special_token_that_the_vocabulary_lacks_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"{key} is '<nowhere>', which the vocabulary .* lacks"):
        Tokenizer.from_files(_with("smollm", tokenizer_config={key: value}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": 3}, "bos_token is 3, wanted a token's text"),
        ({"bos_token": "\ud800"}, r"bos_token is '.ud800', wanted a token's text"),
        ({"extra_special_tokens": 3}, "extra_special_tokens is 3, wanted a list"),
        (
            {"added_tokens_decoder": {"480": {"content": "<think>", "lstrip": 1}}},
            "lstrip is 1, wanted true or false",
        ),
        ({"added_tokens_decoder": ["<x>"]}, "added_tokens_decoder is a list, wanted a map"),
        ({"added_tokens_decoder": {"480": {"content": "<x>"}}}, r"gives it None"),
        ({"added_tokens_decoder": {"3": {"content": "<think>"}}}, r"\[3\] is .* gives it 480"),
        ({"bos_token": {"text": "x"}}, "wanted a token's text or an object with its content"),
        ({"additional_special_tokens": ["<x>"]}, r"additional_special_tokens\[0\] is '<x>'"),
    ],
)
def test_config_that_is_wrong_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_files(_with("smollm", tokenizer_config=config))


_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_MODEL = '"model":{"type":"BPE","vocab":{"a":0},"merges":[]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value"),
        ('{"model": ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "found a list, wanted an object"),
        ("{}", "Model missing"),
        ('{"model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}', "`b` out of vocabulary"),
        ('{"model":{"type":"Unigram","vocab":[],"unk_id":3}}', "EmptyVocabulary"),
        (
            '{"version":"1.0","added_tokens":['
            + json.dumps({"id": 7, "content": "<s>", "special": True, **_ADDED})
            + "],"
            + _MODEL
            + "}",
            "'<s>' has id 7, but the vocabulary gives it 1",
        ),
        (
            '{"version":"1.0",' + _MODEL + ',"post_processor":{"type":"TemplateProcessing",'
            '"single":[{"SpecialToken":{"id":"<x>","type_id":0}}],"pair":[],"special_tokens":{}}}',
            "adds '<x>' without defining it",
        ),
    ],
)
def test_text_that_is_not_a_tokenizer_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        Tokenizer.from_files(TokenizerFiles(text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("decoder", "error"),
    [
        (None, UnsupportedError),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, UnsupportedError),
        ({"type": "Sequence", "decoders": [{"type": "CTC"}]}, UnsupportedError),
        ({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}, UnsupportedError),
        ({"type": "Strip", "content": " ", "start": 1, "stop": 1}, UnsupportedError),
        ({"type": "Replace"}, FormatError),
        ({"type": "Metaspace"}, FormatError),
        ({"type": "Sequence", "decoders": [3]}, FormatError),
        ({"type": "Replace", "pattern": {"String": ""}, "content": "x"}, UnsupportedError),
        ({}, FormatError),
        (["ByteLevel"], FormatError),
    ],
)
def test_decoder_that_cannot_be_followed_is_refused(decoder: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"tokenizer\.json: "):
        DecoderPlan.from_json(decoder)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_decoder_streams_like_decode(scheme: str) -> None:
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    ours = Tokenizer.from_files(_edited("llama", decoder=decoder))
    for text in CORPUS:
        ids = ours.encode(text, add_special=False)
        stream = ours.stream()
        assert "".join([*map(stream.feed, ids), stream.flush()]) == ours.decode(ids)


def test_replacement_comes_before_byte_fallback() -> None:
    """As in the library: a replacement may make a byte token, or unmake one."""
    steps = [
        {"type": "Replace", "pattern": {"String": "C3"}, "content": "41"},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoder = {"type": "Sequence", "decoders": steps}
    ours = Tokenizer.from_files(_edited("llama", decoder=decoder))
    token = ours.token_id("<0xC3>")
    assert token is not None
    stream = ours.stream()
    assert stream.feed(token) + stream.flush() == ours.decode([token]) == "A"
    assert ours.token_bytes(token) == b"A"


def test_prefix_that_aborts_the_library_is_refused() -> None:
    """tokenizers 0.23.3 slices each merge by it: "x" kills the process, "<s>" panics."""
    model = json.loads(files("qwen2").tokenizer_json)["model"]
    for prefix in ("x", "<s>"):
        made = _edited("qwen2", model={**model, "continuing_subword_prefix": prefix})
        with pytest.raises(UnsupportedError, match=f"continuing_subword_prefix is '{prefix}'"):
            Tokenizer.from_files(made)


_JUNK = st.sampled_from([None, True, -1, 0, 2**70, 1e300, "", "x", "<s>", [], {}, ["a"], {"a": 1}])


@pytest.mark.parametrize("kind", ["llama-bpe", "llama"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_edit_of_a_tokenizer_is_a_tokenizer_or_an_error(kind: str, data: st.DataObject) -> None:
    spec = json.loads(files(kind).tokenizer_json)
    node: Any = spec
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(min(len(node), 5))
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.integers(0, 3)) == 0:
            node[key] = data.draw(_JUNK)
            break
        node = inner
    try:
        ours = Tokenizer.from_files(_with(kind, tokenizer_json=json.dumps(spec)))
    except EluteError:
        return  # any other exception fails the test
    ids = ours.encode("Hello wörld <think> 12", parse_special=True)
    stream = ours.stream()
    assert "".join([*map(stream.feed, ids), stream.flush()]) == ours.decode(ids)


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(FormatError, match="character 1 is the lone surrogate U\\+D800"):
        tokenizer("smollm").encode("a\ud800b")


AWKWARD_TOKENS = [
    '"',
    "\\",
    "{",
    "}",
    "[",
    "]",
    "vocab",
    "merges",
    '"vocab',
    '"vocab": {',
    '\\"merges": [',
    "é\n",
]


@pytest.mark.parametrize("kind", ["bpe, pairs", "bpe, lines", "unigram", "deeper than any file"])
@pytest.mark.parametrize("indent", [None, 2])
def test_settings_are_those_of_the_whole_file(kind: str, indent: int | None) -> None:
    model: dict[str, Any] = {
        "bpe, pairs": {
            "vocab": {token: i for i, token in enumerate(AWKWARD_TOKENS)},
            "merges": [[token, "x"] for token in AWKWARD_TOKENS],
        },
        "bpe, lines": {"vocab": {}, "merges": [f"{token} x" for token in AWKWARD_TOKENS]},
        "unigram": {"vocab": [[token, -0.5] for token in AWKWARD_TOKENS]},
        "deeper than any file": {"vocab": [[[token]] for token in AWKWARD_TOKENS]},
    }[kind]
    awkward_keys = set(AWKWARD_TOKENS) - {"vocab", "merges"}
    spec = {
        "added_tokens": [{"content": token, "id": 3} for token in AWKWARD_TOKENS],
        "model": {"type": "x", **model, "unk_token": '"merges": ['},
        "post_processor": {"special_tokens": {token: {"ids": [1]} for token in awkward_keys}},
    }
    for ascii_only in (True, False):
        text = json.dumps(spec, indent=indent, ensure_ascii=ascii_only)
        found = _settings(text)
        left_out = dict.fromkeys(model) if kind != "deeper than any file" else model
        assert found == spec | {"model": {**spec["model"], **left_out}}


def test_a_vocabulary_that_is_not_json_is_refused() -> None:
    text = files("smollm").tokenizer_json
    at = text.index('"vocab"') + len('"vocab": {')
    with pytest.raises(FormatError, match=r"tokenizer\.json: .*; fetch the file again"):
        Tokenizer.from_files(_with("smollm", tokenizer_json=text[:at] + '"a" 0, ' + text[at:]))


def test_a_mistake_behind_the_vocabulary_is_told_with_its_place() -> None:
    text = files("smollm").tokenizer_json[:-1] + ",}"
    with pytest.raises(FormatError, match=rf"not JSON: .*\(char {len(text) - 1}\)"):
        Tokenizer.from_files(_with("smollm", tokenizer_json=text))


def test_looking_a_token_up_does_not_ask_for_the_whole_vocabulary() -> None:
    made = Tokenizer.from_files(files("smollm"))
    assert made.decode(made.encode("a b")) == "a b"
    assert "vocabulary_size" not in made.__dict__  # 0.2 s for 256k tokens
