"""ONNX Runtime's devices against sim. What needs onnxruntime-qnn skips without it."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from products import exact, graph, inputs, product

from elute.errors import DeviceError, UnsupportedError
from elute.npu import ort
from elute.npu.device import Graph
from elute.npu.sim import Sim
from elute.npu.soc import SOCS

pytest.importorskip("onnxruntime", reason="pip install 'elute[npu]'")
pytest.importorskip("onnx", reason="pip install 'elute[npu]'")


def has_qnn() -> bool:
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        return False
    try:
        ort.qnn_device()
    except DeviceError:
        return False
    return True


needs_qnn = pytest.mark.skipif(not has_qnn(), reason="no onnxruntime-qnn that loads")


def test_what_libraries_print_is_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    with ort._told_on_stderr():
        os.write(1, b"LIBNATIVE\n")
    os.write(1, b"answer\n")
    assert capfd.readouterr() == ("answer\n", "LIBNATIVE\n")


@pytest.mark.parametrize(
    ("rows", "k", "widths"), [(1, 8, (3,)), (7, 576, (192, 64)), (33, 1536, (40,)), (5, 1025, (8,))]
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_cpu_provider_is_exact(rows, k, widths, per_channel) -> None:
    of = graph(rows, k, *widths, per_channel=per_channel)
    device = ort.Ort("cpu")
    device.load([of])
    x = inputs(rows, k)
    for p, got in zip(of.products, device.run(of.name, x), strict=True):
        assert np.array_equal(got, exact(x, p))


@needs_qnn
@pytest.mark.parametrize(
    ("rows", "k", "widths"),
    [(64, 576, (192, 64)), (128, 576, (576,)), (32, 1536, (576,)), (1, 64, (8,))],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_htp_is_within_a_step_of_sim(rows, k, widths, per_channel) -> None:
    of = graph(rows, k, *widths, per_channel=per_channel)
    device, sim = ort.Ort("qnn"), Sim("htp")
    for each in (device, sim):
        each.load([of])
    x = inputs(rows, k)
    for got, want in zip(device.run(of.name, x), sim.run(of.name, x), strict=True):
        off = np.abs(got.astype(int) - want)
        assert off.max() <= 1
        assert (off > 0).sum() <= 1 + 0.05 * off.size
    first = device.run(of.name, x)
    assert all(map(np.array_equal, first, device.run(of.name, x)))


@needs_qnn
def test_only_the_qnn_provider_runs_anything(tmp_path: Path) -> None:
    graphs = [graph(8, 64, 16, 8), graph(8, 128, 16, seed=9)]
    device = ort.Ort("qnn", traces=tmp_path / "traces")
    device.load(graphs)
    for of in graphs:
        device.run(of.name, inputs(8, of.products[0].shape[1]))
    device.close()
    ran = ort.nodes_by_provider(tmp_path / "traces")
    assert set(ran) == {"QNNExecutionProvider"}
    assert ran.total() == 4  # each graph is one node: once in the self test, once here


@needs_qnn
def test_what_the_htp_refuses_falls_back_to_nothing(capfd) -> None:
    from onnx import TensorProto, helper

    body = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"])],
        "unsupported",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(DeviceError, match=r"npu qnn: det does not compile \(.*\); use --npu off"):
        ort.open_session("det", model.SerializeToString(), ort.session_options(), "qnn", None)
    assert "Falling back" not in capfd.readouterr().out


@needs_qnn
def test_context_binaries_are_used_again_and_give_the_same(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    of, other = graph(16, 64, 16, 8), graph(16, 64, 24, seed=5)
    x = inputs(16, 64)
    plain = ort.Ort("qnn")
    plain.load([of])
    want = plain.run(of.name, x)
    for _ in range(2):
        device = ort.Ort("qnn", folder=tmp_path)
        device.load([of, other])
        assert all(map(np.array_equal, want, device.run(of.name, x)))
    kept = sorted(tmp_path.glob("qnn-8-gen-3/*"))
    assert len(kept) == 2
    assert not caplog.records
    # Whatever happens to one, it is made again, with one line, and gives the same.
    binary = next(kept[0].glob("*.bin"))
    damages = [
        lambda: binary.write_bytes(binary.read_bytes()[:-1] + b"\x55"),
        lambda: binary.write_bytes(binary.read_bytes()[:1000]),
        binary.unlink,
        (kept[0] / "about.json").unlink,
    ]
    for damage in damages:
        damage()
        device = ort.Ort("qnn", folder=tmp_path)
        device.load([of, other])
        assert all(map(np.array_equal, want, device.run(of.name, x)))
        assert [r.getMessage() for r in caplog.records if "compiling again" in r.getMessage()]
        assert len(caplog.records) == 1
        caplog.clear()


@needs_qnn
def test_graphs_are_compiled_for_another_chip_offline(tmp_path: Path) -> None:
    graphs = [graph(16, 64, 16), graph(16, 64, 24, seed=5)]
    told = []
    for want in (2, 0):
        made = ort.compile_offline(
            graphs, SOCS["x-elite"], tmp_path, progress=lambda *p: told.append(p)
        )
        assert made == want
    assert told == [("npu: compile", 1, 2), ("npu: compile", 2, 2)]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.bin")}
    assert len(before) == 2
    ort.Ort("qnn", soc=SOCS["x-elite"], folder=tmp_path).load(graphs)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.bin")}


@needs_qnn
def test_a_folder_that_cannot_be_written_is_said_and_done_without(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    device = ort.Ort("qnn", folder=tmp_path / "file")
    graphs = [graph(4, 64, 8), graph(4, 64, 16)]
    device.load(graphs)
    device.run(graphs[0].name, inputs(4, 64))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].endswith("; compiled graphs are not kept")


class Faulty:
    """A session whose first output has one wrong number, or an error for a result."""

    def __init__(self, session, fault):
        self._session, self._fault = session, fault

    def run(self, names, feeds):
        first, *others = self._session.run(names, feeds)
        return [self._fault(first), *others]


def off_by_two(y):
    y = y.copy()
    y[-1, -1] = y[-1, -1] + (2 if y[-1, -1] < 0 else -2)
    return y


def fail(y):
    raise RuntimeError("graph execution failed\n 1002")


@pytest.mark.parametrize("provider", ["cpu", pytest.param("qnn", marks=needs_qnn)])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (off_by_two, r"found -?\d+ in row 4, output 7, wanted -?\d+ \(2.5% of the outputs are"),
        (fail, r"p0.8x64 does not run \(graph execution failed 1002\); use --npu off"),
        (lambda y: y.astype(np.int16), r"found an output int16 \[5, 8\], wanted int"),
        (lambda y: y[:4], r"found an output int\d+ \[4, 8\], wanted int\d+ \[5, 8\]"),
    ],
)
def test_a_device_that_multiplies_wrong_is_not_used(monkeypatch, provider, fault, message) -> None:
    of = graph(5, 64, 8, 16)
    opened = ort.open_session
    monkeypatch.setattr(ort, "open_session", lambda *told: Faulty(opened(*told), fault))
    device = ort.Ort(provider)
    with pytest.raises(DeviceError, match=message):
        device.load([of])
    with pytest.raises(DeviceError, match=r"found no graph p0.8x64 among the 0 loaded"):
        device.run(of.name, inputs(5, 64))


def test_unknown_providers_and_scales_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="npu: found the provider tpu, wanted qnn or cpu"):
        ort.Ort("tpu")
    device = ort.Ort("cpu")
    bad = Graph(4, (product(8, 16, name="wq", input_scale=float("nan")),))
    with pytest.raises(UnsupportedError, match="wq: found the input scale nan, wanted a positive"):
        device.load([bad])
