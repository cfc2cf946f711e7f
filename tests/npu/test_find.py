from __future__ import annotations

import logging
import sys
from copy import copy
from functools import partial
from pathlib import Path

import pytest
from products import exact, graph, inputs

from elute.errors import DeviceError, UnsupportedError
from elute.npu import find, openvino, ort
from elute.npu.find import Found
from elute.npu.soc import SOCS, soc_named

REAL = Found("qnn", True, False, "Qualcomm's HTP", "2.7.0")
EMULATED = Found("qnn", True, True, "Qualcomm's HTP, emulated by this CPU", "2.7.0")
MISSING = Found("openvino", False, False, "npu openvino: not there", "")
SIM = Found("sim", True, True, "numpy on this CPU", "2")


def surveyed(patch: pytest.MonkeyPatch, *found: Found) -> None:
    patch.setattr(find, "_FINDERS", {each.name: partial(copy, each) for each in found})


def test_a_survey_names_every_device_and_says_what_stands_behind_it() -> None:
    found = {each.name: each for each in find.survey()}
    assert list(found) == ["qnn", "openvino", "cpu", "sim"]
    assert found["sim"].present
    assert all(each.why for each in found.values())
    assert all(each.version for each in found.values() if each.present)
    if ort.emulated():
        assert found["qnn"].emulated or not found["qnn"].present


def test_sim_is_taken_where_it_is_named_and_multiplies() -> None:
    choice = find.choose("sim")
    assert choice.open is not None
    device = choice.open()
    of = graph(4, 64, 8)
    device.load([of])
    x = inputs(4, 64)
    assert (device.run(of.name, x)[0] == exact(x, of.products[0])).all()


def test_off_is_off() -> None:
    assert find.choose("off") == find.Choice(None, None, "--npu off")


def test_auto_takes_a_real_npu_and_never_an_emulator(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    surveyed(monkeypatch, REAL, MISSING, SIM)
    assert find.choose("auto").found == REAL
    surveyed(monkeypatch, EMULATED, MISSING, SIM)
    choice = find.choose("auto")
    assert choice.open is None
    assert choice.why == (
        "no NPU here (Qualcomm's HTP, emulated by this CPU; npu openvino: not there)"
    )
    assert not caplog.records  # the usual case: nothing to say
    with pytest.raises(DeviceError, match=r"--npu require:auto: no NPU here \(Qual.*; use --npu"):
        find.choose("require:auto")


def test_an_emulator_that_is_named_is_taken_and_said(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    surveyed(monkeypatch, EMULATED, MISSING, SIM)
    for name in ("qnn", "require:qnn"):
        assert find.choose(name).found == EMULATED
    assert [record.getMessage() for record in caplog.records] == [
        "--npu qnn: Qualcomm's HTP, emulated by this CPU",
        "--npu require:qnn: Qualcomm's HTP, emulated by this CPU",
    ]


def test_a_missing_device_is_said_or_where_it_is_required_fails(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    surveyed(monkeypatch, EMULATED, MISSING, SIM)
    choice = find.choose("openvino")
    assert (choice.open, choice.why) == (None, "npu openvino: not there")
    assert [record.getMessage() for record in caplog.records] == [
        "--npu openvino: npu openvino: not there; prompts run on the CPU"
    ]
    with pytest.raises(DeviceError) as refused:
        find.choose("require:openvino")
    assert str(refused.value) == "--npu require:openvino: npu openvino: not there; use --npu off"


@pytest.mark.parametrize("name", ["", "tpu", "require:", "require:off", "require:tpu", "SIM"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        find.choose(name)
    assert str(refused.value) == (
        f"--npu: found {name}, wanted one of auto, sim, qnn, openvino, cpu, off, "
        "or require: before a device"
    )


def test_without_the_extra_each_device_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    for package in ("onnxruntime", "onnxruntime_qnn", "openvino", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)  # import raises
    ort.qnn_device.cache_clear()
    for opened in (lambda: ort.Ort("qnn"), lambda: ort.Ort("cpu"), lambda: openvino.OpenVino()):
        with pytest.raises(DeviceError, match=r"does not load \(.*\); pip install 'elute\[npu\]'$"):
            opened()
    found = {each.name: each for each in find.survey()}
    assert [each.name for each in found.values() if each.present] == ["sim"]
    assert found["qnn"].why.endswith("pip install 'elute[npu]'")


def test_chips_are_known_by_name_and_by_part() -> None:
    assert soc_named("8 Gen 3") is soc_named("sm8650") is SOCS["8-gen-3"]
    assert (SOCS["x-elite"].model, SOCS["x-elite"].arch) == (60, 73)
    with pytest.raises(UnsupportedError) as refused:
        soc_named("888")
    assert str(refused.value) == (
        "--soc: found 888, wanted one of 8-gen-2 (SM8550), 8-gen-3 (SM8650), 8-elite (SM8750), "
        "8-elite-gen-5 (SM8850), x-elite (SC8380XP)"
    )


def test_a_chip_behind_qnn_is_the_one_to_compile_for(monkeypatch) -> None:
    surveyed(monkeypatch, EMULATED, MISSING, SIM)
    opened = []
    monkeypatch.setattr(ort, "Ort", lambda name, **given: opened.append((name, given["soc"])))
    for name, soc in (("qnn", None), ("require:qnn:SM8750", SOCS["8-elite"])):
        choice = find.choose(name)
        assert choice.open is not None
        choice.open()
        assert opened.pop() == ("qnn", soc)
    for name, message in (
        ("qnn:888", "--soc: found 888, wanted one of 8-gen-2"),
        ("sim:8-elite", "--npu: found sim:8-elite, wanted one of auto"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            find.choose(name)
