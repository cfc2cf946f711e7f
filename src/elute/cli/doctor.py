"""`elute doctor`: what elute finds on this machine, for users and bug reports."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from elute.cli import options

LIBRARIES = ("numpy", "tokenizers", "safetensors", "gguf", "huggingface_hub", "jinja2")


@click.command("doctor")
@options.as_json
def command(as_json: bool) -> int:
    """Show CPU, memory, cache, NPUs and versions, and test the kernels of every instruction set.

    Of NPUs: what the system has, what --npu could use, and why not. Exits with 1 when a kernel is
    wrong or the native module does not load.
    """
    from elute.cli.screen import answer_json

    found = examine()
    if as_json:
        answer_json(found)
    else:
        click.echo(_page(found))
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """The keys of --json. Sizes in bytes."""
    import psutil

    from elute.bench.machine import cpu_name, memory_limit_bytes
    from elute.formats.sources import cache_dir
    from elute.runtime.threads import thread_choice

    cache, choice = cache_dir(), thread_choice()
    kernels = _kernels()
    return {
        "elute": _version("elute"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": choice.count,
        "threads_reason": str(choice),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": psutil.virtual_memory().available,
        "memory_limit_bytes": memory_limit_bytes(),
        "cache": str(cache),
        "cache_bytes": _size(cache),
        "disk_free_bytes": shutil.disk_usage(_existing(cache)).free,
        "disk": _disk(_existing(cache)),
        "npu": _npu(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        **kernels,
        "ok": kernels["native_error"] is None and all(kernels["kernel_test"].values()),
    }


def _disk(path: Path) -> dict[str, Any] | None:
    """What was measured of the disk that holds `path`."""
    try:
        from elute.flash import disk
    except ImportError:  # of the native module, which _kernels tells of
        return None
    known = disk.known(path)
    return None if known is None else asdict(known)


def _npu() -> dict[str, Any]:
    """What the system has, what could use it, and which of that --npu auto would try."""
    try:
        from elute.npu import find
        from elute.npu.hardware import npus
    except ImportError:  # of the native module, which _kernels tells of
        return {"hardware": [], "devices": [], "auto": None}
    surveyed = find.survey()
    taken = find.taken_by_auto(surveyed)
    return {
        "hardware": [{"name": name, "device": device} for name, device in npus()],
        "devices": [asdict(each) for each in surveyed],
        "auto": None if taken is None else taken.name,
    }


def _kernels() -> dict[str, Any]:
    """Instruction sets and whether each multiplies right; the best one, and its kernels."""
    from elute.errors import EluteError

    try:
        from elute.cli.kernel_choice import kernels_json
        from elute.kernels.registry import WIDTHS
        from elute.runtime.executor import isas
        from elute.runtime.self_test import kernels_are_right
    except ImportError as error:
        return {
            "isas": [],
            "isa": None,
            "kernels": [],
            "kernels_file": None,
            "kernel_test": {},
            "native_error": str(error),
        }
    tested: dict[str, bool] = {}
    error_text = None
    for isa in isas():
        try:
            tested[isa] = kernels_are_right(isa)
        except EluteError as error:
            tested[isa], error_text = False, str(error)
    return {
        "isas": list(tested),
        **kernels_json(None, WIDTHS, "auto"),
        "kernel_test": tested,
        "native_error": error_text,
    }


def _disk_line(disk: dict[str, Any] | None) -> str:
    """Of the cache's disk."""
    if disk is None:
        return "not measured yet; the first run or plan with --memory does"
    return (
        f"{disk['sequential_bytes_s'] / 1e9:.2f} GB/s in {disk['depth']} reads of "
        f"{disk['request_bytes'] >> 10} KiB at once by {disk['reader']}; a random read takes "
        f"{disk['request_s'] * 1e6:.0f} µs and {1e12 / disk['bytes_s']:.0f} µs a MB"
    )


def _npu_lines(npu: dict[str, Any]) -> list[str]:
    """What there is, then a line for each device."""
    named = [
        f"{each['name']} ({each['device'] or 'nothing in elute uses it'})"
        for each in npu["hardware"]
    ]
    auto = npu["auto"]
    would = "leaves prompts to this CPU" if auto is None else f"tries {auto}"
    return [
        f"{', '.join(named) or 'the system shows none'}; --npu auto {would}",
        *(
            f"{each['name']:<9} {each['version'] or 'missing':<10} {each['why']}"
            for each in npu["devices"]
        ),
    ]


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def _page(found: dict[str, Any]) -> str:
    from elute.cli.kernel_choice import kernel_lines
    from elute.cli.screen import MIB

    limit = found["memory_limit_bytes"]
    tests = ", ".join(
        f"{isa} {'right' if right else 'WRONG'}" for isa, right in found["kernel_test"].items()
    )
    first_npu_line, *npu_lines = _npu_lines(found["npu"])
    lines = [
        ("elute", f"{found['elute']}, Python {found['python']}, {found['system']}"),
        ("cpu", found["cpu"]),
        ("threads", found["threads_reason"]),
        (
            "memory",
            f"{found['memory_bytes'] / MIB:.0f} MiB, "
            f"{found['memory_available_bytes'] / MIB:.0f} MiB available, "
            + (f"limited to {limit / MIB:.0f} MiB" if limit is not None else "no limit"),
        ),
        (
            "cache",
            f"{found['cache']}: {found['cache_bytes'] / MIB:.0f} MiB, "
            f"{found['disk_free_bytes'] / MIB:.0f} MiB free",
        ),
        ("disk", _disk_line(found["disk"])),
        ("kernels", f"{tests or 'none'}; chosen: {found['isa']}"),
        *(("", line) for line in (kernel_lines(found) if found["kernels"] else [])),
        ("npu", first_npu_line),
        *(("", line) for line in npu_lines),
        ("libraries", ", ".join(f"{n} {v or 'MISSING'}" for n, v in found["libraries"].items())),
        ("verdict", "ready" if found["ok"] else f"not ready: {found['native_error'] or tests}"),
    ]
    return "\n".join(f"{name:<10}{value}" for name, value in lines)
