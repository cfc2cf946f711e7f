"""`elute verify`, a process of its own as a user starts it."""

import json
import subprocess
import sys

import pytest
from test_cli_memory import CONFIG

from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe


@pytest.fixture
def model(tmp_path):
    config = {**CONFIG, "num_hidden_layers": 1}
    return random_packed(config, random_recipe(bits=4, outer_bits=6), tmp_path / "model")


def elute(*arguments):
    command = [sys.executable, "-m", "elute", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_sound_model_is_one_line_and_exit_code_0(model):
    done = elute("verify", model.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{model.path}: ")
    assert done.stdout.endswith(" bytes, all as they were written\n")
    told = json.loads(elute("verify", model.path, "--json").stdout)
    assert told["by_page"]
    assert told["faults"] == []
    assert told["bytes"] == sum(record.size for record in model.files.values())


def test_a_damaged_page_is_named_and_the_exit_code_is_1(model):
    name, record = next((n, r) for n, r in model.records.items() if "down_proj" in n)
    file = model.path / record.file
    at = model.shards[record.file].offset(name + ".planes") + 3 * 4096
    data = bytearray(file.read_bytes())
    data[at + 17] ^= 4
    file.write_bytes(data)
    done = elute("verify", model.path)
    assert (done.returncode, done.stdout) == (1, "")
    fault, advice = done.stderr.splitlines()
    assert fault.startswith(f"error: {file}: page {at // 4096} at byte {at}, of {name}.planes: ")
    assert advice == f"error: {model.path}: check the disk and convert the model again"
    told = json.loads(elute("verify", model.path, "--json", "-q").stdout)
    assert len(told["faults"]) == 1


def test_a_model_without_sums_is_hashed_and_told_so(model):
    manifest = json.loads((model.path / "elute.json").read_text())
    del manifest["files"]["pages.crc32c"]
    (model.path / "elute.json").write_text(json.dumps(manifest))
    (model.path / "pages.crc32c").unlink()
    done = elute("verify", model.path)
    assert done.returncode == 0
    assert "found no checksums of pages, so whole files were hashed" in done.stderr
