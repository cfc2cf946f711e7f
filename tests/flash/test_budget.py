"""The budget is kept by a whole process inside a memory cgroup, with the tokens of no limit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.flash.banks import banks_of
from elute.model.families import op_list
from elute.pack.reorder import reorder
from elute.quantize.recipe import Recipe, Rule, Scheme
from elute.runtime.executor import Executor
from elute.runtime.npu import measured_for_npu

# 96 MB of planes beside some 75 MB of interpreter, libraries and tokenizer.
CONFIG = {
    **CONFIGS["llama-3.2-1b"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
CHILD = """
import json, sys
import elute
memory = sys.argv[2] or None
options = {"cache_dir": sys.argv[3], "memory": memory, "context": 512, "threads": 2}
with elute.load(sys.argv[1], checked=bool(memory), **options) as model:
    told = model.generate([*range(300)], max_tokens=12, temperature=0, ignore_end=True)
    status = open("/proc/self/status").read().splitlines()
    (peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    plan = model.flash.plan if model.flash else None
    print(json.dumps({
        "tokens": told.tokens, "peak": 1024 * peak, "missed": plan.missed if plan else 0,
        "read": model.flash.figures()[0] if plan else 0,
    }))
"""
FORETOLD = """
import json, sys
import elute
from elute.cli.memory_report import MemoryReport
options = {"cache_dir": sys.argv[3], "memory": sys.argv[2], "context": 256, "threads": 2}
model = elute.load(sys.argv[1], **options)
assert model.flash.plan.missed
report = MemoryReport(model)
for chunk in model.stream([*range(20)], max_tokens=4, temperature=0, ignore_end=True):
    report.chunk(chunk)
prediction, measured = report.close()
status = open("/proc/self/status").read().splitlines()
(peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
print(json.dumps({"peak": 1024 * peak, "rate": prediction.tok_s, "measured": measured.tok_s}))
"""
PROMPTS_BY_DEVICE = """
import json, sys
import elute
memory = sys.argv[2] or None
options = {"cache_dir": sys.argv[3], "memory": memory, "context": 512, "threads": 2}
options |= {"npu": "require:sim", "npu_chunk": 128, "checked": bool(memory)}
with elute.load(sys.argv[1], **options) as model:
    told = model.generate([*range(300)], max_tokens=6, temperature=0, ignore_end=True)
    status = open("/proc/self/status").read().splitlines()
    (peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    flash, by_device = model.flash, model.prompts.figures()
    print(json.dumps({
        "tokens": told.tokens, "peak": 1024 * peak, "missed": flash.plan.missed if flash else 0,
        "by_device": by_device.tokens, "rows": by_device.wanted, "read": by_device.read_bytes,
    }))
"""
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


MIXTURE = {
    **CONFIGS["olmoe-1b-7b"],
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_experts": 48,
    "vocab_size": 4096,
}


class Group:
    """A memory control group of either version, which a process joins before it starts."""

    def __init__(self, limit_bytes: int) -> None:
        v1 = (V1 / "memory.limit_in_bytes").exists()
        root = V1 if v1 else V2
        if not v1 and "memory" not in _text(root / "cgroup.subtree_control").split():
            pytest.skip("no memory cgroup whose groups may be limited is mounted")
        self.folder = root / f"elute-test-budget-{os.getpid()}"
        try:
            self.folder.mkdir(exist_ok=True)
            limit = "memory.limit_in_bytes" if v1 else "memory.max"
            (self.folder / limit).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"memory cgroups cannot be made here: {error}")
        self._peak = "memory.max_usage_in_bytes" if v1 else "memory.peak"

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        join = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return subprocess.run(
            ["sh", "-c", join, "sh", *command], capture_output=True, text=True, timeout=300
        )

    def peak_bytes(self) -> int:
        return int(_text(self.folder / self._peak))

    def close(self) -> None:
        self.folder.rmdir()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget") / "model"
    return random_packed(CONFIG, random_recipe(bits=8, outer_bits=8), folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_mixture_of_experts_keeps_its_budget(tmp_path):
    random_packed(MIXTURE, random_recipe(bits=8, outer_bits=8), tmp_path / "model")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model")]
    told = []
    for budget in ("", "320000000"):
        ran = [*command, budget, str(tmp_path / "cache")]
        done = subprocess.run(ran, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    free, within = told
    assert within["tokens"] == free["tokens"]
    assert within["missed"] > 0
    assert within["peak"] <= 320_000_000 < free["peak"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_run_in_a_cgroup_of_the_budget_gives_the_tokens_of_no_limit(packed, tmp_path):
    command = [sys.executable, "-c", CHILD, str(packed.path)]
    free = subprocess.run(
        [*command, "", str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    wanted = json.loads(free.stdout)
    budget = 160_000_000
    assert wanted["peak"] > budget  # it would not fit
    group = Group(budget * 105 // 100)
    try:
        done = group.run([*command, str(budget), str(tmp_path)])
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["tokens"] == wanted["tokens"]
        assert told["peak"] <= budget
        assert group.peak_bytes() <= budget * 105 // 100
        forwards = 2 + 11  # chunks of the prompt, and tokens after the first
        assert forwards * told["missed"] <= told["read"] <= (forwards + 1) * told["missed"]
    finally:
        group.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("order", ["panels", "channels", "experts", "as many scales as codes"])
def test_what_foretells_the_rate_keeps_the_budget_too(packed, tmp_path, order):
    model = packed
    if order == "channels":
        model = reorder(packed, tmp_path / "model", banks_of(op_list(packed.config)))
    elif order == "experts":
        model = random_packed(MIXTURE, random_recipe(bits=8, outer_bits=8), tmp_path / "model")
    elif order != "panels":
        rule = Rule("*", bits=2, group_size=16, scheme=Scheme.ASYMMETRIC)
        model = random_packed(CONFIG, Recipe((rule,)), tmp_path / "model")
    command = [sys.executable, "-c", FORETOLD, str(model.path)]
    refused = subprocess.run(
        [*command, "1M", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    least = re.search(r"wanted at least (\d+) \(MB", refused.stderr)
    assert least, refused.stderr
    budget = (int(least[1]) + 4) * 1_000_000
    done = subprocess.run(
        [*command, str(budget), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rate"] > 0
    assert told["peak"] <= budget


@pytest.mark.parametrize("order", ["panels", "channels"])
def test_prompts_by_a_device_keep_the_budget_too(packed, tmp_path, order):
    """Its hot rows, its chunks, and the weights of one that is this process."""
    model = packed
    if order == "channels":
        model = reorder(packed, tmp_path / "model", banks_of(op_list(packed.config)))
    executor = Executor(op_list(model.config), model, n_threads=2, context=256)
    measured_for_npu(model, executor, lambda: [*range(128)])  # less than a first run takes
    del executor
    command = [sys.executable, "-c", PROMPTS_BY_DEVICE, str(model.path)]
    free = subprocess.run(
        [*command, "", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert free.returncode == 0, free.stderr
    wanted = json.loads(free.stdout)
    tight = subprocess.run(
        [*command, "90M", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    found = re.search(r"memory: found 90 MB, wanted at least (\d+) \(MB: .*npu \d+", tight.stderr)
    assert found, tight.stderr
    budget = (int(found[1]) + 8) * 1_000_000
    assert budget < wanted["peak"], found[0]
    group = Group(budget * 105 // 100)
    try:
        done = group.run([*command, str(budget), str(tmp_path)])
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["tokens"] == wanted["tokens"]
        assert told["by_device"] == 300
        assert told["missed"] > 0
        assert told["rows"] == wanted["rows"] > 0
        assert told["read"] > 0
        assert told["peak"] <= budget
        assert group.peak_bytes() <= budget * 105 // 100
    finally:
        group.close()
