"""`elute bench kernels`: the matmul kernels, beside what this machine could do at most."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from elute.cli import options

if TYPE_CHECKING:
    from elute.bench.ceilings import Ceilings
    from elute.bench.kernels import KernelSpeed

DIGITS = 4  # after the point, in --json


@click.command("kernels")
@click.option("--bits", metavar="N,N", default="1,2,3,4,8", show_default=True)
@options.thread_counts
@click.option(
    "--shape",
    metavar="NxK,NAME",
    default="4096x4096,11008x4096",
    show_default=True,
    help="Outputs x inputs, or the layers of llama-2-7b, llama-3-8b, bitnet-3b, smollm2-135m.",
)
@click.option(
    "--rows",
    metavar="N,N",
    default="1,128",
    show_default=True,
    help="1 is decode, more is prefill.",
)
@click.option(
    "--group-size",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Columns that share a scale; 0 is the whole row.",
)
@click.option(
    "--affine",
    type=click.Choice(["symmetric", "zero", "min"]),
    default="symmetric",
    show_default=True,
    help="symmetric has one zero, zero and min have an offset beside each scale.",
)
@options.kernel_options
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@options.as_json
@options.quiet
def command(
    bits: str,
    threads: str | None,
    shape: str,
    rows: str,
    group_size: int,
    affine: str,
    isa: str | None,
    kernel: str,
    repeats: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the matmul kernels on random matrices out of cache.

    Each row names the kernel that ran, as it does in the engine: lut_matmul looks up, lut_multiply
    and lut_gemm multiply. It also shows its share of the ceilings, measured in between with as many
    threads: reading memory in order, in one to three streams a thread, whichever is fastest, and
    int8 multiply-adds on registers. Bytes are planes, scales and offsets, each once a product; an
    operation is a multiply or an add. Figures are medians.
    """
    from elute.bench.kernels import Case, bench_kernels
    from elute.cli.screen import Screen, answer_json
    from elute.types import Affine

    cases = [
        Case(n, k, width, group_size, m, n_threads, Affine(affine))
        for n, k in _shapes(shape)
        for width in options.whole_numbers("--bits", bits, most=8)
        for m in options.whole_numbers("--rows", rows)
        for n_threads in options.chosen_thread_counts(threads)
    ]
    with Screen(quiet=quiet) as screen:
        speeds, ceilings = bench_kernels(
            cases,
            isa=isa,
            kernel=kernel,
            repeats=repeats,
            progress=lambda done, total: screen("bench", done, total),
        )
    if as_json:
        answer_json(
            {
                "isa": isa or _best_isa(),
                "kernel": kernel,
                "repeats": repeats,
                "ceilings": [_ceilings_json(*each) for each in ceilings.items()],
                "rows": [_rounded(dataclasses.asdict(speed)) for speed in speeds],
            }
        )
        return
    _print(speeds, ceilings)


def _shapes(text: str) -> list[tuple[int, int]]:
    """The [N, K] that a comma-separated list names, each once."""
    from elute.bench.kernels import SHAPES

    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        n, _, k = part.partition("x")
        if part in SHAPES:
            shapes += SHAPES[part]
        elif n.isdecimal() and k.isdecimal():
            shapes.append((int(n), int(k)))
        else:
            raise click.BadParameter(
                f"found {part!r} in --shape, wanted sizes such as 4096x4096, or one of "
                f"{', '.join(SHAPES)}"
            )
    return list(dict.fromkeys(shapes))


def _best_isa() -> str:
    from elute.runtime.self_test import best_isa

    return best_isa()


def _ceilings_json(n_threads: int, ceilings: Ceilings) -> dict[str, object]:
    return _rounded(
        {
            "threads": n_threads,
            "read_gb_s": ceilings.read_gb_s,
            "read_streams": ceilings.read_streams,
            "multiply_gops": ceilings.multiply_gops,
        }
    )


def _rounded(figures: dict[str, object]) -> dict[str, object]:
    return {
        key: round(value, DIGITS) if isinstance(value, float) else value
        for key, value in figures.items()
    }


def _print(speeds: list[KernelSpeed], ceilings: dict[int, Ceilings]) -> None:
    from elute.cli.bench_report import ceilings_line

    for n_threads, limits in ceilings.items():
        click.echo(ceilings_line(n_threads, limits))
    click.echo(
        f"{'shape':<13}{'bits':>5}{'group':>7} {'affine':<10}{'threads':>7}{'rows':>6}  "
        f"{'kernel':<12}{'ms':>9}{'GB/s':>8}{'of read':>9}{'GOPS':>8}{'of peak':>9}"
    )
    for s in speeds:
        click.echo(
            f"{s.shape:<13}{s.bits:>5}{s.group_size:>7} {s.affine:<10}{s.threads:>7}{s.rows:>6}  "
            f"{s.kernel:<12}{s.ms:>9.3f}{s.gb_s:>8.1f}{s.bandwidth_share:>9.0%}{s.gops:>8.0f}"
            f"{s.peak_share:>9.0%}"
        )
