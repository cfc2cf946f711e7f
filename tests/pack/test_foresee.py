"""What a plan foresees from headers is what packing gives: records, files and bytes, with ==."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from folders import write_folder
from gguf import GGMLQuantizationType as T
from gguf_files import VOCAB, random_weights, to_gguf, write_gguf
from hub_server import serving
from memory_checkpoint import MemoryCheckpoint
from test_awq import awq_tensors
from test_bitnet import packed_tensors
from test_gptq import gptq_tensors
from tiny_folder import save_tiny_folder

from elute.errors import EluteError, FormatError, ShapeError, UnsupportedError
from elute.formats import open_checkpoint, sources
from elute.formats.gguf import GgufCheckpoint
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.pack.convert import convert
from elute.pack.foresee import foresee
from elute.quantize.recipe import Recipe
from elute.runtime.store import foresee_packed, open_packed

RECIPES = {
    "default": Recipe.default(),
    "two bits in rows": Recipe.default(bits=2, group_size=None),
    "one bit": Recipe.default(bits=1),
    "asymmetric": Recipe.from_json(
        {"bits": 3, "group_size": 64, "scheme": "asymmetric"}, where="r"
    ),
    "ternary": Recipe.from_json({"scheme": "ternary", "group_size": "row"}, where="r"),
    "again": Recipe.from_json({"bits": 5, "requantize": True}, where="r"),
}
MERGES = {
    "tokenizer.ggml.tokens": ["t", "0", *(f"t{i}" for i in range(VOCAB - 2))],
    "tokenizer.ggml.merges": ["t 0"],
    "tokenizer.ggml.pre": "gpt-2",
}
CODE_TYPES = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.F16, T.BF16, T.F32]


def compare(checkpoint, tmp_path, recipe, *, tensors=None, shard_bytes=4_000_000_000):
    if not isinstance(checkpoint, GgufCheckpoint):
        (Path(checkpoint.source) / "tokenizer.json").write_text("{}")
    packed = convert(
        checkpoint, tmp_path / "packed", recipe, tensors=tensors, max_shard_bytes=shard_bytes
    )
    found = foresee(checkpoint, recipe, tensors=packed.names, max_shard_bytes=shard_bytes)
    assert dict(found.records) == dict(packed.records)
    assert found.nbytes == packed.nbytes
    assert found.bits_per_weight == packed.bits_per_weight
    for name in packed.names:
        assert found.column_order(name) == packed.column_order(name)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", CODE_TYPES)
def test_gguf(tmp_path, kind, recipe):
    weights = random_weights("llama")
    types = {to_gguf("llama", n, w)[0]: kind for n, w in weights.items() if w.ndim == 2}
    path = write_gguf(tmp_path / "m.gguf", weights=weights, types=types, keys=MERGES)
    checkpoint = open_checkpoint(path)
    ops = op_list(checkpoint.config)
    compare(checkpoint, tmp_path, RECIPES[recipe], tensors=(*ops.matrices(), *ops.vectors()))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shard_bytes", [60_000, 4_000_000_000])
def test_a_float_folder_in_one_file_and_in_several(tmp_path, recipe, shard_bytes):
    checkpoint = open_checkpoint(save_tiny_folder(tmp_path / "model"))
    ops = op_list(checkpoint.config)
    names = (*ops.matrices(), *ops.vectors())
    found = compare(checkpoint, tmp_path, RECIPES[recipe], tensors=names, shard_bytes=shard_bytes)
    assert (len({r.file for r in found.records.values()}) > 1) == (shard_bytes == 60_000)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("g_idx", ["plain", "act_order", "whole_groups", "absent"])
@pytest.mark.parametrize("recipe", ["default", "again"])
def test_gptq(tmp_path, bits, symmetric, g_idx, recipe):
    rng = np.random.default_rng(bits)
    tensors, _, _ = gptq_tensors(rng, 64, 256, bits, 64, symmetric=symmetric, g_idx=g_idx)
    act_order = g_idx in ("act_order", "whole_groups")
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 64, "sym": symmetric}
    quantization = {**settings, "desc_act": act_order}
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors, quantization=quantization))
    compare(checkpoint, tmp_path, RECIPES[recipe])
    if g_idx != "whole_groups":  # only g_idx itself tells that act-order moved groups as a whole
        names = checkpoint.names()
        by_config = foresee(checkpoint, RECIPES[recipe], tensors=names, headers_only=True)
        assert by_config.records == foresee(checkpoint, RECIPES[recipe], tensors=names).records


@pytest.mark.parametrize("zero", [None, 8])
def test_awq(tmp_path, zero):
    tensors = awq_tensors(np.random.default_rng(0), 64, 256, 64, zero=zero)[0]
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    quantization["zero_point"] = zero is None
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors, quantization=quantization))
    compare(checkpoint, tmp_path, Recipe.default())
    by_config = foresee(checkpoint, Recipe.default(), tensors=checkpoint.names(), headers_only=True)
    assert by_config.records == PackedModel.open(tmp_path / "packed").records


def test_bitnet(tmp_path):
    weights = np.random.default_rng(0).integers(-1, 2, (64, 128)).astype(np.int8)
    tensors = packed_tensors(weights, 0.5)
    quantization = {"quant_method": "bitnet", "linear_class": "bitlinear"}
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors, quantization=quantization))
    compare(checkpoint, tmp_path, Recipe.default())


def test_default(default_gguf, tmp_path):
    checkpoint = open_checkpoint(default_gguf)
    ops = op_list(checkpoint.config)
    compare(checkpoint, tmp_path, Recipe.default(), tensors=(*ops.matrices(), *ops.vectors()))


@pytest.mark.parametrize(
    ("shape", "recipe", "error"),
    [
        ((8, 2, 4), "default", UnsupportedError),
        ((8, 6), "default", ShapeError),
        ((8, 64), {"scheme": "keep"}, UnsupportedError),
    ],
)
def test_what_packing_refuses_is_foreseen(tmp_path, shape, recipe, error):
    checkpoint = MemoryCheckpoint({"w": np.ones(shape, np.float32)})
    chosen = RECIPES[recipe] if isinstance(recipe, str) else Recipe.from_json(recipe, where="r")
    with pytest.raises(error) as packing:
        convert(checkpoint, tmp_path / "packed", chosen, tensors=["w"])
    with pytest.raises(error) as foreseeing:
        foresee(checkpoint, chosen, tensors=["w"])
    assert str(foreseeing.value) == str(packing.value)


# The hub: headers alone are fetched.

PADDING = 3 << 20  # bytes of a tensor that no model uses, so that weights outweigh headers


@pytest.fixture
def hub(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder = save_tiny_folder(tmp_path / "source")
    with serving() as hub:
        hub.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        hub.files["model.safetensors"] = padded(hub.files["model.safetensors"])
        weights = random_weights("llama")
        types = {to_gguf("llama", n, w)[0]: T.Q8_0 for n, w in weights.items() if w.ndim == 2}
        written = write_gguf(tmp_path / "m.gguf", weights=weights, types=types, keys=MERGES)
        hub.files["q/m.gguf"] = written.read_bytes() + bytes(PADDING)
        yield hub


def padded(body):
    (header_bytes,) = struct.unpack_from("<Q", body)
    header = json.loads(body[8 : 8 + header_bytes])
    end = len(body) - 8 - header_bytes
    header["unused"] = {"dtype": "U8", "shape": [PADDING], "data_offsets": [end, end + PADDING]}
    told = json.dumps(header).encode()
    return struct.pack("<Q", len(told)) + told + body[8 + header_bytes :] + bytes(PADDING)


def from_hub(hub, tmp_path, model, **more):
    return foresee_packed(
        model, cache_dir=tmp_path / "cache", hub_cache=tmp_path / "hub", endpoint=hub.url, **more
    )


@pytest.mark.parametrize("bits", [None, 2])
@pytest.mark.parametrize("model", ["owner/repo", "owner/repo:q/m.gguf"])
def test_a_repository_is_foreseen_from_a_few_kilobytes(hub, tmp_path, monkeypatch, model, bits):
    found = from_hub(hub, tmp_path, model, bits=bits)
    assert found.source == model
    limit = 1 << 20 if model.endswith("gguf") else 80_000
    assert hub.sent_bytes <= limit < PADDING
    assert "tokenizer.json" not in {path.rpartition("/")[2] for _, path, _ in hub.requests}
    assert not (tmp_path / "hub").exists()
    # Whole, as if it had been downloaded:
    local = tmp_path / "whole"
    if model.endswith("gguf"):
        local = tmp_path / "m.gguf"
    else:
        local.mkdir()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (local / name).write_bytes(hub.files[name])
    packed = open_packed(str(local), bits=bits, cache_dir=tmp_path / "cache")
    assert dict(found.records) == dict(packed.records)


def test_a_long_header_takes_a_second_range(hub, tmp_path):
    body = hub.files["model.safetensors"]
    (header_bytes,) = struct.unpack_from("<Q", body)
    told = body[8 : 8 + header_bytes].ljust(200_000)
    hub.files["model.safetensors"] = struct.pack("<Q", len(told)) + told + body[8 + header_bytes :]
    from_hub(hub, tmp_path, "owner/repo")
    assert hub.gets("model.safetensors") == ["bytes=0-65535", "bytes=65536-200007"]


def test_an_index_names_the_files_that_count(hub, tmp_path):
    body = hub.files.pop("model.safetensors")
    (header_bytes,) = struct.unpack_from("<Q", body)
    names = [name for name in json.loads(body[8 : 8 + header_bytes]) if name != "__metadata__"]
    hub.files["model-00001-of-00001.safetensors"] = body
    hub.files["copy.safetensors"] = b"not to be asked for"
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert from_hub(hub, tmp_path, "owner/repo").nbytes > 0
    assert hub.gets("copy.safetensors") == []


def test_what_is_in_the_hub_cache_is_not_asked_for(hub, tmp_path):
    sources.resolve("owner/repo", hub_cache=tmp_path / "hub", endpoint=hub.url)
    hub.requests.clear()
    found = from_hub(hub, tmp_path, "owner/repo")
    assert found.nbytes > 0
    assert hub.requests == []


def test_an_unknown_family_is_the_error_of_converting(hub, tmp_path):
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps({**config, "model_type": "mamba"}).encode()
    with pytest.raises(UnsupportedError, match=r"model_type is .mamba.") as foreseen:
        from_hub(hub, tmp_path, "owner/repo")
    assert "elute-headers" not in str(foreseen.value)
    local = tmp_path / "source"
    (local / "config.json").write_bytes(hub.files["config.json"])
    for attempt in (open_packed, foresee_packed):
        with pytest.raises(UnsupportedError) as error:
            attempt(str(local), cache_dir=tmp_path / "cache")
        assert str(error.value) == str(foreseen.value)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("owner/other", EluteError, "owner/other: the hub has no such repository"),
        ("owner/repo:none.gguf", EluteError, "the repository has no file none.gguf"),
        ("owner/repo@v9", EluteError, "the repository has no such revision"),
        ("nowhere", FormatError, "nowhere: no such file or folder"),
        ("default", EluteError, r"default: is not here yet, and .* \(98 MB\); run elute convert"),
    ],
)
def test_what_cannot_be_foreseen_is_one_sentence(hub, tmp_path, model, error, message):
    with pytest.raises(error, match=message):
        from_hub(hub, tmp_path, model)


def test_a_broken_header_names_the_repository(hub, tmp_path):
    hub.files["model.safetensors"] = struct.pack("<Q", 50) + b"{" * 50
    with pytest.raises(FormatError, match=r"^owner/repo/model.safetensors: found invalid JSON"):
        from_hub(hub, tmp_path, "owner/repo")
    hub.files["q/m.gguf"] = b"GGUX" + bytes(100)
    with pytest.raises(FormatError, match=r"^owner/repo:q/m.gguf: offset 0: found magic"):
        from_hub(hub, tmp_path, "owner/repo:q/m.gguf")


def test_a_packed_folder_is_opened_and_not_packed_otherwise(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    assert not isinstance(foresee_packed(str(folder), cache_dir=tmp_path / "c"), PackedModel)
    packed = open_packed(str(folder), cache_dir=tmp_path / "c")
    shutil.copytree(packed.path, tmp_path / "p")
    for model in (folder, tmp_path / "p"):
        assert isinstance(foresee_packed(str(model), cache_dir=tmp_path / "c"), PackedModel)
    with pytest.raises(UnsupportedError, match="is packed already and cannot be packed otherwise"):
        foresee_packed(str(tmp_path / "p"), bits=3, cache_dir=tmp_path / "c")
