import csv
import json

import pytest
from test_random_weights import TINY

from elute.bench import record as module
from elute.bench import shapes
from elute.bench.ceilings import Ceilings
from elute.bench.end_to_end import Speed, SpeedTest
from elute.bench.llama_cpp import LlamaCpp
from elute.bench.random_weights import random_recipe
from elute.bench.record import record
from elute.bench.subject import random_subject
from elute.errors import EluteError, FormatError

PROMPT, GENERATION = SpeedTest(512, 0), SpeedTest(0, 128, 4096)


@pytest.fixture(autouse=True)
def names(monkeypatch):
    monkeypatch.setattr(module, "machine_slug", lambda: "a-cpu-2-cores")
    monkeypatch.setattr(module, "elute_build", lambda: "0a1b2c3d4")
    monkeypatch.setitem(shapes.CONFIGS, "tiny", {**TINY, "hidden_size": 128})


@pytest.fixture
def rival(tmp_path):
    file = tmp_path / "file.gguf"
    file.write_bytes(b"GGUF")
    made = LlamaCpp(["llama-bench"], file, timeout_s=1)
    made.rows[PROMPT, 1] = {"build_commit": "b123", "model_type": "llama ?B Q2_K - Medium"}
    return made


def subject(bits=2):
    return random_subject("tiny", random_recipe(bits=bits, group_size=64, outer_bits=6))


def speeds(seconds=2.0, n_threads=1):
    ceilings = Ceilings((18.0, 20.0), 200.0)
    return [
        Speed(test, n_threads, (seconds, seconds, seconds), (3.0, 4.0, 6.0), ceilings)
        for test in (PROMPT, GENERATION)
    ]


def ratios(folder):
    return json.loads((folder / "ratios.json").read_text())


def figures(folder):
    return list(csv.DictReader((folder / "machines" / "a-cpu-2-cores.csv").open()))


def test_a_run_is_kept_as_ratios_and_as_figures(tmp_path, rival):
    written = record(tmp_path, subject(), speeds(), isa="avx2", rival=rival)
    assert [path.name for path in written] == ["a-cpu-2-cores.csv", "ratios.json"]
    prompt, generation = ratios(tmp_path)
    assert prompt.pop("date") == generation.pop("date")
    assert prompt == {
        "machine": "a-cpu-2-cores",
        "model": "tiny",
        "weights": "2-bit g64; head 6-bit g32",
        "isa": "avx2",
        "versus": "llama.cpp",
        "versus_weights": "Q2_K",
        "test": "pp512",
        "threads": 1,
        "ratio": 2.0,
        "repeats": 3,
        "elute": "0a1b2c3d4",
        "llama.cpp": "b123",
    }
    assert generation["test"] == "tg128@d4096"
    ours = {row["test"]: row for row in figures(tmp_path) if row["engine"] == "elute"}
    theirs = [row for row in figures(tmp_path) if row["engine"] == "llama.cpp"]
    assert float(ours["pp512"]["median_ts"]) == 256
    assert float(ours["tg128@d4096"]["read_gb_s"]) == 20
    assert ours["pp512"]["bandwidth_share"] == ours["tg128@d4096"]["peak_share"] == ""
    assert float(ours["pp512"]["peak_share"]) > 0
    assert [row["median_ts"] for row in theirs] == ["128.0000", "32.0000"]


def test_a_new_figure_replaces_the_one_with_its_key(tmp_path, rival):
    record(tmp_path, subject(), speeds(2.0), isa="avx2", rival=rival)
    record(tmp_path, subject(), speeds(1.0), isa="avx2", rival=rival)
    assert [row["ratio"] for row in ratios(tmp_path)] == [4.0, 4.0]
    record(tmp_path, subject(), speeds(2.0, n_threads=10), isa="avx2", rival=rival)
    record(tmp_path, subject(), speeds(2.0, n_threads=2), isa="avx2", rival=rival)
    record(tmp_path, subject(bits=4), speeds(2.0), isa="avx2", rival=rival)
    record(tmp_path, subject(), speeds(2.0), isa="scalar", rival=None)
    assert len(ratios(tmp_path)) == 8
    of_prompts = [r["threads"] for r in ratios(tmp_path) if r["test"] == "pp512"]
    assert of_prompts == [1, 2, 10, 1]  # by weights, then by number, not by spelling
    # 4 runs of ours and 4 of theirs, whose key knows only their own weights, and one without them
    assert len(figures(tmp_path)) == 2 * (4 + 3 + 1)


def test_files_hold_no_path_of_this_machine(tmp_path, rival):
    record(tmp_path, subject(), speeds(), isa="avx2", rival=rival)
    for path in (tmp_path / "ratios.json", tmp_path / "machines" / "a-cpu-2-cores.csv"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("ratios.json", "{", "found text that is no JSON"),
        ("ratios.json", '{"ratios": 1}', "found something else than a list"),
        ("ratios.json", '[{"machine": "x"}]', "found something else than a list of objects"),
        ("machines/a-cpu-2-cores.csv", "a,b\n1,2\n", "found other columns than engine, model"),
    ],
)
def test_a_file_of_somebody_else_is_left_alone(tmp_path, rival, name, content, told):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    with pytest.raises(FormatError, match=told):
        record(tmp_path, subject(), speeds(), isa="avx2", rival=rival)
    assert file.read_text() == content


def test_a_folder_that_cannot_be_written_is_told_and_left_clean(tmp_path, rival):
    (tmp_path / "ratios.json").mkdir()
    with pytest.raises(EluteError):
        record(tmp_path, subject(), speeds(), isa="avx2", rival=rival)
    assert not list(tmp_path.glob("*.partial-*"))
