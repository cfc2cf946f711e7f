"""A sweep of a tiny random model without control groups, its files and its plot; and the groups."""

import csv
import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from elute.bench.memory_group import MemoryGroup, NoGroup, run_command
from elute.bench.memory_sweep import Rival, Sweep, SweepPoint, rival_run
from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.bench.sweep_plot import draw
from elute.errors import EluteError, UnsupportedError

CONFIG = {
    **CONFIGS["llama-3.2-1b"],
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


def series(svg):
    return {element.get("id") for element in ET.parse(svg).iter() if element.get("id")}


def texts(svg):
    return {
        "".join(element.itertext()) for element in ET.parse(svg).iter() if "text" in element.tag
    }


def point(memory, rates, theirs=None):
    rows = tuple(
        {
            "memory_bytes": memory,
            "sparsity": sparsity,
            "tok_s": rate,
            "predicted_tok_s": 2.0,
            "bound_tok_s": 3.0,
            "read_bytes_per_token": 4,
            "missed_bytes": 4,
            "peak_bytes": 5,
            "page_cache_bytes": None,
        }
        for sparsity, rate in rates.items()
    )
    return SweepPoint(memory, 3.0, 2.0, rows, theirs)


def test_every_series_is_drawn_under_its_name(tmp_path):
    line = {
        "seconds": 0.01,
        "compute": [[0, 0.004]],
        "flash": [[0, 0.01]],
        "wait": [[0.004, 0.01]],
    }
    points = tuple(point(m, {0.0: 1.0, 0.5: 1.5}, 0.2) for m in (10**9, 2 * 10**9))
    svg, png = draw(Sweep("model", points, line), tmp_path / "plot")
    wanted = {"elute-sparsity-0", "elute-sparsity-0.5", "llama.cpp", "bound"}
    wanted |= {"timeline-compute", "timeline-flash", "timeline-wait"}
    assert wanted <= series(svg)
    assert {"model", "memory, GB", "tokens/s", "elute, sparsity 0.5"} <= texts(svg)
    assert png.read_bytes().startswith(b"\x89PNG")
    again, _ = draw(Sweep("model", points, line), tmp_path / "again")
    assert again.read_bytes() == svg.read_bytes()


def test_what_was_not_measured_is_not_drawn(tmp_path):
    svg, _ = draw(Sweep("model", (point(10**9, {0.0: 1.0}),), None), tmp_path / "plot")
    found = series(svg)
    assert "elute-sparsity-0" in found
    assert not {"llama.cpp", "timeline-flash"} & found


def test_a_sweep_writes_data_and_one_plot(tmp_path):
    random_packed(CONFIG, random_recipe(bits=8, outer_bits=8), tmp_path / "model")
    elute, model = [sys.executable, "-m", "elute"], str(tmp_path / "model")
    plan = [*elute, "plan", model, "--memory", "0", "--context", "64"]
    refused = subprocess.run(plan, capture_output=True, text=True, timeout=120)
    least = int(refused.stderr.split("wanted at least ")[1].split()[0])  # MB
    budget = 1_000_000 * (least + 5)
    command = [*elute, "bench", "--memory-sweep", model]
    command += ["--budgets", f"{budget},400M", "--context", "64", "--tokens", "6", "-r", "1"]
    command += ["--no-limit", "-o", str(tmp_path / "out" / "sweep"), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    tight, roomy = told["points"]
    assert tight["memory_bytes"] == budget
    assert tight["elute"][0]["peak_bytes"] <= budget
    assert tight["elute"][0]["missed_bytes"] > 0
    read = tight["elute"][0]["read_bytes_per_token"]
    assert read == pytest.approx(tight["elute"][0]["missed_bytes"], rel=0.2)
    assert roomy["elute"][0]["missed_bytes"] == 0
    for at in (tight, roomy):
        assert at["predicted_tok_s"] > 0
        assert at["bound_tok_s"] > 0
        assert at["llama_cpp_tok_s"] is None
    assert told["timeline"]["seconds"] > 0
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == told
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [row["memory_bytes"] for row in rows] == [str(budget), "400000000"]
    found = series(tmp_path / "out" / "sweep.svg")
    assert {"elute-sparsity-0", "bound", "timeline-compute", "timeline-flash"} <= found


def test_no_group_is_one_sentence(tmp_path):
    for folder in ("v1", "v2"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UnsupportedError, match=r"no memory controller .*; run it as root, or with"):
        MemoryGroup(10**9, v1=tmp_path / "v1", v2=tmp_path / "v2")
    (tmp_path / "v2" / "cgroup.subtree_control").write_text("cpu memory\n")
    with MemoryGroup(10**9, v1=tmp_path / "v1", v2=tmp_path / "v2") as group:
        assert (group.folder / "memory.max").read_text() == "1050000000"
        assert group.peak_bytes is None
        (group.folder / "memory.max").unlink()
    assert not group.folder.exists()


def test_a_run_that_fails_is_one_sentence():
    with pytest.raises(EluteError, match=r"ended with exit code 3 \(out of luck\)"):
        run_command(
            [sys.executable, "-c", "import sys; print('out of luck', file=sys.stderr); sys.exit(3)"]
        )


@pytest.mark.parametrize("answer", ['[{"avg_ts": 1.25}]', "[]", "no"])
def test_llama_bench_is_asked_for_a_mapped_file(tmp_path, answer):
    program, gguf = tmp_path / "llama-bench", tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{answer}'\n")
    program.chmod(0o755)
    rival = Rival(str(program), gguf, 3)
    if "avg" not in answer:
        with pytest.raises(EluteError, match=r"answered .*, wanted what `llama-bench -o json`"):
            rival_run(NoGroup(), rival, 2)
        return
    assert rival_run(NoGroup(), rival, 2) == 1.25
    asked = (tmp_path / "asked").read_text()
    assert f"-m {gguf} -p 0 -n 3 -r 1 -t 2" in asked
    assert "--load-mode mmap" in asked
