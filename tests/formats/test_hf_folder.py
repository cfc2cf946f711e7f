"""Hugging Face folders: shards, wrappers, tokenizer files, and what is refused."""

import json
import logging

import ml_dtypes
import numpy as np
import pytest
from folders import write_folder
from safetensors.numpy import save_file

from elute.errors import FormatError, UnsupportedError
from elute.formats import open_checkpoint
from elute.formats.hf_folder import INDEX_NAME, HfFolder, read_tokenizer_files

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def tensors_of(*names):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((4, 2)).astype(np.float32) for name in names}


def write_shards(path, shards, weight_map=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    for file, tensors in shards.items():
        save_file(tensors, path / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_a_single_file_is_read_as_stored(tmp_path):
    tensors = {
        **tensors_of(EMBED),
        "model.half": np.ones(3, np.float16),
        "model.brain": np.ones(3, ml_dtypes.bfloat16),
        "model.double": np.ones(3, np.float64),
    }
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors))
    assert isinstance(checkpoint, HfFolder)
    assert checkpoint.source == str(tmp_path)
    assert checkpoint.config["model_type"] == "llama"
    assert set(checkpoint.names()) == set(tensors)
    assert checkpoint.shape(EMBED) == (4, 2)
    for name, want in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), want)
    assert checkpoint.read("model.brain").dtype == ml_dtypes.bfloat16
    assert checkpoint.read("model.double").dtype == np.float32


def test_shards_are_joined(tmp_path):
    first, second = tensors_of(EMBED), tensors_of(NORM)
    write_shards(tmp_path, {"a-00001.safetensors": first, "a-00002.safetensors": second})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == {EMBED, NORM}
    np.testing.assert_array_equal(checkpoint.read(NORM), second[NORM])


def test_shards_may_be_links_out_of_the_folder(tmp_path):
    """The hub cache keeps snapshots as links to blobs."""
    save_file(tensors_of(EMBED), tmp_path / "blob")
    folder = write_shards(tmp_path / "m", {}, {EMBED: "model-1.safetensors"})
    (folder / "model-1.safetensors").symlink_to(tmp_path / "blob")
    assert open_checkpoint(folder).names() == (EMBED,)


def test_all_missing_shards_are_named(tmp_path):
    write_shards(
        tmp_path,
        {"s1.safetensors": tensors_of(EMBED)},
        {EMBED: "s1.safetensors", "b": "s2.safetensors", "c": "s3.safetensors"},
    )
    with pytest.raises(FormatError, match=r"2 of 3 shards are missing: s2\.\w+, s3\.\w+;"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\\b",
        "c:x",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 256,
    ],
)
def test_an_index_cannot_reach_outside_its_folder(tmp_path, shard):
    write_shards(tmp_path, {}, {EMBED: shard})
    with pytest.raises(FormatError, match="wanted a file name in this folder"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    write_shards(
        tmp_path,
        {"s.safetensors": tensors_of(EMBED)},
        {EMBED: "s.safetensors", "w": "s.safetensors"},
    )
    with pytest.raises(FormatError, match="found no tensor 'w', which"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", ['{"weight_map": []}', "{}", '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_one_sentence(tmp_path, index):
    write_shards(tmp_path, {})
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(FormatError, match="wanted a weight_map"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], FormatError, "no weights, wanted model.safetensors"),
        (["pytorch_model.bin"], UnsupportedError, "only pickled weights"),
        (["pytorch_model-00001-of-00002.bin"], UnsupportedError, "only pickled weights"),
        (["consolidated.00.pth"], UnsupportedError, "only pickled weights"),
        (["model-1.safetensors", "model-2.safetensors"], FormatError, "2 safetensors files"),
        (["adapter_model.safetensors"], UnsupportedError, "only the adapter"),
    ],
)
def test_folders_without_usable_weights_say_what_to_do(tmp_path, files, error, message):
    (tmp_path / "config.json").write_text("{}")
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


def test_a_safetensors_file_of_another_name_is_found(tmp_path):
    write_folder(tmp_path, tensors_of(EMBED))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit.safetensors")
    assert open_checkpoint(tmp_path).names() == (EMBED,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "found a JSON list, wanted an object"),
        ("{", "invalid JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        (b"\xff", "not UTF-8"),
        ('{"quantization_config": 3}', "quantization_config that is a int"),
    ],
)
def test_a_malformed_config_is_one_sentence(tmp_path, config, message):
    write_folder(tmp_path, tensors_of(EMBED))
    data = config if isinstance(config, bytes) else config.encode()
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


def test_a_config_as_editors_and_python_write_it_is_read(tmp_path):
    write_folder(tmp_path, tensors_of(EMBED))
    text = '\ufeff{"model_type": "llama", "time_step_limit": [0.0, Infinity]}'
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert open_checkpoint(tmp_path).config["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_multimodal_wrapper_is_taken_off(tmp_path, prefix, caplog):
    head = "language_model.lm_head." if prefix.startswith("language_model") else "lm_head."
    tensors = tensors_of(
        f"{prefix}embed_tokens.weight",
        f"{prefix}layers.0.mlp.up_proj.weight",
        f"{head}weight",
        "vision_tower.patch.weight",
        "model.vision_tower.patch.weight",
        "multi_modal_projector.weight",
    )
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 8, "eos_token_id": 7},
        "vision_config": {"hidden_size": 9},
    }
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(write_folder(tmp_path, tensors, config))
    assert "3 other tensors are left out" in caplog.text
    assert dict(checkpoint.config) == {
        "model_type": "gemma3_text",
        "hidden_size": 8,
        "eos_token_id": 7,
    }
    assert set(checkpoint.names()) == {EMBED, "model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    np.testing.assert_array_equal(checkpoint.read(EMBED), tensors[f"{prefix}embed_tokens.weight"])


def test_a_gemma3_saved_by_transformers_has_the_names_of_its_text_model(tmp_path):
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    vision = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=28,
    )
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / INDEX_NAME).is_file()
    checkpoint = open_checkpoint(tmp_path)
    want = {f"model.{n}": p for n, p in model.model.language_model.named_parameters()}
    assert set(checkpoint.names()) == set(want)
    for name, parameter in want.items():
        np.testing.assert_array_equal(checkpoint.read(name), parameter.detach().numpy())
    assert checkpoint.config["model_type"] == "gemma3_text"


def test_base_model_names_gain_their_prefix(tmp_path):
    names = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight", "lm_head.weight")
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors_of(*names)))
    assert set(checkpoint.names()) == {
        EMBED,
        "model.layers.0.mlp.up_proj.weight",
        NORM,
        "lm_head.weight",
    }


def test_integers_and_unknown_names_are_refused(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, {"model.w": np.ones(2, np.int32)}))
    with pytest.raises(UnsupportedError, match=r"'model\.w' holds int32"):
        checkpoint.read("model.w")
    for call in (checkpoint.read, checkpoint.shape):
        with pytest.raises(FormatError, match="found no tensor 'nope' among 1"):
            call("nope")


@pytest.mark.parametrize(
    "method", ["compressed-tensors", "bitsandbytes", "fp8", "mxfp4", "hqq", "aqlm", None, 3]
)
def test_other_quantizations_are_refused_by_name(tmp_path, method):
    path = write_folder(tmp_path, tensors_of(EMBED), quantization={"quant_method": method, "x": 1})
    with pytest.raises(UnsupportedError, match=f"quant_method {method!r}, which elute does not"):
        open_checkpoint(path)


def test_the_old_key_of_compressed_tensors_is_known(tmp_path):
    config = {"compression_config": {"quant_method": "compressed-tensors"}}
    path = write_folder(tmp_path, tensors_of(EMBED), config)
    with pytest.raises(UnsupportedError, match="'compressed-tensors', which elute does not"):
        open_checkpoint(path)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"found no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match="no such file or folder"):
        open_checkpoint(tmp_path / "none")
    write_folder(tmp_path, tensors_of(EMBED))
    with pytest.raises(UnsupportedError, match="name its folder"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="name the folder"):
        open_checkpoint(tmp_path / "config.json")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match=r"wanted a \.gguf file"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "elute.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="already packed"):
        open_checkpoint(tmp_path)


def test_a_gguf_is_known_by_its_first_bytes(tmp_path):
    """Blobs of the hub cache have no suffix; what is cut off is the GGUF reader's to say."""
    (tmp_path / "blob").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="blob") as caught:
        open_checkpoint(tmp_path / "blob")
    assert "wanted a .gguf file or" not in str(caught.value)


def test_a_folder_of_ggufs_asks_for_one(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match=r"name one file, such as .*a\.gguf"):
        open_checkpoint(tmp_path)


def tokenizer_folder(path, **files):
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    for name, content in files.items():
        file = path / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_tokenizer_files_are_collected(tmp_path):
    tokenizer_folder(
        tmp_path,
        tokenizer_config__json={"eos_token": "</s>", "chat_template": "config"},
        generation_config__json={"temperature": 0.5},
    )
    files = read_tokenizer_files(tmp_path)
    assert files.tokenizer_json == '{"version": "1.0"}'
    assert files.tokenizer_config["eos_token"] == "</s>"
    assert files.generation_config == {"temperature": 0.5}
    assert files.chat_template == "config"


NAMED = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "named"}]


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, None),
        ({"tokenizer_config__json": {"chat_template": NAMED}}, "named"),
        ({"tokenizer_config__json": {"chat_template": NAMED[:1]}}, None),
        ({"chat_template__json": {"chat_template": "processor"}}, "processor"),
        (
            {"tokenizer_config__json": {"chat_template": "config"}, "chat_template__jinja": "file"},
            "file",
        ),
    ],
)
def test_the_chat_template_is_found_where_transformers_finds_it(tmp_path, files, want):
    assert read_tokenizer_files(tokenizer_folder(tmp_path, **files)).chat_template == want


@pytest.mark.parametrize(
    ("template", "message"), [(3, "is a int, wanted a string"), ([{"name": "x"}], "not unique")]
)
def test_a_malformed_chat_template_is_one_sentence(tmp_path, template, message):
    folder = tokenizer_folder(tmp_path, tokenizer_config__json={"chat_template": template})
    with pytest.raises(FormatError, match=message):
        read_tokenizer_files(folder)


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json", "tekken.json"])
def test_other_tokenizers_say_how_to_convert(tmp_path, file):
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=f"found {file} and no tokenizer.json; make one"):
        read_tokenizer_files(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"found no tokenizer\.json"):
        read_tokenizer_files(tmp_path)
