"""The NPUs that the system shows, whether or not anything of elute's can use them."""

from __future__ import annotations

from pathlib import Path

# The kernel's driver of an accelerator -> what it drives, and the device of elute's for it.
DRIVERS = {
    "intel_vpu": ("Intel's NPU", "openvino"),
    "amdxdna": ("AMD's NPU", None),
    "rocket": ("Rockchip's NPU", None),
    "qaic": ("Qualcomm's Cloud AI card", None),
}
# Files of Qualcomm's remote calls to the DSP that the HTP is part of: mainline's, then Android's.
HEXAGON = ("fastrpc-cdsp", "fastrpc-cdsp-secure", "adsprpc-smd", "adsprpc-smd-secure")


def npus(root: Path = Path("/")) -> list[tuple[str, str | None]]:
    """Of each kind once: what it is, and the device that would use it; None: elute has none.

    Linux and Android alone tell; elsewhere the list is empty.
    """
    found: dict[str, str | None] = {}
    for accelerator in sorted((root / "sys/class/accel").glob("accel*")):
        driver = accelerator / "device/driver"
        name = driver.resolve().name if driver.exists() else "unknown"
        what, user = DRIVERS.get(name, (f"an accelerator of the driver {name}", None))
        found[what] = user
    if any((root / "dev" / name).exists() for name in HEXAGON):
        found["Qualcomm's Hexagon"] = "qnn"
    return list(found.items())
