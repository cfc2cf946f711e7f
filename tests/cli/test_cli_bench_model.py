"""elute bench model over a tiny packed model and a tiny random one."""

import json
import shutil
import sys

import pytest
from tiny import tiny_keys
from tiny_folder import save_tiny_folder

from elute import cli
from elute.bench import llama_cpp, shapes

# Before a test adds a shape: their help lists them.
from elute.cli import bench_kernels, bench_model  # noqa: F401

TINY = tiny_keys(
    "llama",
    hidden_size=256,
    intermediate_size=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_theta=1e4,
)
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
    monkeypatch.setattr("elute.bench.ceilings.default_arena_bytes", lambda: 1 << 20)
    monkeypatch.setitem(shapes.CONFIGS, "tiny", TINY)

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
    assert " each, multiply " in lines[1]
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
    assert generation["read_streams"] in (1, 2, 3)
    assert prompt["peak_share"] > 0


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ((), "4-bit g32; head 8-bit g32"),
        (("--bits", 2, "--group-size", 64), "2-bit g64; head 8-bit g32"),
        (("--bits", "ternary"), "ternary row; head 8-bit g32"),
        (("--bits", 3, "--group-size", 0, "--head-bits", 6), "3-bit row; head 6-bit g32"),
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
    assert found["model_type"].endswith("5-bit g16; head 8-bit g16")


def test_a_cache_beyond_the_memory_is_refused(run, monkeypatch):
    monkeypatch.setattr("elute.bench.random_weights.available_bytes", lambda: 16 << 20)
    code, _, err = run("--shape", "tiny", "-d", 1 << 20, "-r", 1, "-t", 1)
    assert code == 1
    assert "the key-value caches take 1024 MiB, but 16 MiB are available" in err


def test_thread_counts_double_up_to_all_cores(monkeypatch):
    from elute.cli import options

    for cores, counts in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr("elute.runtime.threads.default_threads", lambda n=cores: n)
        assert options.chosen_thread_counts(None) == counts


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
        (("--shape", "tiny", "--no-warmup"), "--no-warmup is for --versus llama.cpp"),
        (
            ("--shape", "tiny", "--versus", "llama.cpp", "--cache-type", "q8"),
            "--cache-type q8 beside --versus: llama.cpp is run with its f16 cache",
        ),
        (("--shape", "tiny", "--timeout", 5), "--timeout is for --versus llama.cpp"),
        (("--versus", "llama.cpp", "--versus-type", "Q4_0"), "--versus-type is for --shape"),
        (
            ("--shape", "tiny", "--versus", "llama.cpp", "--versus-type", "Q9"),
            "found 'Q9' in --versus-type, wanted one of Q4_0",
        ),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(run, given, told):
    code, _, err = run(*given)
    assert code == 2
    assert told in " ".join(err.replace("│", "").split())


# Answers as llama-bench does, or in the way that its own name says.
FAKE = """#!{python}
import json, pathlib, sys, time
fault = pathlib.Path(sys.argv[0]).name
if fault == "hangs":
    time.sleep(60)
if fault == "fails":
    print("main: error: failed to load model", file=sys.stderr)
    sys.exit(1)
if fault == "babbles":
    print("no JSON at all")
    sys.exit()
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
p, n, d, t = (int(given.get(key, 0)) for key in ("-p", "-n", "-d", "-t"))
row = dict(
    build_commit="abc", backends="CPU", model_type="llama 1M Q4_0", n_prompt=p, n_gen=n,
    n_depth=d, n_threads=t, samples_ns=[1_000_000],
)
if fault == "forgets":
    del row["samples_ns"]
if fault == "confuses":
    row["n_threads"] = 77
print(json.dumps([row]))
"""


@pytest.fixture
def fake(tmp_path):
    def make(fault):
        program = tmp_path / fault
        program.write_text(FAKE.format(python=sys.executable))
        program.chmod(0o755)
        return program

    return make


def versus(program, *more):
    return ("--shape", "tiny", *SIZES, "--versus", "llama.cpp", "--llama-bench", program, *more)


def test_the_rival_has_rows_and_the_ratio_is_recorded(run, fake, tmp_path):
    given = versus(fake("works"), "-d", "0,8", "--record", tmp_path / "record")
    code, out, err = run(*given, "--json")
    assert code == 0, err
    assert "random Q4_0 of 0 MiB, made and kept; remove" in err
    told = json.loads(out)
    assert [row["test"] for row in told["versus"]] == [row["test"] for row in told["results"]]
    for ours, theirs in zip(told["results"], told["versus"], strict=True):
        pairs = zip(theirs["samples_ns"], ours["samples_ns"], strict=True)
        ratio = sum(their / our for their, our in pairs) / 2
        assert theirs["ratio"] == pytest.approx(ratio, abs=1e-4, rel=1e-4)
        assert theirs["n_threads"] == ours["n_threads"]
        assert theirs["build_commit"] == "abc"
    recorded = json.loads((tmp_path / "record" / "ratios.json").read_text())
    assert [row["test"] for row in recorded] == [
        "pp16", "pp16", "pp16@d8", "pp16@d8", "tg4", "tg4", "tg4@d8", "tg4@d8",
    ]  # fmt: skip
    code, out, err = run(*given)
    assert code == 0
    assert "found; remove" in err
    assert out.splitlines()[1] == "llama.cpp abc: llama 1M Q4_0, 0.00 GB"
    assert all(line.endswith("×") for line in out.splitlines()[5:])


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("hangs", "hangs: pp16 with 1 threads did not end within 0.5 s; use a longer --timeout"),
        ("fails", "(main: error: failed to load model); run it by hand"),
        ("babbles", "answered no JSON at all, wanted JSON as `llama-bench -o json` prints"),
        ("forgets", "answered samples_ns None, wanted a list of one time above 0"),
        ("confuses", "answered n_threads 77, wanted 1"),
    ],
)
def test_a_faulty_llama_bench_ends_in_one_sentence(run, fake, fault, told):
    timeout = ("--timeout", 0.5) if fault == "hangs" else ()
    code, out, err = run(*versus(fake(fault), *timeout), "-q")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_missing_or_unusable_llama_bench_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "PYTHON_PACKAGE", "no_such_package")
    code, _, err = run("--shape", "tiny", "--versus", "llama.cpp")
    assert code == 1
    assert "found neither llama-bench on PATH nor llama-cpp-python" in err
    plain = tmp_path / "plain.txt"
    plain.write_text("not a program")
    code, _, err = run(*versus(plain))
    assert code == 1
    assert "plain.txt: is no program that can be run" in err


def test_a_model_needs_the_file_that_it_was_made_from(run, folder, fake):
    given = ("--versus", "llama.cpp", "--llama-bench", fake("works"))
    code, _, err = run("model", folder, *given)
    assert code == 2
    assert "name one with --gguf" in " ".join(err.split())
    gguf = fake("model.gguf")
    assert run("model", folder, *SIZES, *given, "--gguf", gguf)[0] == 0


@pytest.mark.parametrize("file_type", ["Q4_0", "Q2_K", "TQ2_0"])
def test_real_llama_bench_runs_a_random_file(run, file_type):
    program = shutil.which("llama-bench")
    if program is None:
        pytest.skip("no llama-bench on PATH")
    given = ["--shape", "tiny", "--versus", "llama.cpp", "--versus-type", file_type]
    code, out, err = run(*given, "-p", 16, "-n", 4, "-d", 8, "-r", 1, "-t", 1, "--json")
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert [row["test"] for row in told["versus"]] == ["pp16@d8", "tg4@d8"]
    for ours, theirs in zip(told["results"], told["versus"], strict=True):
        assert set(ours) >= set(theirs) - ONLY_LLAMA_BENCH - {"ratio"}
        assert theirs["model_n_params"] == ours["model_n_params"]
        assert file_type in theirs["model_type"]


# Settings and devices that elute does not have.
ONLY_LLAMA_BENCH = {
    "build_number", "gpu_info", "n_batch", "cpu_mask", "cpu_strict", "poll", "n_gpu_layers",
    "n_cpu_moe", "split_mode", "main_gpu", "no_kv_offload", "flash_attn", "devices",
    "tensor_split", "tensor_buft_overrides", "load_mode", "lazy_mode", "embeddings",
    "no_op_offload", "no_host", "repack", "fit_target", "fit_min_ctx",
}  # fmt: skip
