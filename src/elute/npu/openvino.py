"""Intel's NPU by OpenVINO. Without one, the same graphs on OpenVINO's CPU device: to test them.

Used directly: ONNX Runtime's OpenVINO provider shows no device on hosts that are not Intel's.
OpenVINO's AUTO device is never asked, since it takes the CPU in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from elute.errors import NOTE, DeviceError, EluteError
from elute.npu import checks, qdq
from elute.npu.artefacts import Artefacts, load_graphs
from elute.npu.device import Graph, Outputs, Profile, Progress
from elute.types import I8

log = logging.getLogger(__name__)

Target = Literal["NPU", "CPU"]
BLOB_FILE = "graph.blob"


def core() -> Any:
    """openvino.Core. Raises DeviceError, saying what to install."""
    try:
        import openvino

        return openvino.Core()
    except Exception as error:  # a broken installation raises anything
        raise DeviceError(
            f"npu openvino: openvino does not load ({_line(error)}); pip install 'elute[npu]'"
        ) from None


def targets() -> list[str]:
    """OpenVINO's devices, as CPU, GPU, NPU. Raises DeviceError without the package."""
    return list(core().available_devices)


class OpenVino:
    """The device `openvino`.

    target  None: NPU where there is one, else CPU, which `profile.name` then says

    Outputs are int8, as an NPU's are: where they are floats, OpenVINO 2026.4.1 is off by 0.02 % of
    the largest one on the CPU, too much to tell right from wrong.

    Raises DeviceError where OpenVINO or the target is not there.
    """

    def __init__(self, target: Target | None = None, *, folder: Path | None = None) -> None:
        self._core = core()
        there = self._core.available_devices
        self._target = target or ("NPU" if "NPU" in there else "CPU")
        if self._target not in there:
            raise DeviceError(
                f"npu openvino: found the devices {', '.join(there)}, wanted {self._target}; "
                "install Intel's NPU driver, or use --npu off"
            )
        name = "openvino" if self._target == "NPU" else "openvino on the CPU"
        self._profile = Profile(name, per_channel=True, outputs=Outputs.INT8)
        self._graphs: dict[str, Graph] = {}
        self._compiled: dict[str, Any] = {}
        self._artefacts: Artefacts | None = None
        if folder is not None:
            target_name = f"openvino-{self._target.lower()}"
            self._artefacts = Artefacts(folder, target=target_name, maker=self._maker())

    @property
    def profile(self) -> Profile:
        return self._profile

    def _maker(self) -> dict[str, str]:
        import openvino

        maker = {
            "openvino": str(openvino.__version__),
            "device": str(self._core.get_property(self._target, "FULL_DEVICE_NAME")),
        }
        if self._target == "NPU":
            maker["driver"] = str(self._core.get_property("NPU", "NPU_DRIVER_VERSION"))
        return maker

    def load(self, graphs: Sequence[Graph], *, progress: Progress | None = None) -> None:
        """As the protocol has it; adds to those that it has, and tests one of each kind."""

        def compile_one(graph: Graph, place: Path | None) -> None:
            self._compiled[graph.name] = self._compile(graph, place)

        load_graphs(
            self,
            graphs,
            loaded=self._graphs,
            artefacts=self._artefacts,
            compile_one=compile_one,
            progress=progress,
        )

    def _compile(self, graph: Graph, place: Path | None) -> Any:
        try:
            if place is not None:
                return self._core.import_model((place / BLOB_FILE).read_bytes(), self._target)
            model = self._core.read_model(qdq.onnx_model(graph, self._profile.outputs))
            compiled = self._core.compile_model(model, self._target)
        except RuntimeError as error:
            what = "compile" if place is None else f"load from {place}"
            raise DeviceError(
                f"npu {self._profile.name}: {graph.name} does not {what} ({_line(error)}); "
                "use --npu off"
            ) from error
        if compiled.get_property("EXECUTION_DEVICES") not in ([self._target], self._target):
            raise DeviceError(
                f"npu {self._profile.name}: {graph.name}: found it compiled for "
                f"{compiled.get_property('EXECUTION_DEVICES')}, wanted {self._target}"
            )
        self._keep(graph, compiled)
        return compiled

    def _keep(self, graph: Graph, compiled: Any) -> None:
        if self._artefacts is None:
            return
        try:
            blob = compiled.export_model()
            self._artefacts.make(graph, lambda at: _write(at / BLOB_FILE, blob))
        except (EluteError, RuntimeError) as error:
            log.log(NOTE, "%s; compiled graphs are not kept", _line(error))
            self._artefacts = None

    def run(self, graph: str, x: I8) -> list[npt.NDArray[Any]]:
        """As the protocol has it."""
        loaded = checks.graph_named(self._graphs, graph, self._profile.name)
        checks.check_input(loaded, x)
        try:
            outputs = self._compiled[graph](x)
        except RuntimeError as error:
            raise DeviceError(
                f"npu {self._profile.name}: {graph} does not run ({_line(error)}); use --npu off"
            ) from error
        # What is returned is the device's own memory, which its next run writes.
        copies = [outputs[i].copy() for i in range(len(outputs))]
        return checks.check_outputs(loaded, self._profile, copies, self._profile.name)

    def close(self) -> None:
        self._compiled.clear()
        self._graphs.clear()


def _write(file: Path, blob: Any) -> None:
    data = blob.getvalue() if hasattr(blob, "getvalue") else bytes(blob)
    file.write_bytes(data)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
