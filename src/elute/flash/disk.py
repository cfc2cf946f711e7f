"""What the disk gives under a model: measured once, by reading the model's own weights.

A read takes `request_s` and its bytes: so much for having been asked for, then so much a byte. What
was found is kept in disks.json in the cache folder, for this device and kernel.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from elute import _native
from elute.errors import NOTE, DeviceError, NoHomeError
from elute.flash.plan import BLOCK
from elute.flash.weights import pages
from elute.formats import kept
from elute.formats.sources import cache_dir

log = logging.getLogger(__name__)

KIB, MIB = 1 << 10, 1 << 20
MOST_IN_FLIGHT = 8 * MIB  # what is asked for when the time is over is waited for all the same
SEQUENTIAL = [
    (depth, size)
    for size in (MIB, 512 * KIB, 128 * KIB, 2 * MIB)
    for depth in (8, 4, 2, 16)
    if depth * size <= MOST_IN_FLIGHT
]
MOST_DEPTH = 32  # with threads, each is one
RANDOM_BYTES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB)
RANDOM_DEPTH = 8
RANDOM_OFFSETS = 1 << 12
SEQUENTIAL_S, RANDOM_S, AGAIN_S = 0.014, 0.025, 0.06
LIMIT_S = 0.45  # of all of them, for disks that are too slow for this
TURNS = 3
ENOUGH = 0.93  # of the best rate; a rate varies by as much from one window to the next
FORMAT, VERSION = "elute-disks", 1


@dataclass(frozen=True)
class Disk:
    """What reads past the page cache give.

    sequential_bytes_s  of `depth` requests of `request_bytes` in flight, which `choose` chose
    request_s, bytes_s  a random read of b bytes takes request_s + b / bytes_s, RANDOM_DEPTH of them
                        in flight
    reader              what read
    """

    sequential_bytes_s: float
    request_s: float
    bytes_s: float
    depth: int
    request_bytes: int
    reader: str

    def depth_of(self, piece_bytes: int) -> int:
        """How many reads of pieces keep as many bytes in flight as `depth` whole requests do."""
        each = min(self.request_bytes, piece_bytes)
        return max(self.depth, min(MOST_DEPTH, -(-self.depth * self.request_bytes // each)))

    @property
    def gap_bytes(self) -> int:
        """Unwanted bytes between two wanted pieces that are read along rather than left out.

        A quarter of what a request costs, since many overlap: of a 7B shape by channel, 12 to 36
        KiB gave 1.9 tokens/s; 100 KiB, what 20 us at 5 GB/s amount to, 1.7.
        """
        return round(self.request_s * self.bytes_s / 4)

    def read_s(self, n_bytes: int) -> float:
        """Of a random read among others."""
        return self.request_s + n_bytes / self.bytes_s


@dataclass(frozen=True)
class Device:
    """All that a measurement depends on. `number` is st_dev; the size tells a disk from another
    that got its number."""

    number: int
    size: int
    kernel: str

    @classmethod
    def of(cls, path: Path) -> Device:
        """Of the file system that holds `path`."""
        about = os.statvfs(path)
        return cls(os.stat(path).st_dev, about.f_blocks * about.f_frsize, platform.release())


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(bytes, seconds a read) of at least two sizes -> (seconds a request, bytes a second).

    Least squares of the relative errors, so that small reads count as much as large ones; a request
    costs at least nothing.
    """
    sizes, seconds = np.array(points, np.float64).T
    terms = np.stack([1 / seconds, sizes / seconds], 1)  # times (request_s, 1 / bytes_s) is near 1
    request_s, a_byte = np.linalg.lstsq(terms, np.ones(len(points)), rcond=None)[0]
    if request_s < 0 or a_byte <= 0:
        request_s, a_byte = 0.0, terms[:, 1].sum() / np.square(terms[:, 1]).sum()
    return float(request_s), float(1 / a_byte)


def choose(rates: Mapping[tuple[int, int], float]) -> tuple[int, int]:
    """Bytes a second by (depth, request_bytes) -> of those that give ENOUGH of the best rate, the
    one with the most bytes in flight, then the fewest requests.

    Bytes in flight are the window's, which is there anyway, and give the disk work while the
    thread that asks is held back: beside two threads that multiply, 2 requests of 1 MiB read 4 %
    less than 8, though they read as much alone.
    """
    enough = ENOUGH * max(rates.values())
    return max(
        (at for at, rate in rates.items() if rate >= enough),
        key=lambda at: (at[0] * at[1], at[1]),
    )


def measured(file: Path, *, folder: Path | None = None) -> Disk:
    """Of the device that holds `file`, a weight file: what was kept, else measured now.

    folder  of the cache file; cache_dir() when None

    Raises DeviceError for a file that cannot be read.
    """
    found = known(file, folder=folder)
    if found is not None:
        return found
    try:
        device, kept_in = Device.of(file), cache_file(folder)
    except OSError as error:
        raise DeviceError(f"{error}; check the model's files") from None
    disk = _measure_once(file, device)
    if kept_in is None:
        log.info("found no home folder to keep the measurement in; each start measures again")
        return disk
    _write(kept_in, _read(kept_in) | {device: disk})
    return disk


def known(path: Path, *, folder: Path | None = None) -> Disk | None:
    """What is kept of the device that holds `path`."""
    file = cache_file(folder)
    try:
        return None if file is None else _read(file).get(Device.of(path))
    except OSError:  # nothing is there
        return None


def cache_file(folder: Path | None = None) -> Path | None:
    """Where measurements are kept: in `folder` or cache_dir(); None without a home folder."""
    try:
        return (folder or cache_dir()) / "disks.json"
    except NoHomeError:
        return None


@functools.cache
def _measure_once(file: Path, _device: Device) -> Disk:
    """Once a process, for where no file can keep it."""
    log.log(NOTE, "measuring the disk under %s, once", file.parent)
    return measure(file)


def measure(file: Path, *, reader: str = "auto") -> Disk:
    """Reads the file for about LIMIT_S, in MOST_IN_FLIGHT of memory.

    Raises DeviceError for a file that cannot be read.
    """
    try:
        return _measure(file, reader)
    except (OSError, RuntimeError) as error:  # RuntimeError: the native std::system_error
        raise DeviceError(f"{error}; check the model's files") from None


def _measure(file: Path, reader: str) -> Disk:
    size = file.stat().st_size // BLOCK * BLOCK
    memory = pages(MOST_IN_FLIGHT)
    memory[::BLOCK] = 1  # there before the clock runs
    started = time.perf_counter()
    name = reader

    def seconds(offsets: list[int], n_bytes: int, depth: int, budget_s: float) -> float:
        """Of a read, from the first request to the last answer over their number."""
        nonlocal name
        n_reads, took, name = _native.time_reads(
            str(file), offsets, n_bytes, depth, memory, budget_s, reader
        )
        return took / n_reads

    draw = random.Random(0)
    points: list[tuple[int, float]] = []
    for n_bytes in RANDOM_BYTES:
        most = (size - n_bytes) // BLOCK
        if most < 0 or (len(points) > 1 and time.perf_counter() - started > LIMIT_S):
            break
        offsets = [BLOCK * draw.randint(0, most) for _ in range(RANDOM_OFFSETS)]
        points.append((n_bytes, seconds(offsets, n_bytes, RANDOM_DEPTH, RANDOM_S)))
    rates: dict[tuple[int, int], float] = {}
    for i, (depth, n_bytes) in enumerate(SEQUENTIAL):
        if n_bytes > size or (rates and time.perf_counter() - started > LIMIT_S):
            continue
        # Each from another place, so that none reads what a cache below kept of the last.
        offsets = _in_turn(size, n_bytes, i * (size // n_bytes) // len(SEQUENTIAL))
        rates[depth, n_bytes] = n_bytes / seconds(offsets, n_bytes, depth, SEQUENTIAL_S)
    if not rates or len(points) < 2:  # a file of some pages: read it as it is
        depth, n_bytes = 1, max(BLOCK, size)
        rates = {(depth, n_bytes): n_bytes / seconds([0], n_bytes, depth, SEQUENTIAL_S)}
        points = [
            (BLOCK, BLOCK / rates[depth, n_bytes]),
            (2 * BLOCK, 2 * BLOCK / rates[depth, n_bytes]),
        ]
    depth, n_bytes = choose(rates)
    again = _in_turn(size, n_bytes, size // n_bytes // 2)
    rate = n_bytes / seconds(again, n_bytes, depth, AGAIN_S)
    request_s, bytes_s = fit(points)
    return Disk(rate, request_s, bytes_s, depth, n_bytes, name)


def rate_now(file: Path, disk: Disk) -> float:
    """Bytes a second of `disk`'s requests, at this moment: the median of a few.

    Raises DeviceError for a file that cannot be read.
    """
    rates = []
    try:
        size = file.stat().st_size // BLOCK * BLOCK
        if size == 0:
            raise OSError(f"{file}: found {file.stat().st_size} bytes, wanted at least {BLOCK}")
        n_bytes = min(disk.request_bytes, size)
        depth = min(disk.depth, size // n_bytes)
        memory = pages(depth * n_bytes)
        for turn in range(TURNS):
            offsets = _in_turn(size, n_bytes, turn * (size // n_bytes) // TURNS)
            n_reads, took, _ = _native.time_reads(
                str(file), offsets, n_bytes, depth, memory, AGAIN_S, "auto"
            )
            rates.append(n_reads * n_bytes / took)
    except (OSError, RuntimeError) as error:  # RuntimeError: the native std::system_error
        raise DeviceError(f"{error}; check the model's files") from None
    return sorted(rates)[TURNS // 2]


def _in_turn(size: int, n_bytes: int, start: int) -> list[int]:
    """Offsets of all requests of a file, from the one of number `start` on and round."""
    offsets = [*range(0, size - n_bytes + 1, n_bytes)]
    cut = start % len(offsets)
    return offsets[cut:] + offsets[:cut]


def _read(file: Path) -> dict[Device, Disk]:
    return kept.read(file, _parse, what="disks") or {}


def _parse(text: str) -> dict[Device, Disk]:
    told = json.loads(text)
    if (told["format"], told["version"]) != (FORMAT, VERSION):
        raise ValueError(f"found {told['format']} {told['version']}, wanted {FORMAT} {VERSION}")
    disks: dict[Device, Disk] = {}
    for entry in told["disks"]:
        disk = Disk(**entry["disk"])
        rates = disk.sequential_bytes_s, disk.bytes_s
        if not (
            all(0 < rate < math.inf for rate in rates)
            and 0 <= disk.request_s < math.inf
            and disk.depth in range(1, 1025)
            and disk.request_bytes in range(BLOCK, (1 << 30) + 1, BLOCK)
        ):
            raise ValueError(f"found {disk}")
        disks[Device(**entry["device"])] = disk
    return disks


def _write(file: Path, disks: Mapping[Device, Disk]) -> None:
    entries = [{"device": asdict(device), "disk": asdict(disk)} for device, disk in disks.items()]
    kept.write(file, {"format": FORMAT, "version": VERSION, "disks": entries})
