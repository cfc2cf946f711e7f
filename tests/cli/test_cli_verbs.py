"""convert, info, eval, bench and doctor over a tiny packed model."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from tiny_folder import save_tiny_folder

from elute import cli
from elute.kernels import registry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(capsys, monkeypatch, home):
    monkeypatch.setenv("ELUTE_HOME", str(home))

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return left.value.code, shown.out, shown.err

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the cat and the dog sat on the mat while the rain in the hills fell. " * 40)
    return file


def test_convert_makes_a_folder_that_runs(run, folder, tmp_path):
    out = tmp_path / "packed"
    code, shown, err = run("convert", folder, out, "--bits", "3", "--json")
    assert code == 0, err
    assert json.loads(shown)["path"] == str(out)
    assert "bits a weight" in err
    code, shown, err = run("run", out, "the cat", "--max-tokens", "3", "-q", "--temperature", "0")
    assert (code, err) == (0, "")
    assert shown.endswith("\n")
    code, _, err = run("convert", out, tmp_path / "again")
    assert code == 1
    assert "is packed already" in err


def test_convert_refuses_to_overwrite_without_force(run, folder, tmp_path):
    out = tmp_path / "packed"
    assert run("convert", folder, out)[0] == 0
    code, _, err = run("convert", folder, out)
    assert code == 1
    assert err.startswith("error: ")
    assert run("convert", folder, out, "--force")[0] == 0


def test_convert_can_stop_after_the_download(run, folder):
    code, out, err = run("convert", folder, "--fetch-only", "--json")
    assert code == 0, err
    assert json.loads(out) == {"path": str(folder)}
    assert run("convert", folder)[0] == 2


def test_info_describes_and_verifies(run, folder, tmp_path):
    out = tmp_path / "packed"
    run("convert", folder, out, "-q")
    told = json.loads(run("info", out, "--verify", "--json")[1])
    assert told["verified"]
    assert told["model_type"] == "llama"
    assert sum(kind["weights"] for kind in told["matrices"]) == told["weights"]
    assert {kind["bits"] for kind in told["matrices"]} == {4, 8}
    assert "all as the manifest says" in run("info", out, "--verify")[1]
    shard = next(out.glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    code, _, err = run("info", out, "--verify")
    assert code == 1
    assert "sha256" in err


def test_info_shows_what_multiplies_each_width_and_why(run, folder, kernels_file):
    code, out, _ = run("info", folder, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["kernels_file"] == str(kernels_file)
    assert [choice["bits"] for choice in told["kernels"]] == [4, 8]
    for choice in told["kernels"]:
        assert len(choice["lookup_over_multiply"]) == 11
        assert "measured: lookup's time over multiply's is" in choice["reason"]
    assert str(kernels_file) in run("info", folder)[1]
    assert (
        "4 bits: lookup of any number of tokens (forced)"
        in run("info", folder, "--kernel", "lookup")[1]
    )
    assert (
        "8 bits: multiply of any number of tokens (forced)"
        in run("info", folder, "--kernel", "multiply")[1]
    )


def test_info_counts_the_cache_of_each_type(run, folder):
    told = {
        kind: json.loads(run("info", folder, "--json", "--cache-type", kind)[1])
        for kind in ("f16", "q8")
    }
    # 2 layers of 2 kv heads, 16 wide: keys and values, and of q8 two f32 scales.
    assert told["f16"]["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert told["q8"]["cache_bytes_per_token"] == 2 * 2 * (2 * 16 + 2 * 4)
    assert "160 bytes each in q8" in run("info", folder, "--cache-type", "q8")[1]
    assert json.loads(run("info", folder, "--json")[1])["cache_type"] == "f16"


def test_a_q8_cache_is_near_f16_and_is_not_f16(run, folder, text):
    given = ["eval", folder, "--text", text, "--context", 64, "--windows", 2, "--json", "-q"]
    for more in ([], ["--reference"]):
        plain, f16, q8 = (
            json.loads(run(*given, *more, *kind)[1])["perplexity"]
            for kind in ([], ["--cache-type", "f16"], ["--cache-type", "q8"])
        )
        assert plain == pytest.approx(f16, rel=1e-3)
        assert q8 != f16
        assert q8 == pytest.approx(f16, rel=0.05)
    told = json.loads(run(*given, "--cache-type", "q8", "--against", folder)[1])
    assert 0 < told["kl"] < 0.05


def test_no_kernel_changes_an_answer(run, folder, text):
    given = ["eval", folder, "--text", text, "--context", 64, "--windows", 2, "--json", "-q"]
    told = {run(*given, "--kernel", kernel)[1] for kernel in ("auto", "lookup", "multiply")}
    assert len(told) == 1
    code, _, err = run(*given, "--kernel", "guess")
    assert code == 2
    assert "'guess' is not one of 'auto', 'lookup', 'multiply'" in err


def test_the_kernels_are_measured_once_and_quiet_does_not_say_so(run, folder, kernels_file):
    measured = "note: measuring lookup against multiply on this CPU, once\n"
    for options, expected in (([], measured), (["-q"], "")):
        registry._race.cache_clear()
        registry._announce.cache_clear()
        kernels_file.unlink(missing_ok=True)
        assert run("info", folder, *options)[2] == expected
        assert run("info", folder, *options)[2] == ""


def test_verbose_says_why_a_measurement_is_not_kept(run, folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(registry, "cache_dir", lambda: tmp_path / "file")
    assert run("info", folder, "-q")[2] == ""
    assert "measurements in no file, so each start measures" in run("info", folder)[1]
    lines = run("-v", "info", folder)[2].splitlines()
    assert len([line for line in lines if "cannot be written (" in line]) == 1


def test_eval_ends_with_one_json_object(run, folder, text):
    code, out, err = run("eval", folder, "--text", text, "--context", 64, "--windows", 3, "--json")
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert (told["windows"], told["tokens_scored"]) == (3, 93)
    assert told["perplexity"] > 1


def test_eval_reference_of_the_packed_codes_is_near_and_kl_is_small(run, folder, text):
    same = ["--text", text, "--context", 64, "--windows", 2, "--json", "-q"]
    packed = json.loads(run("eval", folder, "--bits", 8, "--against", folder, *same)[1])
    reference = json.loads(run("eval", folder, "--bits", 8, "--reference", *same)[1])
    floats = json.loads(run("eval", folder, "--reference", *same)[1])
    assert packed["perplexity"] == pytest.approx(reference["perplexity"], rel=0.05)
    assert reference["perplexity"] == pytest.approx(floats["perplexity"], rel=0.05)
    assert reference["perplexity"] != floats["perplexity"]
    assert 0 < packed["kl"] < 2


def test_eval_says_what_is_wrong_with_the_text(run, folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    code, _, err = run("eval", folder, "--text", short)
    assert code == 1
    assert "make 0 windows of 512" in err
    short.write_bytes(b"the \xff cat")
    assert "byte 4 is not UTF-8" in run("eval", folder, "--text", short)[2]


def test_bench_kernels_shows_a_row_a_case_beside_the_ceilings(run, monkeypatch):
    monkeypatch.setattr("elute.bench.ceilings.default_arena_bytes", lambda: 1 << 20)
    given = ["bench", "kernels", "--bits", "2,4", "--threads", "1,2", "--shape", "96x128,32x64"]
    given += ["--rows", "1,3", "--group-size", 0, "--repeats", 1]
    code, out, err = run(*given)
    assert code == 0, err
    lines = out.splitlines()
    assert re.fullmatch(
        r"ceilings of 1 thread: read [\d.]+ GB/s in (1 stream|[23] streams) each, "
        r"multiply \d+ GOPS",
        lines[0],
    )
    assert lines[3].split()[:6] == ["96x128", "2", "128", "symmetric", "1", "1"]
    assert lines[3].split()[6] in KERNELS
    assert len(lines) == 2 + 1 + 2 * 2 * 2 * 2
    told = json.loads(run(*given, "--json")[1].splitlines()[-1])
    assert told["kernel"] == "auto"
    assert [c["threads"] for c in told["ceilings"]] == [1, 2]
    assert set(told["ceilings"][0]) == {"threads", "read_gb_s", "read_streams", "multiply_gops"}
    assert {c["read_streams"] for c in told["ceilings"]} <= {1, 2, 3}
    assert len(told["rows"]) == 16
    assert set(told["rows"][0]) == {
        "shape", "bits", "group_size", "affine", "threads", "rows", "kernel",
        "ms", "gb_s", "bandwidth_share", "gops", "peak_share",
    }  # fmt: skip


KERNELS = ("lut_matmul", "lut_multiply", "lut_gemm")


def bench_rows(run, *given):
    """The rows of `elute bench kernels --json`, one thread and one repeat."""
    code, out, err = run("bench", "kernels", "-t", 1, "--repeats", 1, "--json", *given)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])["rows"]


def test_bench_kernels_obeys_kernel_and_affine(run, monkeypatch):
    monkeypatch.setattr("elute.bench.ceilings.default_arena_bytes", lambda: 1 << 20)
    sizes = ("--shape", "96x128", "--bits", 4, "--rows", "1,20")
    looked_up = bench_rows(run, *sizes, "--kernel", "lookup", "--affine", "min")
    assert [(r["kernel"], r["affine"], r["rows"]) for r in looked_up] == [
        ("lut_matmul", "min", 1), ("lut_matmul", "min", 20),
    ]  # fmt: skip
    multiplied = bench_rows(run, *sizes, "--kernel", "multiply")
    assert [r["kernel"] in KERNELS[1:] for r in multiplied] == [True, True]
    assert multiplied[1]["kernel"] == "lut_gemm"
    assert {r["affine"] for r in multiplied} == {"symmetric"}


def test_bench_kernels_takes_the_head_of_a_model_in_one_row_at_its_own_bits(run, monkeypatch):
    monkeypatch.setattr("elute.bench.ceilings.default_arena_bytes", lambda: 1 << 20)
    of_model = ("--shape", "smollm2-135m,49152x576", "--bits", "2,6", "--rows", "2,1")
    found = [
        (r["shape"], r["bits"], r["rows"]) for r in bench_rows(run, *of_model, "--head-bits", "6,8")
    ]
    # 49152x576 is named beside its model: as one of the layers, and once at 6 bits in one row
    layers = ["576x576", "192x576", "1536x576", "576x1536", "49152x576"]
    assert found == [
        *((shape, bits, rows) for shape in layers for bits in (2, 6) for rows in (2, 1)),
        ("49152x576", 8, 1),
    ]
    default = bench_rows(run, "--shape", "smollm2-135m", "--bits", 2, "--rows", 2)
    assert [(r["bits"], r["rows"]) for r in default if r["shape"] == "49152x576"] == [(6, 1)]


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--bits", "0", "found '0' in --bits, wanted numbers from 1 to 8"),
        ("--head-bits", "9", "found '9' in --head-bits, wanted numbers from 1 to 8"),
        ("--kernel", "magic", "'magic' is not one of 'auto', 'lookup', 'multiply'"),
        ("--affine", "max", "'max' is not one of 'symmetric', 'zero', 'min'"),
        ("--rows", "many", "found 'many' in --rows, wanted numbers from 1"),
        ("--shape", "4096", "found '4096' in --shape, wanted sizes such as 4096x4096"),
    ],
)
def test_bench_kernels_refuses_what_it_cannot_measure(run, option, value, told):
    code, _, err = run("bench", "kernels", option, value)
    assert code == 2
    assert told in " ".join(err.split())


def test_bench_names_its_two_verbs(run):
    code, out, _ = run("bench", "--help")
    assert code == 0
    assert all(verb in out for verb in ("model", "kernels"))
    assert run("bench", "tiny")[0] == 2


def test_doctor_is_content_with_this_machine(run):
    run("doctor")  # measures the kernels, which a line on stderr announces
    code, out, err = run("doctor", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert [choice["bits"] for choice in told["kernels"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert told["isa"] in told["isas"]
    assert all(told["kernel_test"].values())
    assert told["memory_bytes"] > 0
    assert "verdict   ready" in run("doctor")[1]


def test_doctor_shows_the_disk_once_it_was_measured(run, home, monkeypatch):
    from elute.flash import disk

    monkeypatch.setattr(disk, "cache_dir", lambda: home)
    assert json.loads(run("doctor", "--json")[1])["disk"] is None
    assert "disk      not measured yet" in run("doctor")[1]
    found = disk.Disk(2e9, 5e-5, 4e9, 8, 1 << 20, "io_uring")
    disk._write(home / "disks.json", {disk.Device.of(home): found})
    assert json.loads(run("doctor", "--json")[1])["disk"]["request_bytes"] == 1 << 20
    assert (
        "disk      2.00 GB/s in 8 reads of 1024 KiB at once by io_uring; a random read takes 50 µs "
        "and 250 µs a MB" in run("doctor")[1]
    )


def test_doctor_names_a_native_module_that_does_not_load():
    program = "import sys; sys.modules['elute._native'] = None; from elute.cli import main; "
    done = subprocess.run(
        [sys.executable, "-c", program + "main(['doctor'])"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "verdict   not ready: import of elute._native halted" in done.stdout


def test_doctor_fails_on_a_wrong_kernel(run, monkeypatch):
    from elute.runtime import self_test

    monkeypatch.setattr(self_test, "kernels_are_right", lambda isa: isa != "scalar")
    code, out, _ = run("doctor")
    assert code == 1
    assert "scalar WRONG" in out


def test_an_error_in_a_file_is_one_line(run, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 4)
    code, out, err = run("run", broken, "x")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
