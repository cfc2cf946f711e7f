"""Which devices this machine has, and the one that `--npu` names.

`auto` takes real NPUs only; an emulator or the numpy device is taken where it is named. Whether an
NPU is also faster than this CPU is measured by who asks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from elute.errors import NOTE, DeviceError, UnsupportedError
from elute.npu.device import Device
from elute.npu.soc import Soc, soc_named

log = logging.getLogger(__name__)

NAMES = ("auto", "sim", "qnn", "openvino", "cpu", "off")
REQUIRE = "require:"


@dataclass(frozen=True)
class Found:
    """A device of elute's and what stands behind it here.

    present   it can be opened
    emulated  by this CPU: right, and no faster than without; never taken by `auto`
    why       what it would run on, or why it cannot be opened
    version   of the package; empty without
    """

    name: str
    present: bool
    emulated: bool
    why: str
    version: str


class Opener(Protocol):
    def __call__(self, *, lean: bool = False) -> Device:
        """Makes the device. lean: one in this process that need not keep its weights does not."""


@dataclass(frozen=True)
class Choice:
    """What `--npu` came to. open: makes the device; None: prompts stay on the CPU, for `why`."""

    open: Opener | None
    found: Found | None
    why: str


def survey() -> list[Found]:
    """All devices, those that `auto` prefers first. Loads the runtimes that are installed."""
    return [find() for find in _FINDERS.values()]


def taken_by_auto(found: Sequence[Found]) -> Found | None:
    """Of a survey: what is a real NPU and works."""
    return next((each for each in found if each.present and not each.emulated), None)


def choose(name: str, *, folder: Path | None = None) -> Choice:
    """What `--npu name` means here.

    name    one of NAMES, or "require:" before one: then a missing device fails, else it leaves
            prompts to the CPU. "qnn:CHIP" takes and compiles graphs for a chip of soc.SOCS, which
            on x86 is emulated; without, for the one that is there
    folder  where compiled graphs are kept

    Raises UnsupportedError for another name, DeviceError where what is required is missing.
    """
    required = name.startswith(REQUIRE)
    wanted, _, chip = name.removeprefix(REQUIRE).partition(":")
    if wanted not in NAMES or name == f"{REQUIRE}off" or (chip and wanted != "qnn"):
        raise UnsupportedError(
            f"--npu: found {name}, wanted one of {', '.join(NAMES)}, or {REQUIRE} before a device"
        )
    soc = soc_named(chip) if chip else None
    if wanted == "off":
        return Choice(None, None, "--npu off")
    found = survey() if wanted == "auto" else [_FINDERS[wanted]()]  # each loads a runtime
    if wanted == "auto":
        taken = taken_by_auto(found)
        missing = "; ".join(each.why for each in found if each.name in ("qnn", "openvino"))
        why = f"no NPU here ({missing})" if taken is None else taken.why
    else:
        (named,) = found
        taken, why = (named if named.present else None), named.why
    if taken is None and required:
        raise DeviceError(f"--npu {name}: {why}; use --npu off")
    if taken is None:
        if wanted != "auto":
            log.log(NOTE, "--npu %s: %s; prompts run on the CPU", name, why)
        return Choice(None, None, why)
    if taken.emulated:
        log.log(NOTE, "--npu %s: %s", name, why)
    return Choice(_opener(taken.name, folder, soc), taken, why)


def _opener(name: str, folder: Path | None, soc: Soc | None) -> Opener:
    def open_device(*, lean: bool = False) -> Device:
        if name == "sim":
            from elute.npu.sim import Keep, Sim

            return Sim(keep=Keep.NOTHING if lean else Keep.INT8)
        if name == "openvino":
            from elute.npu.openvino import OpenVino

            return OpenVino(folder=folder)
        from elute.npu.ort import Ort

        return Ort("qnn", folder=folder, soc=soc) if name == "qnn" else Ort("cpu")

    return open_device


def _qnn() -> Found:
    from elute.npu import ort

    version = ort.version("onnxruntime-qnn") or ""
    try:
        ort.qnn_device()
        _onnx()
    except DeviceError as error:
        return Found("qnn", False, False, str(error), version)
    if ort.emulated():
        return Found("qnn", True, True, "Qualcomm's HTP, emulated by this CPU", version)
    return Found("qnn", True, False, "Qualcomm's HTP", version)


def _openvino() -> Found:
    from elute.npu import openvino, ort

    version = ort.version("openvino") or ""
    try:
        targets = openvino.targets()
        _onnx()
    except DeviceError as error:
        return Found("openvino", False, False, str(error), version)
    if "NPU" in targets:
        return Found("openvino", True, False, "Intel's NPU", version)
    return Found("openvino", True, True, "OpenVINO finds no NPU and would use this CPU", version)


def _cpu() -> Found:
    from elute.npu import ort

    version = ort.version("onnxruntime") or ""
    try:
        ort.runtime()
        _onnx()
    except DeviceError as error:
        return Found("cpu", False, True, str(error), version)
    return Found("cpu", True, True, "ONNX Runtime on this CPU", version)


def _sim() -> Found:
    import numpy as np

    return Found("sim", True, True, "numpy on this CPU", np.__version__)


_FINDERS = {"qnn": _qnn, "openvino": _openvino, "cpu": _cpu, "sim": _sim}


def _onnx() -> None:
    """Raises DeviceError where graphs cannot be written."""
    try:
        import onnx  # noqa: F401
    except Exception as error:  # a broken installation raises anything
        raise DeviceError(
            f"npu: the package onnx does not load ({error}); pip install 'elute[npu]'"
        ) from None
