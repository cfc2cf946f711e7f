"""OpenVINO's CPU device against sim: the graphs that an Intel NPU would get."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from products import graph, inputs

from elute.errors import DeviceError
from elute.npu import openvino
from elute.npu.sim import Sim

pytest.importorskip("openvino", reason="pip install 'elute[npu]'")
pytest.importorskip("onnx", reason="pip install 'elute[npu]'")


@pytest.mark.parametrize(
    ("rows", "k", "widths"),
    [(1, 8, (3,)), (64, 576, (192, 64)), (33, 1536, (40,)), (5, 1025, (8,))],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_openvino_is_within_a_step_of_sim(rows, k, widths, per_channel) -> None:
    of = graph(rows, k, *widths, per_channel=per_channel)
    device, sim = openvino.OpenVino("CPU"), Sim("htp")
    for each in (device, sim):
        each.load([of])
    x = inputs(rows, k)
    got = device.run(of.name, x)
    device.run(of.name, np.zeros_like(x))  # may not write what was returned
    for g, want in zip(got, sim.run(of.name, x), strict=True):
        off = np.abs(g.astype(int) - want)
        assert off.max() <= 1
        assert (off > 0).sum() <= 1 + 0.01 * off.size


def test_the_cpu_is_called_the_cpu_and_an_npu_that_is_not_there_is_missed() -> None:
    assert openvino.OpenVino("CPU").profile.name == "openvino on the CPU"
    if "NPU" not in openvino.targets():
        assert openvino.OpenVino().profile.name == "openvino on the CPU"
        with pytest.raises(
            DeviceError, match=r"npu openvino: found the devices .*CPU.*, wanted NPU; install Intel"
        ):
            openvino.OpenVino("NPU")


def test_blobs_are_used_again_and_only_whole(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    of = graph(16, 64, 16, 8)
    x = inputs(16, 64)
    results = []
    for damaged in (False, False, True):
        if damaged:
            blob = next(tmp_path.rglob("graph.blob"))
            blob.write_bytes(blob.read_bytes()[:-3])
        device = openvino.OpenVino("CPU", folder=tmp_path)
        device.load([of])
        results.append(device.run(of.name, x))
    assert all(all(map(np.array_equal, results[0], again)) for again in results[1:])
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{tmp_path}: 1 compiled graphs are not used (found files changed since they were "
        "written); compiling again"
    ]
