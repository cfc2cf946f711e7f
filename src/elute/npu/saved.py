"""A calibration for static int8 scales as a file beside the model's own."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import FormatError
from elute.formats import kept
from elute.npu.calibrate import SiteStatistics
from elute.npu.choices import CHOICES
from elute.npu.ranges import BINS, Range
from elute.npu.sites import Site
from elute.types import F32

log = logging.getLogger(__name__)

FILE = "npu.safetensors"
VERSION = "2"
_EFFECTS = ",".join(map(str, CHOICES))


def save(path: Path, statistics: Mapping[str, SiteStatistics], *, model: str) -> None:
    """Whole or not at all. model: what they were measured of. A folder that cannot be written: a
    warning.
    """
    from safetensors.numpy import save as to_bytes

    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, found in statistics.items():
        arrays[f"{name}.input.histogram"] = found.input.histogram
        arrays[f"{name}.input.channels"] = found.input.channels
        arrays[f"{name}.effects"] = np.array([found.effects[c] for c in CHOICES])
        arrays[f"{name}.tokens"] = np.array([found.tokens])
        for choice, counts in found.outliers.items():
            arrays[f"{name}.outliers.{choice}"] = counts
        for i, (output, peaks) in enumerate(zip(found.outputs, found.peaks, strict=True)):
            arrays[f"{name}.{i}.histogram"] = output.histogram
            arrays[f"{name}.{i}.channels"] = output.channels
            arrays[f"{name}.{i}.peaks"] = peaks
    told = {"version": VERSION, "model": model, "effects": _EFFECTS, "sha256": _digest(arrays)}
    content = to_bytes(arrays, told)
    try:
        kept.replace(path, content)
    except OSError as error:
        log.warning(
            "%s: cannot be written (%s); the model is calibrated again at the next start",
            path,
            error.strerror,
        )


def load(path: Path, sites: Sequence[Site], *, model: str) -> dict[str, SiteStatistics] | None:
    """None where there is none for this model. Raises FormatError for a broken file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            told = file.metadata() or {}
            if {**told, "version": VERSION, "model": model, "effects": _EFFECTS} != told:
                log.warning("%s: was made for another model or version; made anew", path)
                return None
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if _digest(arrays) != told.get("sha256"):
                raise ValueError("its checksum is another")
            return {site.name: _site(arrays, site) for site in sites}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FormatError(
            f"{path}: found a file that cannot be read ({error}), wanted a calibration; remove it, "
            "and it is made again"
        ) from None


def _digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """A flipped bit in a count would be another scale, and nobody would know."""
    whole = hashlib.sha256()
    for name in sorted(arrays):
        whole.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        whole.update(arrays[name].tobytes())
    return whole.hexdigest()


def _site(arrays: Mapping[str, npt.NDArray[Any]], site: Site) -> SiteStatistics:
    name = site.name

    def array(key: str, kind: type[np.generic], size: int | None = None) -> npt.NDArray[Any]:
        found = arrays[f"{name}.{key}"]
        right = found.dtype == kind and found.ndim == 1 and size in (None, found.size)
        if not (right and np.isfinite(found).all() and found.min(initial=0) >= 0):
            raise ValueError(f"{name}.{key} has another shape, type or values")
        return found

    channels: F32 = array("input.channels", np.float32)
    effects = array("effects", np.float64, len(CHOICES)).tolist()
    outputs, peaks = [], []
    for i in range(len(site.weights)):
        peaks.append(array(f"{i}.peaks", np.float32))
        own = array(f"{i}.channels", np.float32, peaks[-1].size)
        outputs.append(Range(array(f"{i}.histogram", np.int64, BINS), own))
    tokens = int(array("tokens", np.int64, 1)[0])
    if not (tokens and math.isfinite(sum(effects))):
        raise ValueError(f"{name} is of no tokens")
    return SiteStatistics(
        Range(array("input.histogram", np.int64, BINS), channels),
        tuple(outputs),
        {c: array(f"outliers.{c}", np.int64, channels.size) for c in CHOICES if c.shadow},
        tokens,
        tuple(peaks),
        dict(zip(CHOICES, effects, strict=True)),
    )
