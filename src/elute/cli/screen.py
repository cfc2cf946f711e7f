"""What a command says beside its answer, all of it on stderr: notes, bars, the line of figures."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from elute.bench.machine import peak_memory_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from elute.flash.weights import FlashWeights
    from elute.npu.prompts import PromptExecutor
    from elute.runtime.engine import Figures

MIB = 1 << 20
LINE_AFTER_S = 1.0  # a shorter stage is not worth a line in a log
BAR_AFTER_S = 0.3  # a shorter stage shows no bar, nor costs the 65 ms of importing rich


def answer_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


class Screen:
    """Progress of the slow stages (fetch, convert, prompt), then a line for each that took a while.

    Bars only on a terminal, nothing at all when quiet. Call it with (stage, done, total); a context
    manager that takes its bars away.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bars = not quiet and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}

    def note(self, text: str) -> None:
        if not self.quiet:
            self.clear()
            click.echo(text, err=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`stage` is done / total through; units are the caller's. Stages may overlap."""
        started = self._started.setdefault(stage, time.perf_counter())
        took = time.perf_counter() - started
        if self._bars and took >= BAR_AFTER_S:
            self._show(stage, done, total)
        if total and done >= total:
            del self._started[stage]
            if took >= LINE_AFTER_S:
                self.note(f"{stage}: {took:.1f} s")

    def _show(self, stage: str, done: int, total: int) -> None:
        """total: 0 while it is not known"""
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)

    def clear(self) -> None:
        """Takes the bars off the terminal, before something else is written."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def seconds_since_start() -> float:
    """Since the operating system started this program: what a user waited, imports and all."""
    try:
        # psutil adds a boot time of whole seconds; the kernel's own two clocks agree to 10 ms.
        status = Path("/proc/self/stat").read_text()
        started_ticks = int(status.rpartition(")")[2].split()[19])  # field 22; 2 may hold blanks
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError):
        pass  # not Linux
    import psutil

    return time.time() - float(psutil.Process().create_time())


def figures_line(figures: Figures, *, bits_per_weight: float) -> str:
    """The last line of a run."""
    reused = f" ({figures.reused_tokens} reused)" if figures.reused_tokens else ""
    first = [f"first token {figures.first_token_s:.2f} s"] if figures.generated_tokens else []
    return " · ".join(
        [
            f"prompt {figures.prompt_tokens} tokens{reused} {figures.prompt_rate_tok_s:.1f} tok/s",
            f"generated {figures.generated_tokens} tokens {figures.generated_rate_tok_s:.1f} tok/s",
            *first,
            f"peak memory {peak_memory_bytes() / MIB:.0f} MiB",
            f"{bits_per_weight:.2f} bits a weight",
        ]
    )


def flash_line(weights: FlashWeights) -> str:
    """What reading weights from flash cost."""
    read, waited_s = weights.figures()
    found = weights.found_in_memory()
    return (
        f"flash {weights.plan.missed / 1e6:.0f} MB a token · {read / 1e6:.0f} MB read by "
        f"{weights.reader} · waited {waited_s:.2f} s for them"
        + ("" if found is None else f" · {100 * found:.0f} % of what was wanted was there")
    )


def flash_json(weights: FlashWeights) -> dict[str, Any]:
    """The same under the keys of --json."""
    read, waited_s = weights.figures()
    found = weights.found_in_memory()
    return {
        "reader": weights.reader,
        "missed_bytes": weights.plan.missed,
        "read_bytes": read,
        "waited_s": round(waited_s, 4),
        "found_in_memory": None if found is None else round(found, 4),
    }


def npu_line(prompts: PromptExecutor) -> str:
    """What a device did for the prompts, and its shadows."""
    figures = prompts.figures()
    counts, hits, clipped = figures.counts, figures.hit_rate, figures.clipped_share
    repaired = counts.saturated / counts.outputs if counts.outputs else None
    return (
        f"npu {prompts.device} · {figures.tokens} tokens"
        + ("" if clipped is None else f" · {100 * clipped:.2f} % of inputs clipped")
        + ("" if repaired is None else f" · {100 * repaired:.2f} % of outputs repaired")
        + f" · {figures.wanted} rows for shadows"
        + ("" if hits is None else f", {100 * hits:.0f} % of them in memory")
        + f" ({figures.hot_bytes / 1e6:.1f} MB) · {figures.read_bytes / 1e6:.1f} MB read for them"
    )


def npu_json(prompts: PromptExecutor) -> dict[str, Any]:
    """The same under the keys of --json."""
    figures = prompts.figures()
    counts, hits, clipped = figures.counts, figures.hit_rate, figures.clipped_share
    return {
        "device": prompts.device,
        "tokens": figures.tokens,
        "clipped_share": None if clipped is None else round(clipped, 6),
        "repaired_outputs": counts.saturated,
        "shadow_rows": figures.wanted,
        "shadow_rows_in_memory": None if hits is None else round(hits, 4),
        "hot_bytes": figures.hot_bytes,
        "shadow_read_bytes": figures.read_bytes,
    }


def figures_json(figures: Figures, *, bits_per_weight: float) -> dict[str, Any]:
    """The same figures under the keys of --json."""
    return {
        "prompt_tokens": figures.prompt_tokens,
        "reused_tokens": figures.reused_tokens,
        "generated_tokens": figures.generated_tokens,
        "prompt_tok_s": round(figures.prompt_rate_tok_s, 2),
        "generated_tok_s": round(figures.generated_rate_tok_s, 2),
        "first_token_s": round(figures.first_token_s, 4),
        "peak_memory_bytes": peak_memory_bytes(),
        "bits_per_weight": round(bits_per_weight, 3),
    }
