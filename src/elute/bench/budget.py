"""What a budget of memory gives on this machine: the plan, and the rate that its bounds allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elute import _native
from elute.bench.ceilings import MeasuredCeilings
from elute.bench.traffic import traffic
from elute.flash import disk
from elute.flash.plan import Plan
from elute.kernels import kv_cache
from elute.model.families import op_list
from elute.runtime import executor
from elute.runtime.memory import fit, parse_size
from elute.runtime.threads import default_threads

if TYPE_CHECKING:
    from elute.formats.packed import PackedModel


@dataclass(frozen=True)
class Forecast:
    """touched: bytes of weights that a token reads, from wherever they are."""

    plan: Plan
    context: int
    touched: int
    flash_gb_s: float
    dram_gb_s: float

    @property
    def tok_s(self) -> float:
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
            "tok_s": round(self.tok_s, 3),
            "limit": self.limit,
            "fits": not plan.missed,
        }


def forecast(
    packed: PackedModel,
    memory: str | int,
    *,
    context: int | None,
    threads: int | None,
    cache_type: str,
    flash_gb_s: float | None = None,
) -> Forecast:
    """The plan that `load` would make, and the rates of this machine that bound it.

    flash_gb_s  that of the disk under the model, by flash.disk, when None

    Raises BudgetError for too little memory, DeviceError for files that cannot be read.
    """
    import psutil

    from elute.formats.tokenizer import Tokenizer

    ops = op_list(packed.config)
    tokenizer = Tokenizer.from_files(packed.tokenizer_files())  # a part of what load holds
    _native.return_freed_memory()
    n_threads = default_threads() if threads is None else threads
    found = fit(
        packed,
        ops,
        parse_size(memory),
        process=psutil.Process().memory_info().rss,
        context=context,
        cache_type=cache_type,
        chunk=executor.CHUNK,
        n_threads=n_threads,
    )
    del tokenizer
    kind = kv_cache.cache_type(cache_type, head_width=ops.head_width)
    ceilings = MeasuredCeilings(executor.chosen_isa())(n_threads)
    return Forecast(
        found.plan,
        found.context,
        traffic(ops, packed, kind).step_bytes,
        flash_rate(packed) if flash_gb_s is None else flash_gb_s,
        ceilings.read_gb_s,
    )


def flash_rate(packed: PackedModel) -> float:
    """GB/s of sequential reads past the page cache, as weights are read."""
    return disk.measured(packed.largest_shard).sequential_bytes_s / 1e9
