import shutil
from collections import Counter

import gguf
import numpy as np
import pytest
from test_random_weights import TINY

from elute.bench import random_gguf as module
from elute.bench.random_gguf import (
    FILE_TYPES,
    HALVES,
    file_type_of,
    fitting,
    random_blocks,
    random_gguf,
    tensor_type,
)
from elute.bench.shapes import shape_config
from elute.errors import BudgetError, EluteError, UnsupportedError

LAYER = "model.layers.3.self_attn."
WIDE = {**TINY, "hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize("ggml_type", HALVES)
def test_random_blocks_are_finite_weights(ggml_type):
    blocks = random_blocks(ggml_type, 1024, np.random.default_rng(0))
    weights = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[ggml_type])
    assert np.isfinite(weights).all()
    assert 0 < np.abs(weights).max() <= 2
    assert len(np.unique(blocks)) == 256


@pytest.mark.parametrize(
    ("file_type", "name", "tied", "n_gqa", "wanted"),
    [
        ("Q4_0", LAYER + "q_proj.weight", False, 1, "Q4_0"),
        ("Q4_0", "lm_head.weight", False, 1, "Q6_K"),
        ("Q4_0", "model.embed_tokens.weight", False, 1, "Q4_0"),
        ("Q4_0", "model.embed_tokens.weight", True, 1, "Q6_K"),
        ("Q8_0", "lm_head.weight", False, 1, "Q8_0"),
        ("TQ2_0", "model.embed_tokens.weight", False, 1, "Q4_K"),
        ("TQ2_0", "lm_head.weight", False, 1, "Q6_K"),
        ("Q2_K", LAYER + "v_proj.weight", False, 1, "Q3_K"),
        ("Q2_K", LAYER + "v_proj.weight", False, 4, "Q4_K"),
        ("Q2_K", LAYER + "o_proj.weight", False, 4, "Q3_K"),
        ("Q2_K", LAYER + "k_proj.weight", False, 4, "Q2_K"),
        ("Q2_K", "model.layers.3.mlp.down_proj.weight", False, 4, "Q3_K"),
        ("Q3_K_S", "model.layers.3.mlp.down_proj.weight", False, 4, "Q3_K"),
    ],
)
def test_tensor_types_are_llama_quantizes(file_type, name, tied, n_gqa, wanted):
    assert tensor_type(file_type, name, tied=tied, n_gqa=n_gqa) == wanted


def test_rows_that_blocks_do_not_divide_get_a_smaller_block():
    assert fitting("Q2_K", 512) == "Q2_K"
    assert fitting("Q2_K", 576) == "Q4_0"
    assert fitting("Q6_K", 576) == "Q8_0"
    assert fitting("Q4_0", 576) == "Q4_0"


@pytest.mark.parametrize(
    ("file_type", "gigabytes"), [("Q4_0", 3.92), ("Q2_K", 2.61), ("TQ2_0", 1.95), ("TQ1_0", 1.65)]
)
def test_files_are_as_large_as_llama_quantizes(file_type, gigabytes):
    config = shape_config("llama-2-7b", vocabulary=49152)
    assert round(module._Plan(config, file_type).n_bytes / 1e9, 2) == gigabytes


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_file_is_whole_and_reads_back(tmp_path, file_type):
    seen = []
    made = random_gguf("wide", WIDE, file_type, tmp_path, progress=lambda *at: seen.append(at))
    reader = gguf.GGUFReader(made.path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 + 9 * 2
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [512, 256]
    assert tensors["token_embd.weight"].tensor_type.name in ("Q6_K", "Q8_0")
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    assert kinds[FILE_TYPES[file_type]] >= 8
    assert seen[-1][0] == seen[-1][1] == sum(int(t.n_bytes) for t in reader.tensors)
    assert (made.made, made.stand_ins, made.n_bytes) == (True, 0, made.path.stat().st_size)
    again = random_gguf("wide", WIDE, file_type, tmp_path)
    assert (again.path, again.made) == (made.path, False)


def test_stand_ins_are_counted(tmp_path):
    made = random_gguf("narrow", {**TINY, "tie_word_embeddings": False}, "Q2_K", tmp_path)
    assert made.stand_ins == 2 + 7 * 2
    assert random_gguf("narrow", TINY, "Q4_0", tmp_path).stand_ins == 1  # Q6_K of the head


def test_bitnet_has_its_own_norms(tmp_path):
    config = {**WIDE, "model_type": "bitnet"}
    tensors = gguf.GGUFReader(random_gguf("bitnet", config, "TQ2_0", tmp_path).path).tensors
    names = {tensor.name for tensor in tensors}
    assert {"blk.0.attn_sub_norm.weight", "blk.1.ffn_sub_norm.weight"} <= names


def test_biases_are_there_and_zero(tmp_path):
    config = {**WIDE, "model_type": "qwen2"}
    tensors = gguf.GGUFReader(random_gguf("qwen2", config, "Q4_0", tmp_path).path).tensors
    biases = [tensor for tensor in tensors if tensor.name.endswith(".bias")]
    assert len(biases) == 3 * 2
    assert not any(tensor.data.any() for tensor in biases)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    class Usage:
        free = 300 << 20

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(BudgetError, match="takes 3647 MiB, but 44 MiB can be used"):
        random_gguf("7b", shape_config("llama-2-7b"), "Q4_0", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(EluteError, match="cannot be written \\(Input/output error\\)"):
        random_gguf("tiny", TINY, "Q4_0", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_widths_have_a_type_or_a_sentence():
    assert [file_type_of(bits) for bits in (2, 3, 4, 8, None)] == [
        "Q2_K", "Q3_K_S", "Q4_0", "Q8_0", "TQ2_0",
    ]  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"found 7 bits.*--versus-type: Q4_0"):
        file_type_of(7)


def test_experts_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="found olmoe-1b-7b, a model of experts"):
        random_gguf("olmoe-1b-7b", shape_config("olmoe-1b-7b"), "Q4_0", tmp_path)
