"""What a process needs beside the planes of its weights, and a plan that keeps it in a budget."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elute.errors import NOTE, BudgetError, ShapeError
from elute.flash.plan import Plan, Use, solve, solve_banks
from elute.kernels import kv_cache
from elute.model.ops import Attention, Experts, Linear, OpList
from elute.runtime.sampler import SOFTMAX_ROWS

if TYPE_CHECKING:
    from elute.flash.weights import Recorded

log = logging.getLogger(__name__)

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
CACHE_TILE = 64  # positions that the cache grows by
# Thousands of positions fit most uses; a model's own context may take more than its weights.
DEFAULT_CONTEXT = 4096
CHANNEL_BYTES = 32  # of a cache of channels: where each is, how often it was wanted, its mask
HUGE_PAGE = 2 << 20  # what arenas are rounded up to
# The interpreter's own growth while it answers, allocator arenas and stacks of threads.
GROWTH_BYTES = 24_000_000


def parse_size(text: str | int) -> int:
    """Bytes of "1.5G", "800M", "2GiB" or a number. Raises ShapeError for anything else."""
    found = re.fullmatch(
        r"\s*(\d+(?:\.\d+)?)\s*([KMG]?(?:iB)?|[KMG]B)\s*", str(text), re.IGNORECASE
    )
    unit = found[2].upper() if found else ""
    if unit.endswith("B") and not unit.endswith("IB"):
        unit = unit[:-1]
    if found is None or unit not in UNITS:
        raise ShapeError(f"memory: found {text!r}, wanted a size such as 1.5G, 800M or 2GiB")
    return int(float(found[1]) * UNITS[unit])


def cache_bytes(ops: OpList, context: int, kind: kv_cache.CacheType) -> int:
    """Of a cache whose every position is used."""
    positions = -(-context // CACHE_TILE) * CACHE_TILE
    each = kv_cache.position_bytes(kind, n_kv_heads=ops.n_kv_heads, head_width=ops.head_width)
    return positions * ops.n_layers * each


def scratch_bytes(ops: OpList, *, chunk: int, n_threads: int, context: int) -> int:
    """Registers, quantized activations, tables, logits and results of the native executor."""
    widest = max(ops.registers.values())
    heads = max((op.n_heads for op in ops.ops if isinstance(op, Attention)), default=1)
    rows = 4 * chunk * sum(ops.registers.values())
    rows += max(
        (_expert_rows(op, ops, chunk) for op in ops.ops if isinstance(op, Experts)), default=0
    )
    # codes, scales, sums, pair words and tiles a row; tables of the few rows that are looked up
    activations = chunk * widest * 4 + 16 * widest * 5
    partials = heads * (-(-context // 256)) * (ops.head_width + 2) * 4
    threads = n_threads * (chunk * 32 * 4 * 4 + 512 * 1024)
    return rows + activations + partials + threads + 3 * 4 * ops.vocabulary


def _expert_rows(op: Experts, ops: OpList, chunk: int) -> int:
    """What experts compute of the rows that picked them, and those rows, quantized, with tables."""
    slots = chunk * op.top_k
    slots += slots // 6 * 5  # where they would all begin a tile of 6 rows
    hidden = ops.registers[op.input]
    return slots * (4 * (2 * op.width + hidden) + max(hidden, op.width) * 9)


def scoring_bytes(ops: OpList, logits: int) -> int:
    """Of scoring in steps of `logits` bytes: those of a step and of the one before, and
    exponentials."""
    row = 4 * ops.vocabulary
    return 2 * max(logits, row) + 3 * SOFTMAX_ROWS * row


@dataclass(frozen=True)
class Fit:
    """A plan, and the context that it was made for."""

    plan: Plan
    context: int


def fit(
    packed: Recorded,
    ops: OpList,
    budget: int,
    *,
    process: int,
    context: int | None,
    cache_type: str,
    chunk: int,
    n_threads: int,
    logits: int = 0,
    by_channel: bool = False,
    sparsity: float = 0.0,
    npu: int = 0,
) -> Fit:
    """Splits `budget`; `process` is what the process holds before the weights, `logits` what a step
    of scoring may ask for, `npu` what prompts through a device take; by_channel: of a model in
    channel order, or to be put in it, of whose weights `sparsity` do not count.

    Without a context, the model's own, but at most DEFAULT_CONTEXT. Raises BudgetError, naming the
    least budget that works.
    """
    from elute.flash.banks import channel_sizes, expert_sizes
    from elute.flash.weights import resident_bytes, uses

    kind = kv_cache.cache_type(cache_type, head_width=ops.head_width)
    chosen = min(ops.context, DEFAULT_CONTEXT) if context is None else context
    if context is None and chosen < ops.context:
        log.info(
            "memory: a context of %d tokens of the model's %d, to leave room for weights; "
            "--context changes it",
            chosen,
            ops.context,
        )
    if chosen < 1:
        raise BudgetError(f"context: found {chosen}, wanted at least 1")
    order: list[Use] = uses(ops, packed)
    fixed = {
        "process": process + GROWTH_BYTES,
        "resident weights": resident_bytes(ops, packed) + 2 * HUGE_PAGE,
        "cache": cache_bytes(ops, chosen, kind),
        "scratch": scratch_bytes(ops, chunk=chunk, n_threads=n_threads, context=chosen),
    }
    if npu:
        fixed["npu"] = npu
    if logits:
        fixed["logits"] = scoring_bytes(ops, logits)
    experts = [op for op in ops.ops if isinstance(op, Experts)]
    if by_channel and not experts:
        sizes = channel_sizes(ops, packed.records, sparsity)
        in_banks = {name for size in sizes for name in size.names}
        fixed["scratch"] += CHANNEL_BYTES * sum(ops.registers[i] for i in _inputs(ops))
        fixed["weights in panels"] = _planes(order, in_banks)
        return Fit(solve_banks(budget, fixed, [size.size for size in sizes]), chosen)
    sizes = expert_sizes(ops, packed.records)
    if sizes:
        names = {name for op in experts for name in op.matrices()}
        parts = [part for name in names for part in packed.records[name].parts()]
        scales = sum(part.stored_bytes for part in parts if part.suffix != ".planes")
        rest = {**fixed, "resident weights": fixed["resident weights"] - scales}
        rest["other layers"] = _planes(order, names)
        try:
            return Fit(solve_banks(budget, rest, [size.size for size in sizes]), chosen)
        except BudgetError as error:
            log.info("%s; so experts pass through a window instead", error)
    plan = solve(budget, fixed, order)
    if plan.places and experts:
        log.log(
            NOTE,
            "memory: too little to hold two layers of experts, so all of them are read for every "
            "token, picked or not",
        )
    return Fit(plan, chosen)


def channels_read_less(fitted: Callable[..., Fit]) -> bool:
    """Whether a token reads no more of the model in channel order than in panel order.

    fitted  `fit`, but for by_channel

    Short rows share pages, so that a token reads most of a bank, and banks need more memory to pass
    through than panels do.
    """
    try:
        missed = fitted(by_channel=True).plan.missed
    except BudgetError:
        return False
    try:
        return missed <= fitted(by_channel=False).plan.missed
    except BudgetError:
        return True


def _inputs(ops: OpList) -> list[str]:
    return [op.input for op in ops.ops if isinstance(op, Linear)]


def _planes(order: Sequence[Use], without: Collection[str]) -> int:
    return sum(use.total for use in order if use.names[0] not in without)
