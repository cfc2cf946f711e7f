"""`elute run --memory` and `elute plan`, each a process of its own on a model of random weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import serving
from tiny_folder import save_tiny_folder

from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.flash.page_cache import cached_bytes, forget
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.runtime.executor import Executor
from elute.runtime.npu import measured_for_npu

CONFIG = {
    **CONFIGS["llama-3.2-1b"],
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    random_packed(CONFIG, random_recipe(bits=8, outer_bits=8), folder)
    return str(folder)


def elute(*arguments, **more):
    command = [sys.executable, "-m", "elute", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)


@pytest.fixture(scope="module")
def least(model):
    """The least budget, as the refusal of none names it, in MB."""
    refused = elute("plan", model, "--memory", "0", "--context", "256")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    found = re.fullmatch(r"error: memory: found 0 MB, wanted at least (\d+) \(MB: .*\); .*", line)
    assert found, line
    return int(found[1])


def test_plan_tells_by_its_exit_code_whether_a_model_fits(model, least):
    tight = elute("plan", model, "--memory", f"{least + 5}M", "--context", "256", "--json", "-q")
    told = json.loads(tight.stdout)
    assert tight.returncode == 1
    assert told["total_bytes"] <= told["budget_bytes"] == (least + 5) * 1_000_000
    assert told["missed_bytes"] > 0
    assert not told["fits"]
    assert told["limit"] == "flash"
    expected = told["flash_gb_s"] * 1e9 / told["missed_bytes"]
    assert told["bound_tok_s"] == pytest.approx(expected, rel=0.01)
    # Both are measured, in other seconds.
    assert told["bound_tok_s"] / 20 < told["tok_s"] < 2 * told["bound_tok_s"]
    roomy = elute("plan", model, "--memory", "2G", "--context", "256")
    assert roomy.returncode == 0
    assert "verdict           fits" in roomy.stdout


def test_a_given_rate_of_the_disk_is_not_measured(model, least):
    arguments = ["--memory", f"{least + 5}M", "--context", "256", "--flash", "0.5", "--json", "-q"]
    told = json.loads(elute("plan", model, *arguments).stdout)
    assert told["flash_gb_s"] == 0.5


def test_run_keeps_its_budget_and_its_answer(model, least):
    common = ["run", model, "eta", "--raw", "--temperature", "0", "--max-tokens", "8", "--json"]
    free = json.loads(elute(*common, "-q").stdout)
    budget = (least + 8) * 1_000_000
    done = elute(*common, "--memory", str(budget), "--context", "256")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["text"] == free["text"]
    assert told["peak_memory_bytes"] <= budget
    assert told["flash"]["missed_bytes"] > 0
    assert told["flash"]["read_bytes"] >= 8 * told["flash"]["missed_bytes"]
    assert "flash" not in free
    assert "predicted" not in free
    measured, predicted = told["measured"], told["predicted"]
    assert measured["read_bytes_per_token"] == pytest.approx(told["flash"]["missed_bytes"], rel=0.3)
    assert predicted["read_bytes_per_token"] == told["flash"]["missed_bytes"]
    assert measured["resident_bytes"] <= predicted["resident_bytes"] <= budget
    assert predicted["page_cache_bytes"] == 0
    assert measured["page_cache_bytes"] <= 1 << 20  # headers of the files; no weights
    assert measured["tok_s"] > 0
    assert predicted["tok_s"] > 0
    assert measured["waited_s_per_token"] >= 0


def test_a_run_ends_with_predicted_beside_measured(model, least):
    common = ["--memory", f"{least + 8}M", "--context", "256", "--temperature", "0"]
    done = elute("run", model, "eta", "--raw", "--max-tokens", "8", *common)
    assert done.returncode == 0, done.stderr
    *_, predicted, measured = done.stderr.splitlines()
    figures = (
        r"[\d.]+ tok/s · [\d.]+ MB of flash a token · [\d.]+ ms wait a token · resident \d+ MB"
    )
    assert re.fullmatch(rf"predicted {figures} · page cache 0\.0 MB", predicted)
    assert re.fullmatch(rf"measured  {figures} · page cache \d\.\d MB", measured)


@pytest.mark.parametrize("size", ["much", "-5", "1Q"])
def test_a_size_that_is_none_is_one_sentence(model, size):
    done = elute("run", model, "eta", "--memory", size)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: memory: found '{size}', wanted a size such as 1.5G, 800M or 2GiB\n"
    )


def test_page_cache_of_files_is_seen_and_given_back(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(300_000))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        opened.read()
    held = cached_bytes([file])
    if held is None:
        pytest.skip("this system does not tell what it caches")
    assert held == 303_104  # whole pages
    forget([file])
    assert cached_bytes([file]) in (0, held)  # a file system in memory keeps its pages


def test_eval_keeps_its_budget_and_its_perplexity(model, least, tmp_path):
    text = tmp_path / "text"
    text.write_text("eta nine tone " * 400)
    common = ["eval", model, "--text", str(text), "--context", "256", "--json", "-q"]
    free = json.loads(elute(*common).stdout)
    done = elute(*common, "--memory", f"{least + 16}M")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("peak_memory_bytes") <= 1_000_000 * (least + 16)
    assert told == free
    refused = elute(*common, "--memory", "1G", "--against", model)
    assert refused.returncode == 2
    assert "--memory is for one model" in refused.stderr


def test_a_plan_of_a_repository_fetches_headers_and_packs_nothing(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    proxies = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in proxies}
    environment |= {"ELUTE_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hub")}
    with serving() as hub:
        hub.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        environment["HF_ENDPOINT"] = hub.url
        rest = ("--context", "64", "--bits", "2", "--flash", "1", "--json", "-q")
        command = ["plan", "owner/repo", "--memory", "1G", *rest]
        done = elute(*command, env=environment)
        assert done.returncode == 0, done.stderr
        assert hub.sent_bytes <= 80_000
        unknown = elute("plan", "owner/other", "--memory", "1G", env=environment)
    told = json.loads(done.stdout)
    assert not told["packed"]
    assert not list((tmp_path / "home").glob("packed/*"))
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("error: owner/other: the hub has no such repository")
    local = elute("plan", str(folder), *command[2:], env=environment)
    assert json.loads(local.stdout)["model_bytes"] == told["model_bytes"]
    small = elute("plan", str(folder), "--memory", "1M", *rest, env=environment)
    assert small.returncode == 2
    assert re.match(r"error: memory: found 1 MB, wanted at least \d+ ", small.stderr)


def test_a_chat_ends_with_predicted_beside_measured(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    environment = {**os.environ, "ELUTE_HOME": str(tmp_path / "home")}
    options = ("--memory", "400M", "--max-tokens", "8", "--temperature", "0")
    done = elute("chat", str(folder), *options, input="the cat\nthe dog\n", env=environment)
    assert done.returncode == 0, done.stderr
    *_, predicted, measured = done.stderr.splitlines()
    assert predicted.startswith("predicted ")
    assert measured.startswith("measured ")


def calibrate_for_an_npu(folder):
    """On fewer tokens than a first run takes."""
    packed = PackedModel.open(Path(folder))
    executor = Executor(op_list(packed.config), packed, n_threads=2, context=256)
    tokens = [7 * i % 1024 for i in range(128)]
    measured_for_npu(packed, executor, lambda: tokens)


def test_a_run_tells_what_a_device_did_for_the_prompt(model, tmp_path):
    environment = {**os.environ, "ELUTE_HOME": str(tmp_path / "home")}
    text = "eta nine tone " * 20
    common = ["run", model, text, "--raw", "--temperature", "0", "--max-tokens", "4"]
    common += ["--context", "256", "--npu", "require:sim", "--npu-pruning", "0"]
    early = elute(*common, "--memory", "1G", env=environment)
    assert early.returncode == 1
    assert "found no calibration for an NPU, and --memory leaves no room" in early.stderr
    calibrate_for_an_npu(model)
    free = json.loads(elute(*common, "--json", "-q", env=environment).stdout)
    told = free["npu"]
    assert told["device"] == "sim"
    assert told["tokens"] == free["prompt_tokens"]
    assert 0 < told["clipped_share"] < 0.1
    assert told["shadow_rows"] > 0
    assert told["shadow_read_bytes"] == 0
    tight = elute(*common, "--memory", "1M", env=environment)
    found = re.search(r"wanted at least (\d+) \(MB: .*npu \d+", tight.stderr)
    assert found, tight.stderr
    budget = (int(found[1]) + 4) * 1_000_000
    more = ["--memory", str(budget), "--npu-hot", "0"]
    done = elute(*common, *more, "--json", "-q", env=environment)
    assert done.returncode == 0, done.stderr
    within = json.loads(done.stdout)
    assert within["text"] == free["text"]
    assert within["peak_memory_bytes"] <= budget
    assert within["npu"]["shadow_rows"] == told["shadow_rows"]
    assert within["npu"]["shadow_rows_in_memory"] == within["npu"]["hot_bytes"] == 0
    assert within["npu"]["shadow_read_bytes"] > 0
    assert within["measured"]["resident_bytes"] <= budget
    lines = elute(*common, *more, env=environment).stderr.splitlines()
    (line,) = (line for line in lines if line.startswith("npu sim · "))
    assert re.fullmatch(
        r"npu sim · \d+ tokens · [\d.]+ % of inputs clipped · \d+ rows for shadows, 0 % of them in "
        r"memory \(0\.0 MB\) · [\d.]+ MB read for them",
        line,
    )


FAILS = """
import sys
from elute.bench import budget
from elute.errors import DeviceError

def predict_run(*_, **__):
    raise DeviceError("the disk is gone; check it")

budget.predict_run = predict_run
from elute.cli import main
main(sys.argv[1:])
"""


def test_an_answer_outlives_a_forecast_that_fails(model, least):
    common = ["run", model, "eta", "--raw", "--temperature", "0", "--max-tokens", "4"]
    common += ["--memory", f"{least + 8}M", "--context", "256"]
    command = [sys.executable, "-c", FAILS, *common]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["text"]
    assert told["predicted"] is None
    assert told["measured"]["tok_s"] > 0
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *_, warning, measured = done.stderr.splitlines()
    assert "what was to be expected cannot be told: the disk is gone; check it" in warning
    assert measured.startswith("measured ")


def test_an_answer_of_one_token_is_compared_with_nothing(model, least):
    common = ["--memory", f"{least + 8}M", "--context", "256", "--temperature", "0"]
    done = elute("run", model, "eta", "--raw", "--max-tokens", "1", *common, "--json", "-q")
    told = json.loads(done.stdout)
    assert told["predicted"] is None
    assert told["measured"]["tok_s"] is None
