import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_gptq import MODULE, gptq_tensors, settings_of
from tiny_folder import save_tiny_folder

from elute.errors import NOTE, EluteError, FormatError, ShapeError, UnsupportedError
from elute.quantize.recipe import Recipe
from elute.runtime.store import (
    by_channel_folder,
    choose_recipe,
    disk_bytes,
    foresee_packed,
    is_packed,
    open_packed,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


def test_a_model_is_packed_once_for_each_recipe(folder, tmp_path):
    stages = []
    first = open_packed(
        str(folder), cache_dir=tmp_path, progress=lambda *stage: stages.append(stage)
    )
    assert is_packed(first.path)
    assert first.path.parent == tmp_path / "packed"
    assert stages[-1][0] == "convert"
    assert stages[-1][1] == stages[-1][2]
    stages.clear()
    again = open_packed(str(folder), cache_dir=tmp_path, progress=lambda *s: stages.append(s))
    assert again.path == first.path
    assert stages == []
    other = open_packed(str(folder), bits=2, cache_dir=tmp_path)
    assert other.path != first.path
    assert other.bits_per_weight < first.bits_per_weight


def test_a_changed_source_is_packed_again(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    first = open_packed(str(folder), cache_dir=tmp_path / "cache")
    save_tiny_folder(folder, seed=1)
    assert open_packed(str(folder), cache_dir=tmp_path / "cache").path != first.path


def test_a_packed_folder_is_opened_as_it_is_and_not_packed_otherwise(folder, tmp_path):
    packed = open_packed(str(folder), cache_dir=tmp_path)
    assert open_packed(str(packed.path), cache_dir=tmp_path).path == packed.path
    with pytest.raises(UnsupportedError, match="is packed already"):
        open_packed(str(packed.path), bits=3, cache_dir=tmp_path)


def test_bits_ask_for_requantizing_and_the_default_keeps_codes():
    assert choose_recipe(3, None).requantize
    assert not choose_recipe(None, None).requantize
    with pytest.raises(UnsupportedError, match="bits=3 beside a recipe"):
        choose_recipe(3, Recipe.default())


def test_a_recipe_file_is_read(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"bits": 3, "group_size": 32}))
    assert choose_recipe(None, file).rule_for("x").bits == 3


def test_an_unknown_architecture_is_refused_before_any_work(folder, tmp_path):
    other = save_tiny_folder(tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UnsupportedError, match="mamba"):
        open_packed(str(other), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_tensors_and_tokenizers_that_do_not_fit_are_refused_before_any_work(tmp_path):
    source, cache = save_tiny_folder(tmp_path / "model"), tmp_path / "cache"
    good = (source / "config.json").read_text()
    (source / "config.json").write_text(json.dumps({**json.loads(good), "vocab_size": 300}))
    with pytest.raises(ShapeError, match=r"has shape \[288, 64\], and config.json wants \[300"):
        open_packed(str(source), cache_dir=cache)
    (source / "config.json").write_text(good)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json: Model missing"):
        open_packed(str(source), cache_dir=cache)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EluteError, match=r"cannot be written .*; choose another directory"):
        open_packed(str(folder), cache_dir=tmp_path / "file")


def test_a_path_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        open_packed("./nothing-here", cache_dir=tmp_path)


def test_act_order_in_experts_is_refused_before_any_work(tmp_path):
    """And where the recipe quantizes again, there is no order left that could be refused."""
    source, cache = save_tiny_folder(tmp_path / "model", family="olmoe"), tmp_path / "cache"
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if ".experts." in name]:
        n, k = tensors.pop(name).shape
        made, _, _ = gptq_tensors(rng, n, k, 4, 32, g_idx="act_order")
        for key, value in made.items():
            if key.startswith(MODULE):
                tensors[name.removesuffix(".weight") + key.removeprefix(MODULE)] = value
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, source / "model.safetensors"
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = settings_of(4, 32, desc_act=True)
    (source / "config.json").write_text(json.dumps(config))
    refused = (
        r"model: model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight has its columns in an order "
        r"of their own \(act-order\), wanted them in order in experts .*--bits, which quantizes it"
    )
    for attempt in (open_packed, foresee_packed):
        with pytest.raises(UnsupportedError, match=refused):
            attempt(str(source), cache_dir=cache)
        assert not cache.exists()
    assert open_packed(str(source), bits=4, cache_dir=cache).path.is_dir()


def test_both_orders_on_disk_are_told_of(folder, tmp_path, caplog):
    caplog.set_level(NOTE, "elute")
    packed = open_packed(str(folder), cache_dir=tmp_path)
    assert by_channel_folder(packed) is None
    made = open_packed(str(folder), cache_dir=tmp_path, by_channel=True)
    (line,) = [r.message for r in caplog.records if "MB of disk" in r.message]
    assert f"rm -r {made.path} removes the latter" in line
    assert by_channel_folder(packed) == made.path
    assert disk_bytes(made.path) >= made.nbytes > 0
    caplog.clear()
    open_packed(str(folder), cache_dir=tmp_path, by_channel=True)
    assert not caplog.records
