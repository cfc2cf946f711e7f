"""What a budget of memory gives on this machine: the plan, and the rate to expect.

Two rates are told. The bound is what reading alone allows: no order of work is faster. The expected
one is a rehearsal of the plan (bench/rehearsal.py), or, where none can be made, what this machine's
measured pace and disk make of it; `plan` and the last lines of a run take it from `predict`. Both
are measured, one after the other: where a disk's rate changes by the second, the expected one may
be above the bound.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elute import _native
from elute.bench.ceilings import MeasuredCeilings
from elute.bench.machine import available_bytes
from elute.bench.pace import Compute, Pace, layer_matrices, measured_pace
from elute.bench.rehearsal import Rehearsed, rehearse, rehearse_banks
from elute.errors import BudgetError, DeviceError, UnsupportedError
from elute.flash.banks import GAP_BYTES
from elute.flash.disk import RANDOM_DEPTH, Disk, measure, measured, rate_now
from elute.flash.plan import Plan
from elute.flash.weights import DEPTH, REQUEST_BYTES, Recorded, uses
from elute.formats import sources
from elute.formats.packed import PackedModel
from elute.formats.packed_layout import MatrixRecord
from elute.model.families import op_list
from elute.model.ops import Head, OpList
from elute.runtime import calibration, executor
from elute.runtime.memory import channels_read_less, fit, parse_size
from elute.runtime.store import has_experts
from elute.runtime.threads import default_threads

if TYPE_CHECKING:
    from elute.pack.foresee import Foreseen

PROBE_BYTES = 128 << 20  # written to learn the rate of a disk that no model is on yet
USUAL_REQUEST_S = 12e-6  # of a random read among others, from an NVMe disk
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


@dataclass(frozen=True)
class Flash:
    """The disk that a prediction is for. file: to be read for it, as long as the largest matrix or
    longer; None of a disk that is not here, whose rate alone is known."""

    disk: Disk
    file: Path | None


def predict(
    packed: Recorded,
    config: Mapping[str, Any],
    plan: Plan,
    flash: Flash | None,
    compute: Compute,
    *,
    room: int | None = None,
    sparsity: float = 0.0,
    cache_aware: float = 0.0,
) -> Prediction:
    """The one forecast of `elute plan` and of a run's last lines. Arguments as of measured_pace.

    flash  None where nothing is read
    """
    pace = measured_pace(packed, config, compute, room=room)
    _native.return_freed_memory()
    if flash is None or not plan.missed:
        if getattr(packed, "banks", {}):
            pace = replace(pace, layers_s=pace.layers_s * _by_channel(sparsity))
        return Prediction(1 / pace.token_s, 0, 0.0, plan.total)
    by_channel = bool(plan.staging) and not has_experts(config)
    told = None
    with suppress(BudgetError):  # more memory than is free
        if flash.file is not None and plan.places:
            told = rehearse(packed, config, plan, flash.file, flash.disk, compute)
        elif (
            flash.file is not None
            and isinstance(packed, PackedModel)
            and (packed.banks or not by_channel)  # else it would be put in channel order first
        ):
            told = rehearse_banks(
                packed, plan, flash.disk, compute, sparsity=sparsity, cache_aware=cache_aware
            )
    _native.return_freed_memory()
    if told is not None and plan.places:  # the window fills while the rest is computed
        hidden_s = min(pace.rest_s, plan.window / flash.disk.sequential_bytes_s)
        told = replace(told, waited_s=max(0.0, told.waited_s - hidden_s))
    if told is None and plan.places:
        # Reading and computing overlap as well as can be.
        read_s = plan.missed / flash.disk.sequential_bytes_s
        told = Rehearsed(pace.layers_s, max(0.0, read_s - pace.layers_s))
    elif told is None:
        # The disk as it is now: flash.disk may be of long ago.
        disk = flash.disk if flash.file is None else measure(flash.file)
        told = _foretold_banks(plan, pace, disk, sparsity if by_channel else None)
    token_s = told.worked_s + told.waited_s + pace.rest_s
    return Prediction(1 / token_s, plan.missed, told.waited_s, plan.total)


# A product by channel takes so much of one in panels, whatever counts, and so much for what counts
# (bench/channels.py, 4 bits, Zen 5).
CHANNELS_S, ACTIVE_S = 0.13, 1.35


def _by_channel(sparsity: float) -> float:
    """The time of a product by channel to that of one in panels."""
    return CHANNELS_S + ACTIVE_S * (1 - sparsity)


def _foretold_banks(plan: Plan, pace: Pace, disk: Disk, sparsity: float | None) -> Rehearsed:
    """What is wanted is known when its input is, so reading and computing take turns, as far as it
    cannot be foreseen. Any block that is not kept is as likely to be wanted as another.

    sparsity  of channels; None of experts
    """
    layers_s = pace.layers_s
    if sparsity is not None:
        layers_s *= _by_channel(sparsity)
    flash_s, foreseen = 0.0, 0.0
    for bank in plan.banks:
        away, share = bank.n_blocks - plan.slots[bank.name], bank.wanted
        # Small gaps are read along with what lies around them.
        gap = GAP_BYTES // bank.block_bytes
        reads = away * share * (1 - share) ** (gap + 1) + share
        along = sum(k * share * (1 - share) ** k for k in range(1, gap + 1))
        n_bytes = away * share * (1 + along) * bank.block_bytes
        # The first of them is waited for alone, as long as all that could have been in flight.
        flash_s += (RANDOM_DEPTH + reads) * disk.request_s + n_bytes / disk.bytes_s
        foreseen += share / len(plan.banks)
    return Rehearsed(layers_s, max(0.0, flash_s - foreseen * layers_s))


def predict_run(
    packed: PackedModel,
    plan: Plan,
    compute: Compute,
    *,
    sparsity: float = 0.0,
    cache_aware: float = 0.0,
) -> Prediction:
    """The same for a run that is over and whose weights are gone, in the memory that they left.

    Raises DeviceError when the files cannot be read, BudgetError when the memory is not there.
    """
    _native.return_freed_memory()
    file = packed.largest_shard
    return predict(
        packed,
        packed.config,
        plan,
        Flash(measured(file), file) if plan.missed else None,
        compute,
        room=plan.total - plan.fixed["process"] - plan.fixed["scratch"],
        sparsity=sparsity,
        cache_aware=cache_aware,
    )


@dataclass(frozen=True)
class Forecast:
    """touched: bytes of weights that a token reads, from wherever they are; packed: whether the
    model is there already."""

    plan: Plan
    prediction: Prediction
    context: int
    touched: int
    flash_gb_s: float
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
    by_channel  whether `load` would put the model in channel order first, where that reads less

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
        process = process_before_weights(packed, sparsity=sparsity)
    else:
        process += TOKENIZER_BYTES + TOKENIZER_BYTES_A_TOKEN * ops.vocabulary
    n_threads = default_threads() if threads is None else threads
    fitted = partial(
        fit,
        packed,
        ops,
        parse_size(memory),
        process=process,
        context=context,
        cache_type=cache_type,
        chunk=executor.CHUNK,
        n_threads=n_threads,
        sparsity=sparsity,
    )
    reorders = by_channel and channels_read_less(fitted)
    found = fitted(by_channel=reorders or bool(getattr(packed, "banks", {})))
    with _disk_under(packed, cache_dir, flash_gb_s) as flash:
        bytes_s = flash.disk.sequential_bytes_s
        if flash.file is not None:
            bytes_s = rate_now(flash.file, flash.disk)
        ceilings = MeasuredCeilings(executor.chosen_isa())(n_threads)
        compute = Compute(n_threads, cache_type)
        try:
            prediction = predict(
                packed, packed.config, found.plan, flash, compute, sparsity=sparsity
            )
        except BudgetError:  # of the machine as it is, not of the budget
            raise DeviceError(
                f"plan: found {available_bytes() >> 20} MiB of free memory, wanted room for a "
                "layer and the head, whose time is measured; close programs"
            ) from None
    return Forecast(
        found.plan,
        prediction,
        found.context,
        touched_bytes(ops, packed),
        bytes_s / 1e9,
        ceilings.read_gb_s,
        packed.nbytes,
        packed.bits_per_weight,
        isinstance(packed, PackedModel),
    )


def process_before_weights(packed: PackedModel, *, sparsity: float) -> int:
    """Bytes that the process holds with all that load has before it plans."""
    import psutil

    from elute.formats.chat_template import ChatTemplate
    from elute.formats.tokenizer import Tokenizer

    files = packed.tokenizer_files()
    held: list[object] = [Tokenizer.from_files(files)]
    with suppress(UnsupportedError):  # one without a template
        held.append(ChatTemplate.from_files(files))
    del files
    if sparsity:
        held.append(calibration.saved(packed, op_list(packed.config)))
    _native.return_freed_memory()
    process: int = psutil.Process().memory_info().rss
    return process


def touched_bytes(ops: OpList, packed: Recorded) -> int:
    """Planes, scales and offsets that one token reads: of all matrices but the embedding."""
    head = [op.weight for op in ops.ops if isinstance(op, Head)]
    total = 0
    for name in (*layer_matrices(ops, picked=True), *head):
        record = packed.records[name]
        assert isinstance(record, MatrixRecord)
        total += record.planes_bytes  # in panels or in a bank
        total += sum(p.n_bytes for p in record.parts() if p.suffix in (".scales", ".offsets"))
    return total


@contextmanager
def _disk_under(
    packed: PackedModel | Foreseen, cache_dir: Path | None, flash_gb_s: float | None
) -> Iterator[Flash]:
    """The disk that the model's files are on, or would be packed to. Raises DeviceError."""
    if flash_gb_s is not None:
        rate = 1e9 * flash_gb_s
        yield Flash(Disk(rate, USUAL_REQUEST_S, rate, DEPTH, REQUEST_BYTES, "none"), None)
    elif isinstance(packed, PackedModel):
        yield Flash(measured(packed.largest_shard), packed.largest_shard)
    else:
        folder = cache_dir or sources.cache_dir()
        order = uses(op_list(packed.config), packed)
        largest = max(size for use in order for size in use.n_bytes)
        with _some_file(folder, max(PROBE_BYTES, largest)) as file:
            yield Flash(measured(file), file)


@contextmanager
def _some_file(folder: Path, n_bytes: int) -> Iterator[Path]:
    """Of random bytes, gone afterwards."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".rate-", dir=folder))
            block = os.urandom(1 << 20)
            for _ in range(-(-n_bytes // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise DeviceError(
                f"{folder}: cannot be written to learn the rate of the disk ({error.strerror}); "
                "give it with --flash, or set ELUTE_HOME"
            ) from None
        yield Path(file.name)
