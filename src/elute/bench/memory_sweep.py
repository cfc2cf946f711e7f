"""Speed over budgets of memory: elute under each, llama.cpp with a mapped file in the same limit.

Every run is a process of its own, and runs take turns, so that a disturbance hits all alike. Rates
are medians, in tokens/s of generation. The bound is what the disk's rate and memory's allow,
measured beside the runs: no order of work is faster.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elute.bench.memory_group import MemoryGroup, NoGroup, run_command
from elute.errors import EluteError
from elute.flash.page_cache import forget

COLUMNS = (
    "memory_bytes",
    "sparsity",
    "tok_s",
    "predicted_tok_s",
    "bound_tok_s",
    "read_bytes_per_token",
    "missed_bytes",
    "peak_bytes",
    "page_cache_bytes",
)


@dataclass(frozen=True)
class Rival:
    """llama.cpp's llama-bench, and a GGUF file with as many bytes a weight."""

    program: str
    gguf: Path
    tokens: int


@dataclass(frozen=True)
class SweepPoint:
    """One budget: elute's figures by sparsity, under the names of COLUMNS, and the rival's rate."""

    memory_bytes: int
    bound_tok_s: float
    predicted_tok_s: float
    elute: tuple[dict[str, Any], ...]
    llama_cpp_tok_s: float | None


@dataclass(frozen=True)
class Sweep:
    """timeline: of one token in the smallest budget that reads flash; see flash.timeline."""

    model: str
    points: tuple[SweepPoint, ...]
    timeline: dict[str, Any] | None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "memory_bytes": point.memory_bytes,
                "bound_tok_s": round(point.bound_tok_s, 4),
                "predicted_tok_s": round(point.predicted_tok_s, 4),
                "llama_cpp_tok_s": point.llama_cpp_tok_s,
                "elute": list(point.elute),
            }
            for point in self.points
        ]
        return {
            "model": self.model,
            **self.settings,
            "points": rows,
            "timeline": self.timeline,
        }

    def to_csv(self) -> str:
        """A row for each curve and budget; llama.cpp's has no sparsity."""
        out = io.StringIO()
        writer = csv.DictWriter(out, ("program", *COLUMNS), lineterminator="\n")
        writer.writeheader()
        for point in self.points:
            writer.writerows({"program": "elute", **row} for row in point.elute)
            if point.llama_cpp_tok_s is not None:
                row = {"memory_bytes": point.memory_bytes, "tok_s": point.llama_cpp_tok_s}
                writer.writerow({"program": "llama.cpp", **row, "bound_tok_s": point.bound_tok_s})
        return out.getvalue()


def sweep(
    packed: Path,
    budgets: Sequence[int],
    *,
    name: str,
    sparsities: Sequence[float] = (0.0,),
    context: int,
    tokens: int,
    threads: int | None,
    runs: int,
    limited: bool,
    rival: Rival | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """limited: every run in a control group of its budget; progress: (budgets done, in all).

    Raises UnsupportedError where no group can be made, BudgetError for a budget that is too small,
    EluteError for a run that fails.
    """
    points, timeline = [], None
    for done, budget in enumerate(sorted(budgets)):
        if progress is not None:
            progress(done, len(budgets))
        plans: list[list[dict[str, Any]]] = [[] for _ in sparsities]
        ours: list[list[dict[str, Any]]] = [[] for _ in sparsities]
        theirs: list[float] = []
        with MemoryGroup(budget) if limited else NoGroup() as group:
            for _ in range(runs):
                for sparsity, told, found in zip(sparsities, plans, ours, strict=True):
                    told.append(foretold(packed, budget, context, threads, sparsity))
                    found.append(
                        elute_run(group, packed, budget, context, tokens, threads, sparsity)
                    )
                if rival is not None:
                    theirs.append(rival_run(group, rival, threads))
        bounds = [statistics.median(plan["bound_tok_s"] for plan in told) for told in plans]
        rates = [statistics.median(plan["tok_s"] for plan in told) for told in plans]
        timeline = timeline or ours[0][-1]["timeline"]
        rows = tuple(
            {
                "memory_bytes": budget,
                "sparsity": sparsity,
                "tok_s": round(statistics.median(run["tok_s"] for run in found), 4),
                "predicted_tok_s": round(rates[i], 4),
                "bound_tok_s": round(bounds[i], 4),
                "read_bytes_per_token": round(
                    statistics.median(run["read_bytes_per_token"] for run in found)
                ),
                "missed_bytes": found[-1]["missed_bytes"],
                "peak_bytes": max(run["peak_bytes"] for run in found),
                "page_cache_bytes": found[-1]["page_cache_bytes"],
            }
            for i, (sparsity, found) in enumerate(zip(sparsities, ours, strict=True))
        )
        rate = round(statistics.median(theirs), 4) if theirs else None
        points.append(SweepPoint(budget, bounds[0], rates[0], rows, rate))
    if progress is not None:
        progress(len(budgets), len(budgets))
    settings = {"context": context, "tokens": tokens, "runs": runs, "limited": limited}
    return Sweep(name, tuple(points), timeline, settings)


def elute_run(
    group: MemoryGroup | NoGroup,
    packed: Path,
    memory: int,
    context: int,
    tokens: int,
    threads: int | None,
    sparsity: float,
) -> dict[str, Any]:
    """What bench.memory_run measured, in a process of its own."""
    given = {
        "packed": str(packed),
        "memory": memory,
        "context": context,
        "tokens": tokens,
        "threads": threads,
        "sparsity": sparsity,
    }
    forget(packed.glob("*.safetensors"))
    told = group.run([sys.executable, "-m", "elute.bench.memory_run", json.dumps(given)])
    answer: dict[str, Any] = json.loads(told.splitlines()[-1])
    return answer


def rival_run(group: MemoryGroup | NoGroup, rival: Rival, threads: int | None) -> float:
    """-> tokens/s of mapped weights as they are: repacked ones are a copy, for which is no room."""
    from elute.runtime.threads import default_threads

    n_threads = default_threads() if threads is None else threads
    forget([rival.gguf])
    command = [rival.program, "-m", str(rival.gguf), "-p", "0", "-n", str(rival.tokens), "-r", "1"]
    command += ["-t", str(n_threads), "--repack", "0", "--load-mode", "mmap", "--no-warmup"]
    told = group.run([*command, "-o", "json"])
    try:
        return float(json.loads(told)[0]["avg_ts"])
    except (ValueError, LookupError, TypeError):
        raise EluteError(
            f"{rival.program}: answered {told[:80]!r}, wanted what `llama-bench -o json` prints"
            "; give another --llama-bench"
        ) from None


def foretold(
    packed: Path, memory: int, context: int, threads: int | None, sparsity: float = 0.0
) -> dict[str, Any]:
    """The forecast, in a process of its own, which holds what a run does; outside the group, whose
    memory the measurement of the ceilings does not fit."""
    command = [sys.executable, "-m", "elute.bench.memory_plan", str(packed), str(memory)]
    told = run_command([*command, str(context), str(threads or 0), str(sparsity)])
    answer: dict[str, Any] = json.loads(told.splitlines()[-1])
    return answer
