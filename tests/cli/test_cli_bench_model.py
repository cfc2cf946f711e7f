"""elute bench model over a tiny packed model and a tiny random one."""

import json

import pytest
from tiny import tiny_keys
from tiny_folder import save_tiny_folder

from elute import cli
from elute.bench import shapes
from elute.cli import bench_model  # noqa: F401 (before a test adds a shape: its help lists them)

SIZES = ["-p", 16, "-n", 4, "-r", 2, "-t", "1,2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(capsys, monkeypatch, home):
    monkeypatch.setenv("ELUTE_HOME", str(home))
    monkeypatch.setattr("elute.bench.kernels.default_arena_bytes", lambda: 1 << 20)
    monkeypatch.setitem(shapes.CONFIGS, "tiny", tiny_keys("llama", hidden_size=128))

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main(["bench", *(str(argument) for argument in arguments)])
        shown = capsys.readouterr()
        return left.value.code, shown.out, shown.err

    return call


def rows(run, *arguments):
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])["results"]


def test_a_table_has_the_names_of_llama_bench(run, folder):
    code, out, err = run("model", folder, *SIZES)
    assert code == 0, err
    lines = out.splitlines()
    assert "llama" in lines[0]
    assert lines[1].startswith("ceilings of 1 thread: read ")
    assert [line.split()[:2] for line in lines[4:]] == [
        ["pp16", "1"], ["pp16", "2"], ["tg4", "1"], ["tg4", "2"],
    ]  # fmt: skip
    assert all(line.count("%") == 1 for line in lines[4:])


def test_json_rows_have_the_keys_of_llama_bench(run, folder):
    prompt, _, generation, _ = rows(run, "model", folder, *SIZES, "-d", 8)
    # every key of llama-bench -o json that means something for a CPU engine with one cache type
    assert set(prompt) >= {
        "build_commit", "cpu_info", "backends", "model_filename", "model_type", "model_size",
        "model_n_params", "n_ubatch", "n_threads", "type_k", "type_v", "n_prompt", "n_gen",
        "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns",
        "samples_ts",
    }  # fmt: skip
    assert prompt["model_filename"] == str(folder)
    assert (prompt["test"], prompt["n_prompt"], prompt["n_gen"]) == ("pp16@d8", 16, 0)
    assert (generation["test"], generation["n_gen"], generation["n_depth"]) == ("tg4@d8", 4, 8)
    assert len(prompt["samples_ns"]) == len(prompt["samples_ts"]) == 2
    assert prompt["avg_ns"] == pytest.approx(sum(prompt["samples_ns"]) / 2, abs=1)
    assert prompt["samples_ts"][0] == pytest.approx(16e9 / prompt["samples_ns"][0], rel=1e-3)
    assert prompt["stddev_ns"] == pytest.approx(
        abs(prompt["samples_ns"][0] - prompt["samples_ns"][1]) / 2**0.5, abs=1
    )


def test_shares_are_of_the_ceilings_of_the_run(run, folder):
    prompt, generation = rows(run, "model", folder, "-p", 16, "-n", 4, "-r", 1, "-t", 1)
    assert "bytes_per_token" not in prompt
    assert "peak_share" not in generation
    gb_s = generation["bytes_per_token"] * generation["median_ts"] / 1e9
    assert generation["bandwidth_share"] == pytest.approx(
        gb_s / generation["read_gb_s"], abs=1e-4, rel=1e-2
    )
    assert prompt["peak_share"] > 0


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ((), "4-bit g32"),
        (("--bits", 2, "--group-size", 64), "2-bit g64"),
        (("--bits", "ternary"), "ternary row"),
        (("--bits", 3, "--group-size", 0, "--head-bits", 3), "3-bit row"),
    ],
)
def test_a_random_model_of_a_shape_needs_no_verb_and_no_file(run, home, given, stored):
    before = sorted(home.rglob("*"))
    found = rows(run, "--shape", "tiny", *SIZES, *given)
    assert len(found) == 4
    assert found[0]["model_filename"] == "tiny"
    assert found[0]["model_type"].endswith(stored)
    assert sorted(home.rglob("*")) == before


def test_the_vocabulary_and_the_recipe_of_a_shape_can_be_chosen(run, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"bits": 5, "group_size": 16}')
    (found,) = rows(
        run, "--shape", "tiny", "--vocabulary", 96, "--recipe", recipe, "-p", 0, "-n", 2,
        "-r", 1, "-t", 1,
    )  # fmt: skip
    assert found["model_filename"] == "tiny-v96"
    assert found["model_type"].endswith("5-bit g16")


def test_the_smallest_sizes_are_measured_and_none_is_refused(run, folder):
    assert run("model", folder, "--prompt", 1, "--generate", 0, "--repeats", 1)[0] == 0
    code, _, err = run("model", folder, "--prompt", 0, "--generate", 0)
    assert code == 2
    assert "nothing is left to measure" in err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--prompt", -5), "-5 is not in the range"),
        (("-t", "0"), "found '0' in --threads"),
        (("-d", "-1"), "found '-1' in --depth, wanted numbers from 0"),
        (("--shape", "huge"), "found 'huge' in --shape, wanted one of llama-2-7b"),
        (("--bits", "9"), "'9' is not one of"),
        (("--shape", "tiny", "--bits", "4", "--recipe", __file__), "--bits beside --recipe"),
        (("model", "m", "--shape", "tiny"), "found MODEL m and --shape tiny"),
        (("--group-size", 64), "--group-size describes a random model"),
        (("--bits", "ternary"), "--bits ternary is for --shape"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(run, given, told):
    code, _, err = run(*given)
    assert code == 2
    assert told in " ".join(err.replace("│", "").split())
