"""Shows what `elute bench model` measured: a table, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from elute.bench.ceilings import Ceilings
    from elute.bench.end_to_end import Speed
    from elute.bench.llama_cpp import LlamaCpp
    from elute.bench.subject import Subject


def told(
    subject: Subject, speeds: Sequence[Speed], *, isa: str, rival: LlamaCpp | None
) -> dict[str, Any]:
    """The keys of --json; versus only where there is a rival."""
    from elute.bench.rows import rival_row, row

    found: dict[str, Any] = {
        "model": subject.name,
        "bits_per_weight": round(subject.traffic.bits_per_weight, 3),
        "isa": isa,
        "results": [row(subject, speed, isa=isa) for speed in speeds],
    }
    if rival is not None:
        found["versus"] = [
            rival_row(rival.rows[speed.test, speed.n_threads], speed) for speed in speeds
        ]
    return found


def print_table(
    subject: Subject, speeds: Sequence[Speed], *, isa: str, rival: LlamaCpp | None
) -> None:
    click.echo(
        f"{subject.name}: {subject.model_type}, {subject.traffic.model_bytes / 1e9:.2f} GB, "
        f"{subject.traffic.bits_per_weight:.2f} bits a weight, {isa}"
    )
    if rival is not None:
        click.echo(
            f"{rival.name} {rival.told('build_commit')}: {rival.told('model_type')}, "
            f"{rival.model_bytes / 1e9:.2f} GB"
        )
    for n_threads in dict.fromkeys(speed.n_threads for speed in speeds):
        _print_ceilings([speed for speed in speeds if speed.n_threads == n_threads])
    header = (
        f"{'test':<14}{'threads':>8}{'tok/s':>10}{'best':>10}{'worst':>10}{'of read':>9}"
        f"{'of peak':>9}"
    )
    click.echo(header if rival is None else f"{header}{rival.name:>11}{'ratio':>8}")
    for speed in speeds:
        click.echo(_line(subject, speed))


def _print_ceilings(speeds: Sequence[Speed]) -> None:
    """Of one thread count, medians over the tests."""
    from elute.bench.ceilings import median_ceilings

    ceilings = median_ceilings([s.ceilings for s in speeds if s.ceilings is not None])
    if ceilings is not None:
        click.echo(ceilings_line(speeds[0].n_threads, ceilings))


def ceilings_line(n_threads: int, ceilings: Ceilings) -> str:
    """What bounds the figures below it, and how many streams it took each thread to read that."""
    streams = ceilings.read_streams
    return (
        f"ceilings of {n_threads} thread{'s'[: n_threads - 1]}: "
        f"read {ceilings.read_gb_s:.1f} GB/s in {streams} stream{'s'[: streams - 1]} each, "
        f"multiply {ceilings.multiply_gops:.0f} GOPS"
    )


def _line(subject: Subject, speed: Speed) -> str:
    from elute.bench.rows import bandwidth_share, peak_share

    line = (
        f"{speed.test.name:<14}{speed.n_threads:>8}{speed.median_tok_s:>10.1f}"
        f"{speed.best_tok_s:>10.1f}{speed.worst_tok_s:>10.1f}"
        f"{_share(bandwidth_share(subject, speed)):>9}{_share(peak_share(subject, speed)):>9}"
    )
    if speed.ratio is None:
        return line.rstrip()
    return f"{line}{speed.rival_median_tok_s:>11.1f}{speed.ratio:>7.2f}×"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
