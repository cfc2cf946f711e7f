"""npu calibrate, compile and schedule, and what doctor says of NPUs, over a tiny model."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import pytest
from tiny_folder import save_tiny_folder

from elute import cli
from elute.errors import DeviceError
from elute.npu import ort
from elute.npu.hardware import npus

KINDS = ["q_proj", "o_proj", "gate_proj", "down_proj", "all"]


def has_qnn() -> bool:
    try:
        ort.qnn_device()
    except DeviceError:
        return False
    return True


needs_qnn = pytest.mark.skipif(not has_qnn(), reason="no onnxruntime-qnn that loads")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def run(capfd, monkeypatch, home):
    monkeypatch.setenv("ELUTE_HOME", str(home))

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        return left.value.code, shown.out, shown.err

    return call


def test_calibrate_shows_each_kind_and_keeps_what_it_measured(run, folder, tmp_path):
    code, out, err = run("npu", "calibrate", folder, "--npu-pruning", 0.5, "--json", "-q")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert list(told["inputs"]) == KINDS
    assert Path(told["file"]).is_file()
    everything = told["inputs"]["all"]
    assert everything["inputs"] == 8
    assert everything["with_shadow"] == 4
    assert everything["largest_outlier"] > 127
    assert (
        everything["divergence_with_all"]
        <= everything["divergence"]
        <= everything["divergence_without"]
    )
    before = Path(told["file"]).stat().st_mtime_ns
    # Another text is measured in its place, and what the page shows is of it.
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)
    code, out, _ = run("npu", "calibrate", folder, "--text", text, "--npu-pruning", 1)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == told["file"]
    assert [line.split()[0] for line in lines[2:]] == KINDS
    assert " 0 of 8 " in lines[-1]
    assert Path(told["file"]).stat().st_mtime_ns != before


def test_calibrate_refuses_a_short_text(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat")
    code, _, err = run("npu", "calibrate", folder, "--text", text, "-q")
    assert code == 1
    assert err.startswith("error: text: found ")
    assert "wanted 128 or more" in err


def test_schedule_shows_every_rule_and_none_beats_the_bound(run, folder):
    given = ["npu", "schedule", folder, "--tokens", 100, "--npu-chunk", 32, "--repeats", 1, "-q"]
    code, out, err = run(*given, "--json", "--npu-speed", 3, "--crossing", 0.5)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["chunks"], told["chunk"], told["npu_speed"]) == (4, 32, 3)
    names = [each["rule"] for each in told["rules"]]
    assert names[0] == "in order"
    assert names[-1] == "quickest"
    assert all(each["ms"] >= told["bound_ms"] - 0.002 for each in told["rules"])
    assert told["rules"][-1]["ms"] <= min(each["ms"] for each in told["rules"][3:]) + 0.002
    assert all(0 <= each["bubbles"] <= 1 for each in told["rules"])
    # 8 products of 4 chunks, each handed over: with no work at all they take 16 ms.
    assert told["bound_ms"] >= 4 * 8 * 0.5
    code, out, err = run(*given)
    assert (code, err) == (0, "")
    assert "100 tokens in 4 chunks of 32" in out
    assert "simulated NPU: as fast as sim" in out
    assert out.splitlines()[-2].startswith("npu |")


def test_schedule_wants_a_device_by_name(run, folder):
    for npu in ("off", "auto", "require:auto"):
        code, _, err = run("npu", "schedule", folder, "--npu", npu)
        assert code == 2
        assert "wanted a device to measure with" in err
    code, _, err = run("npu", "schedule", folder, "--npu", "tpu")
    assert code == 1
    assert "found require:tpu, wanted one of" in err


def test_compile_refuses_other_chips_before_it_touches_the_model(run):
    code, out, err = run("npu", "compile", "no such model", "--soc", "888")
    assert (code, out) == (1, "")
    assert err.startswith("error: --soc: found 888, wanted one of 8-gen-2 (SM8550), ")
    assert run("npu", "compile", "no such model")[0] == 2


def test_compile_without_the_extra_is_one_sentence(run, monkeypatch):
    without_the_extra(monkeypatch)
    code, out, err = run("npu", "compile", "no such model", "--soc", "8-gen-3")
    assert (code, out) == (1, "")
    assert err.startswith("error: npu: onnxruntime does not load (")
    assert err.endswith("; pip install 'elute[npu]'\n")
    ort.qnn_device.cache_clear()


@needs_qnn
def test_compile_makes_graphs_that_are_used_and_notices_damage(run, folder, tmp_path):
    out = tmp_path / "out"
    given = ["npu", "compile", folder, "--soc", "sm8750", "--npu-chunk", 16, "-q", "--json"]
    code, shown, err = run(*given, "--out", out)
    assert code == 0, err
    told = json.loads(shown)  # and nothing else: the compiler greets elsewhere
    assert (told["graphs"], told["compiled"], told["npu"]) == (8, 8, "qnn:8-elite")
    manifest = json.loads(Path(told["manifest"]).read_text())
    assert manifest["soc"] == {"name": "8-elite", "part": "SM8750", "model": 69, "htp": 79}
    assert manifest["chunk"] == 16
    binaries = sorted(Path(told["folder"]).glob("*/*.bin"))
    assert len(binaries) == len(manifest["graphs"]) == 8
    assert told["bytes"] == sum(sum(graph["bytes"].values()) for graph in manifest["graphs"])
    # What is gone or changed is made again, the rest is kept.
    binaries[0].unlink()
    damaged = bytearray(binaries[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    binaries[1].write_bytes(damaged)
    code, shown, err = run("npu", "compile", folder, *given[3:-2], "--out", out)
    assert code == 0
    assert "2 compiled graphs are not used" in err
    assert "8 for 8-elite (SM8750, HTP v79)" in shown
    assert "2 compiled now" in shown
    assert json.loads(run(*given, "--out", out)[1])["compiled"] == 0


@needs_qnn
@pytest.mark.skipif(not ort.emulated(), reason="beside an HTP the chip is the one that is there")
def test_a_prompt_uses_what_was_compiled_for_the_chip(run, folder, home, monkeypatch):
    given = ["npu", "compile", folder, "--soc", "8-gen-2", "--npu-chunk", 16, "-q", "--json"]
    told = json.loads(run(*given)[1])
    assert Path(told["folder"]) == home / "npu" / "qnn-8-gen-2"

    def refuse(*arguments):
        raise AssertionError("it compiles")

    monkeypatch.setattr(ort, "compile_to", refuse)
    options = ["--npu", f"require:{told['npu']}", "--npu-chunk", 16, "--max-tokens", 2, "-q"]
    code, shown, _ = run("run", folder, "the cat", *options)
    assert code == 0
    assert shown.endswith("\n")


def without_the_extra(monkeypatch):
    for package in ("onnxruntime", "onnxruntime_qnn", "openvino", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)  # import raises
    ort.qnn_device.cache_clear()


def test_doctor_names_each_device_and_what_auto_takes(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    told = json.loads(out)["npu"]
    assert [each["name"] for each in told["devices"]] == ["qnn", "openvino", "cpu", "sim"]
    assert all(each["why"] for each in told["devices"])
    auto = [each["name"] for each in told["devices"] if each["present"] and not each["emulated"]]
    assert told["auto"] == (auto[0] if auto else None)
    page = run("doctor")[1]
    for each in told["devices"]:
        assert any(line.split()[:1] == [each["name"]] for line in page.splitlines())


def test_doctor_without_the_extra_says_what_to_install(run, monkeypatch):
    without_the_extra(monkeypatch)
    code, out, _ = run("doctor")
    ort.qnn_device.cache_clear()
    assert code == 0
    assert out.count("pip install 'elute[npu]'") == 3


@pytest.mark.parametrize("error", [OSError("libonnx.so: bad ELF"), RuntimeError("numpy ABI")])
def test_doctor_survives_runtimes_that_are_broken(run, monkeypatch, error):
    imported = builtins.__import__

    def broken(name, *arguments, **keywords):
        if name.split(".")[0] in ("onnxruntime", "onnxruntime_qnn", "openvino", "onnx"):
            raise error
        return imported(name, *arguments, **keywords)

    ort.qnn_device.cache_clear()
    monkeypatch.setattr(builtins, "__import__", broken)
    code, out, _ = run("doctor", "--json")
    monkeypatch.undo()
    ort.qnn_device.cache_clear()
    assert code == 0
    devices = {each["name"]: each for each in json.loads(out)["npu"]["devices"]}
    assert [name for name, each in devices.items() if each["present"]] == ["sim"]
    assert str(error) in devices["cpu"]["why"]


def test_the_system_names_its_npus(tmp_path):
    assert npus(tmp_path) == []
    for i, driver in enumerate(("intel_vpu", "amdxdna", "someone", "amdxdna")):
        (tmp_path / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        device = tmp_path / "sys/class/accel" / f"accel{i}" / "device"
        device.mkdir(parents=True)
        (device / "driver").symlink_to(tmp_path / "drivers" / driver)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/fastrpc-cdsp").touch()
    assert npus(tmp_path) == [
        ("Intel's NPU", "openvino"),
        ("AMD's NPU", None),
        ("an accelerator of the driver someone", None),
        ("Qualcomm's Hexagon", "qnn"),
    ]
