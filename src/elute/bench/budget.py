"""What a budget of memory gives on this machine: the plan, and the rate to expect.

Two rates are told. The bound is what reading alone allows: no order of work is faster. The expected
one is a walk through the plan (flash/walk.py) with the disk's measured rate and this machine's
measured pace; `plan` and the last lines of a run take it from the same function, `predict`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elute import _native
from elute.bench.ceilings import MeasuredCeilings
from elute.bench.pace import Pace, measured_pace
from elute.errors import DeviceError
from elute.flash.banks import GAP_BYTES
from elute.flash.plan import BLOCK, Plan, Use
from elute.flash.walk import Disk, walk
from elute.flash.weights import DEPTH, REQUEST_BYTES, Recorded, pages, uses
from elute.formats.packed import PackedModel
from elute.formats.packed_layout import MatrixRecord
from elute.kernels.registry import Choice
from elute.model.families import op_list
from elute.model.ops import Experts, Head, Linear, OpList
from elute.runtime import executor
from elute.runtime.memory import fit, parse_size
from elute.runtime.threads import default_threads
from elute.types import U8

if TYPE_CHECKING:
    from elute._native import WeightStream
    from elute.pack.foresee import Foreseen

PROBE_BYTES = 128 << 20  # read to learn the disk's rate; less where the model is smaller
PROBES = 3
LATENCY_BYTES = 64 << 10  # a read that takes latency rather than bytes
LATENCY_READS = 48
USUAL_LATENCY_S = 100e-6  # of an NVMe disk and two threads that wake each other
# What reading a tokenizer adds to a process: 5.6 MB for 512 tokens, 16 for 49k, 42 for 128k.
TOKENIZER_BYTES, TOKENIZER_BYTES_A_TOKEN = 6_000_000, 300


@dataclass(frozen=True)
class Prediction:
    """Of a token of generation. resident_bytes is the plan's total, which a run stays below."""

    tok_s: float
    read_bytes: int
    waited_s: float
    resident_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "tok_s": round(self.tok_s, 3),
            "read_bytes_per_token": self.read_bytes,
            "waited_s_per_token": round(self.waited_s, 5),
            "resident_bytes": self.resident_bytes,
            "page_cache_bytes": 0,
        }


def predict(
    plan: Plan, order: list[Use], pace: Pace, flash: Disk, *, sparsity: float = 0.0
) -> Prediction:
    """The one forecast of `elute plan` and of a run's last lines.

    order  uses() of the model; the pace of layers is shared among them by their bytes
    """
    if plan.staging:
        return _predict_banks(plan, pace, flash, sparsity)
    total = sum(use.total for use in order)
    found = walk(
        plan,
        order,
        use_s=[pace.layers_s * use.total / total for use in order],
        rest_s=pace.rest_s,
        disk=flash,
    )
    return Prediction(1 / found.seconds, plan.missed, found.waited_s, plan.total)


# A product by channel takes so much of one in panels, whatever counts, and so much for what counts
# (bench/channels.py, 4 bits, Zen 5).
CHANNELS_S, ACTIVE_S = 0.13, 1.35


def _predict_banks(plan: Plan, pace: Pace, flash: Disk, sparsity: float) -> Prediction:
    """What is wanted is known when its input is, so reading and computing take turns, as far as it
    cannot be foreseen. Any block that is not kept is as likely to be wanted as another."""
    by_channel = bool(sparsity) or any(bank.wanted == 1 for bank in plan.banks)
    layers_s = pace.layers_s
    if by_channel:
        layers_s *= CHANNELS_S + ACTIVE_S * (1 - sparsity)
    flash_s, foreseen = 0.0, 0.0
    for bank in plan.banks:
        away, share = bank.n_blocks - plan.slots[bank.name], bank.wanted
        # Small gaps are read along with what lies around them.
        gap = GAP_BYTES // bank.block_bytes
        reads = away * share * (1 - share) ** (gap + 1) + share
        along = sum(k * share * (1 - share) ** k for k in range(1, gap + 1))
        n_bytes = away * share * (1 + along) * bank.block_bytes
        flash_s += flash.latency_s + reads * flash.request_s + n_bytes / flash.bytes_s
        foreseen += share / len(plan.banks)
    waited = max(0.0, flash_s - foreseen * layers_s)
    return Prediction(1 / (layers_s + pace.rest_s + waited), plan.missed, waited, plan.total)


def predict_run(
    packed: PackedModel,
    plan: Plan,
    *,
    n_threads: int,
    cache_type: str,
    kernels: Mapping[int, Choice],
    sparsity: float = 0.0,
) -> Prediction:
    """The same for a run that is over and whose weights are gone, in the memory that they left.

    Raises DeviceError when the files cannot be read, BudgetError when the memory is not there.
    """
    _native.return_freed_memory()
    room = plan.total - plan.fixed["process"]
    pace = measured_pace(
        packed,
        packed.config,
        n_threads=n_threads,
        cache_type=cache_type,
        room=room - plan.fixed["scratch"],
        kernels=kernels,
    )
    _native.return_freed_memory()
    flash = flash_speed(packed, most=room) if plan.missed else usual_disk(1e9)
    order = uses(op_list(packed.config), packed)
    return predict(plan, order, pace, flash, sparsity=sparsity)


@dataclass(frozen=True)
class Forecast:
    """touched: bytes of weights that a token reads, from wherever they are; packed: whether the
    model is there already."""

    plan: Plan
    prediction: Prediction
    context: int
    touched: int
    flash_gb_s: float
    flash_latency_s: float
    dram_gb_s: float
    model_bytes: int
    bits_per_weight: float
    packed: bool

    @property
    def bound_tok_s(self) -> float:
        """What reading alone allows: flash and memory are read at the same time."""
        return 1 / self.plan.seconds(
            touched=self.touched,
            flash_bytes_s=self.flash_gb_s * 1e9,
            dram_bytes_s=self.dram_gb_s * 1e9,
        )

    @property
    def limit(self) -> str:
        flash_s = self.plan.missed / self.flash_gb_s
        return "flash" if flash_s > self.touched / self.dram_gb_s else "memory"

    def to_json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "packed": self.packed,
            "model_bytes": self.model_bytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "budget_bytes": plan.budget,
            "fixed_bytes": dict(plan.fixed),
            "pinned_bytes": plan.pinned_bytes,
            "window_bytes": plan.window,
            "total_bytes": plan.total,
            "missed_bytes": plan.missed,
            "touched_bytes": self.touched,
            "context": self.context,
            "flash_gb_s": round(self.flash_gb_s, 3),
            "flash_latency_s": round(self.flash_latency_s, 6),
            "dram_gb_s": round(self.dram_gb_s, 2),
            "tok_s": round(self.prediction.tok_s, 3),
            "waited_s_per_token": round(self.prediction.waited_s, 5),
            "bound_tok_s": round(self.bound_tok_s, 3),
            "limit": self.limit,
            "fits": not plan.missed,
        }


def forecast(
    packed: PackedModel | Foreseen,
    memory: str | int,
    *,
    context: int | None,
    threads: int | None,
    cache_type: str,
    flash_gb_s: float | None = None,
    cache_dir: Path | None = None,
    held: int | None = None,
    sparsity: float = 0.0,
    by_channel: bool = False,
) -> Forecast:
    """The plan that `load` would make, and the rates of this machine that it leads to.

    sparsity    the share of weights that does not count
    by_channel  whether `load` would put the model in channel order first

    flash_gb_s  measured when None: on the model's own files, or where it would be packed to
    cache_dir   where that is; formats.sources.cache_dir() when None
    held        what the process held before it read the headers of a model that is not packed;
                what it holds now when None

    Raises BudgetError for too little memory, DeviceError for files that cannot be read.
    """
    import psutil

    ops = op_list(packed.config)
    process = held or psutil.Process().memory_info().rss
    if isinstance(packed, PackedModel):
        from elute.formats.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_files(packed.tokenizer_files())  # a part of what load holds
        _native.return_freed_memory()
        process = psutil.Process().memory_info().rss
        del tokenizer
    else:
        process += TOKENIZER_BYTES + TOKENIZER_BYTES_A_TOKEN * ops.vocabulary
    n_threads = default_threads() if threads is None else threads
    found = fit(
        packed,
        ops,
        parse_size(memory),
        process=process,
        context=context,
        cache_type=cache_type,
        chunk=executor.CHUNK,
        n_threads=n_threads,
        by_channel=by_channel or bool(getattr(packed, "banks", {})),
        sparsity=sparsity,
    )
    if flash_gb_s is not None:
        flash = usual_disk(1e9 * flash_gb_s)
    elif isinstance(packed, PackedModel):
        flash = flash_speed(packed)
    else:
        flash = folder_speed(cache_dir)
    ceilings = MeasuredCeilings(executor.chosen_isa())(n_threads)
    pace = measured_pace(packed, packed.config, n_threads=n_threads, cache_type=cache_type)
    return Forecast(
        found.plan,
        predict(found.plan, uses(ops, packed), pace, flash, sparsity=sparsity),
        found.context,
        touched_bytes(ops, packed),
        flash.sequential_bytes_s / 1e9,
        flash.latency_s,
        ceilings.read_gb_s,
        packed.nbytes,
        packed.bits_per_weight,
        isinstance(packed, PackedModel),
    )


def touched_bytes(ops: OpList, packed: Recorded) -> int:
    """Planes, scales and offsets that one token reads: of all matrices but the embedding."""
    linear = [name for op in ops.ops if isinstance(op, Linear) for name in op.weights]
    for op in (op for op in ops.ops if isinstance(op, Experts)):
        linear += op.matrices()[: 3 * op.top_k]  # of as many experts as a token picks
    head = [op.weight for op in ops.ops if isinstance(op, Head)]
    return sum(
        part.n_bytes
        for name in (*linear, *head)
        if isinstance(record := packed.records[name], MatrixRecord)
        for part in record.parts()
        if part.suffix != ".columns"
    )


def flash_speed(packed: PackedModel, *, most: int = PROBE_BYTES) -> Disk:
    """Measured on the model's largest file. most: bytes that reading may hold."""
    path = packed.path / max(packed.files, key=lambda name: packed.files[name].size)
    return file_speed(path, packed.files[path.name].size, most=most)


def folder_speed(cache_dir: Path | None) -> Disk:
    """The same of the disk that a model is packed to, by a file that is written for it."""
    from elute.formats import sources

    folder = cache_dir or sources.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".rate-", dir=folder) as file:
            block = os.urandom(1 << 20)
            for _ in range(PROBE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return file_speed(Path(file.name), PROBE_BYTES)
    except OSError as error:
        raise DeviceError(
            f"{folder}: cannot be written to learn the rate of the disk ({error.strerror}); give "
            "it with --flash, or set ELUTE_HOME"
        ) from None


def file_speed(path: Path, size: int, *, most: int = PROBE_BYTES) -> Disk:
    """Past the page cache, the median of a few. Raises DeviceError when the file cannot be read."""
    blocks = size // BLOCK
    probe = min(PROBE_BYTES, blocks * BLOCK, most // BLOCK * BLOCK)
    memory = pages(probe)
    rates = []
    for i in range(PROBES):
        offset = (blocks * BLOCK - probe) * i // max(1, PROBES - 1) // BLOCK * BLOCK
        stream = _opened(path, [(0, offset, probe, 0)], memory)
        started = time.perf_counter()
        stream.load()
        rates.append(probe / (time.perf_counter() - started) / 1e9)
        _check(stream)
    rate = sorted(rates)[PROBES // 2]
    small, large = min(LATENCY_BYTES, probe), min(REQUEST_BYTES, probe)
    small_s, large_s = (_one_by_one(path, blocks, size, memory) for size in (small, large))
    request_rate = (large - small) / (large_s - small_s) if large_s > small_s else 1e9 * rate
    latency_s = max(0.0, small_s - small / request_rate)
    together_s = _together(path, blocks, small, memory)
    many_s = large / (1e9 * rate)  # of a large one among many
    if large > small and many_s > together_s:
        bytes_s = (large - small) / (many_s - together_s)
        request_s = max(0.0, many_s - large / bytes_s)
    else:
        bytes_s, request_s = 1e9 * rate, 0.0
    return Disk(bytes_s, latency_s, request_rate, REQUEST_BYTES, DEPTH, request_s)


def usual_disk(bytes_s: float) -> Disk:
    """One whose rate alone is known."""
    return Disk(bytes_s, USUAL_LATENCY_S, bytes_s, REQUEST_BYTES, DEPTH)


def _one_by_one(path: Path, blocks: int, n_bytes: int, memory: U8) -> float:
    """Seconds of a read that is asked for when the one before it has been used."""
    span = max(1, blocks - n_bytes // BLOCK)
    offsets = [span * i // LATENCY_READS * BLOCK for i in range(LATENCY_READS)]
    stream = _opened(path, [(0, offset, n_bytes, 0) for offset in offsets], memory)
    turns = [stream.read_through(i, 1) / LATENCY_READS for i in range(PROBES)]
    _check(stream)
    return sorted(turns)[PROBES // 2]


def _together(path: Path, blocks: int, n_bytes: int, memory: U8) -> float:
    """Seconds of a read among many that are under way."""
    count = max(1, min(LATENCY_READS, memory.size // n_bytes))
    span = max(1, blocks - n_bytes // BLOCK)
    pieces = [(0, span * i // count * BLOCK, n_bytes, i * n_bytes) for i in range(count)]
    stream = _opened(path, pieces, memory)
    turns = [stream.read_through(4 * i, 4) / count for i in range(PROBES)]
    _check(stream)
    return sorted(turns)[PROBES // 2]


def _opened(path: Path, pieces: list[tuple[int, int, int, int]], memory: U8) -> WeightStream:
    try:
        return _native.open_stream([str(path)], pieces, memory, "auto", DEPTH, REQUEST_BYTES, True)
    except RuntimeError as error:
        raise DeviceError(f"flash: {error}; check the model's files") from None


def _check(stream: WeightStream) -> None:
    if stream.failure:
        raise DeviceError(stream.failure)
