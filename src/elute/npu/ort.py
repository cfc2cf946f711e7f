"""ONNX Runtime's devices: Qualcomm's HTP by its QNN provider, and the CPU provider to compare with.

On x86 the QNN provider is a compiler and an emulator of the HTP: right, and far slower than elute's
own kernels. Nothing may fall back: sessions forbid it, and a trace shows which provider ran what.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from elute.errors import NOTE, DeviceError, EluteError, UnsupportedError
from elute.npu import checks, qdq
from elute.npu.artefacts import Artefacts, load_graphs
from elute.npu.device import Graph, Outputs, Profile, Progress
from elute.npu.soc import EMULATED, Soc
from elute.types import I8

log = logging.getLogger(__name__)

Provider = Literal["qnn", "cpu"]
PROFILES = {
    "qnn": Profile("qnn", per_channel=True, outputs=Outputs.INT8),
    "cpu": Profile("cpu", per_channel=True, outputs=Outputs.INT32),
}
PROVIDER_NAMES = {"qnn": "QNNExecutionProvider", "cpu": "CPUExecutionProvider"}
MODEL_FILE = "model.onnx"
# Compiled graphs depend on these: another set is another qdq.FORM. Mode 3 optimizes most; for
# matrix products it takes no longer than the default.
HTP_OPTIONS = {"htp_performance_mode": "burst", "htp_graph_finalization_optimization_mode": "3"}
QUIET = 4  # ONNX Runtime's levels: fatal errors only; what it refuses, it raises


def emulated() -> bool:
    """Whether the QNN provider of this machine emulates: there is no HTP beside an x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def runtime() -> Any:
    """The module onnxruntime. Raises DeviceError, saying what to install."""
    try:
        import onnxruntime

        onnxruntime.InferenceSession  # noqa: B018 (where its library fails, the module may be empty)
    except Exception as error:  # a broken installation raises anything
        raise DeviceError(
            f"npu: onnxruntime does not load ({_line(error)}); pip install 'elute[npu]'"
        ) from None
    return onnxruntime


@functools.cache
def qnn_device() -> tuple[Any, str]:
    """The QNN provider's device and the path of its backend.

    Raises DeviceError without the package or without a device.
    """
    ort = runtime()
    try:
        import onnxruntime_qnn as qnn
    except Exception as error:  # a broken installation raises anything
        raise DeviceError(
            f"npu qnn: onnxruntime-qnn does not load ({_line(error)}); pip install 'elute[npu]'"
        ) from None
    try:
        ort.register_execution_provider_library(qnn.EP_NAME, qnn.get_library_path())
    except Exception as error:  # its errors have no common class
        if "already registered" not in str(error):
            raise DeviceError(f"npu qnn: its library does not load ({_line(error)})") from error
    kinds = ort.OrtHardwareDeviceType
    wanted = kinds.CPU if emulated() else kinds.NPU
    for device in ort.get_ep_devices():
        if device.ep_name == qnn.EP_NAME and device.device.type == wanted:
            return device, str(qnn.get_qnn_htp_path())
    raise DeviceError("npu qnn: found no HTP on this machine; use --npu off")


class Ort:
    """The devices `qnn` and `cpu`.

    folder  where compiled graphs are kept, else they are compiled by each process (qnn only)
    soc     the chip to compile for; without, EMULATED where it is emulated, else the one there is
    traces  where ONNX Runtime writes what ran where, one file a graph; see `nodes_by_provider`

    Raises DeviceError where the provider is not there.
    """

    def __init__(
        self,
        provider: Provider,
        *,
        folder: Path | None = None,
        soc: Soc | None = None,
        traces: Path | None = None,
    ) -> None:
        if provider not in PROFILES:
            raise UnsupportedError(f"npu: found the provider {provider}, wanted qnn or cpu")
        self._profile, self._traces = PROFILES[provider], traces
        self._ort = runtime()
        self._graphs: dict[str, Graph] = {}
        self._sessions: dict[str, Any] = {}
        self._soc = soc or (EMULATED if emulated() else None)
        self._artefacts: Artefacts | None = None
        if provider == "qnn":
            qnn_device()  # fails now rather than at the first graph
            if folder is not None:
                self._artefacts = artefacts(folder, self._soc)

    @property
    def profile(self) -> Profile:
        return self._profile

    def load(self, graphs: Sequence[Graph], *, progress: Progress | None = None) -> None:
        """As the protocol has it; adds to those that it has, and tests one of each kind."""

        def compile_one(graph: Graph, place: Path | None) -> None:
            self._sessions[graph.name] = self._session_of(graph, place)

        load_graphs(
            self,
            graphs,
            loaded=self._graphs,
            artefacts=self._artefacts,
            compile_one=compile_one,
            progress=progress,
        )

    def _session_of(self, graph: Graph, place: Path | None) -> Any:
        if place is None and self._artefacts is not None:
            try:
                place = compile_to(self._artefacts, graph, self._soc)
            except DeviceError:
                raise
            except EluteError as error:
                log.log(NOTE, "%s; compiled graphs are not kept", error)
                self._artefacts = None
        if place is None:
            return self._session(graph, qdq.onnx_model(graph, self._profile.outputs))
        return self._session(graph, str(place / MODEL_FILE))

    def _session(self, graph: Graph, model: bytes | str) -> Any:
        options = session_options()
        if self._traces is not None:
            self._traces.mkdir(parents=True, exist_ok=True)
            options.enable_profiling = True
            options.profile_file_prefix = str(self._traces / f"{len(self._sessions):04}")
        return open_session(graph.name, model, options, self._profile.name, self._soc)

    def run(self, graph: str, x: I8) -> list[npt.NDArray[Any]]:
        """As the protocol has it."""
        loaded = checks.graph_named(self._graphs, graph, self._profile.name)
        checks.check_input(loaded, x)
        fed = x if self._profile.outputs is Outputs.INT8 else qdq.unsigned(x)
        try:
            outputs = self._sessions[graph].run(None, {qdq.INPUT: fed})
        except Exception as error:  # its errors have no common class
            raise DeviceError(
                f"npu {self._profile.name}: {graph} does not run ({_line(error)}); use --npu off"
            ) from error
        return checks.check_outputs(loaded, self._profile, outputs, self._profile.name)

    def close(self) -> None:
        """Writes traces to the end."""
        if self._traces is not None:
            for session in self._sessions.values():
                session.end_profiling()
        self._sessions.clear()
        self._graphs.clear()


def artefacts(folder: Path, soc: Soc | None) -> Artefacts:
    """Context binaries for a chip, in a folder."""
    target = "qnn" if soc is None else f"qnn-{soc.name}"
    maker = {name: version(name) or "" for name in ("onnxruntime-qnn", "onnxruntime")}
    return Artefacts(folder, target=target, maker=maker)


def compile_to(kept: Artefacts, graph: Graph, soc: Soc | None) -> Path:
    """-> where the graph's context binary is kept now. Its compiler's session is dropped: one that
    is opened from the binary takes half of the memory, and every start runs the same bytes."""
    model = qdq.onnx_model(graph, Outputs.INT8)

    def write(place: Path) -> None:
        options = session_options()
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(place / MODEL_FILE))
        options.add_session_config_entry("ep.context_embed_mode", "0")
        open_session(graph.name, model, options, "qnn", soc)

    return kept.make(graph, write)


def compile_offline(
    graphs: Sequence[Graph], soc: Soc, folder: Path, *, progress: Progress | None = None
) -> int:
    """Fills the folder with context binaries for a chip, which may be another than this machine's.
    `Ort("qnn", soc=soc, folder=folder)` takes them. -> how many were not there yet.

    Raises UnsupportedError for graphs that an HTP refuses, DeviceError where the compiler fails.
    """
    checks.accept(graphs, PROFILES["qnn"])
    qnn_device()
    kept = artefacts(folder, soc)
    missing = [graph for graph in graphs if kept.find(graph) is None]
    kept.say_stale()
    for done, graph in enumerate(missing, 1):
        compile_to(kept, graph, soc)
        if progress is not None:
            progress("npu: compile", done, len(missing))
    return len(missing)


def session_options() -> Any:
    options = runtime().SessionOptions()
    options.log_severity_level = QUIET
    # A session a graph: each with threads or arenas of its own would be hundreds.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    return options


def open_session(
    name: str, model: bytes | str, options: Any, provider: str, soc: Soc | None
) -> Any:
    """Raises DeviceError where the provider refuses: no other one is tried."""
    listed: list[str] | None = None
    if provider == "qnn":
        device, backend = qnn_device()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        asked = {"backend_path": backend, **HTP_OPTIONS}
        if soc is not None:
            asked |= {"htp_arch": str(soc.arch), "soc_model": str(soc.model)}
        options.add_provider_for_devices([device], asked)
    else:
        listed = [PROVIDER_NAMES[provider]]
    try:
        with _stdout_aside():
            session = runtime().InferenceSession(
                model, options, providers=listed, enable_fallback=0
            )
    except Exception as error:  # its errors have no common class
        what = "compile" if isinstance(model, bytes) else f"load from {model}"
        raise DeviceError(
            f"npu {provider}: {name} does not {what} ({_line(error)}); use --npu off"
        ) from error
    if session.get_providers()[0] != PROVIDER_NAMES[provider]:
        raise DeviceError(
            f"npu {provider}: {name}: found the providers {session.get_providers()}, "
            f"wanted {PROVIDER_NAMES[provider]} first"
        )
    return session


@contextmanager
def _stdout_aside() -> Iterator[None]:
    """Qualcomm's libraries greet on stdout, where answers go: sends that to stderr instead."""
    try:
        kept = os.dup(1)
    except OSError:  # closed
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def nodes_by_provider(traces: Path) -> Counter[str]:
    """How many nodes each provider ran, of all traces in a folder."""
    ran: Counter[str] = Counter()
    for file in sorted(traces.glob("*.json")):
        for event in json.loads(file.read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                ran[event["args"]["provider"]] += 1
    return ran


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
