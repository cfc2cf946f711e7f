"""`elute bench kernels`: the matmul kernels, beside what this machine could do at most."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from elute.bench.shapes import CONFIGS
from elute.cli import options

if TYPE_CHECKING:
    from elute.bench.ceilings import Ceilings
    from elute.bench.kernels import Case, KernelSpeed

DIGITS = 4  # after the point, in --json
HEAD_ROWS = 1  # of a call's tokens, the engine multiplies only that which wants logits by the head


@click.command("kernels")
@click.option("--bits", metavar="N,N", default="1,2,3,4,8", show_default=True)
@click.option(
    "--head-bits",
    metavar="N,N",
    default="6",
    show_default=True,
    help="The same of the heads (vocabulary x hidden) of models in --shape.",
)
@options.thread_counts
@click.option(
    "--shape",
    metavar="NxK,NAME",
    default="4096x4096,11008x4096",
    show_default=True,
    help="Outputs x inputs, or the layers and, in one row, the head of a model: "
    f"{', '.join(CONFIGS)}.",
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
    head_bits: str,
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
    from elute.bench.kernels import bench_kernels
    from elute.cli.screen import Screen, answer_json

    cases = _cases(
        shape,
        widths=options.whole_numbers("--bits", bits, most=8),
        head_widths=options.whole_numbers("--head-bits", head_bits, most=8),
        rows=options.whole_numbers("--rows", rows),
        threads=options.chosen_thread_counts(threads),
        group_size=group_size,
        affine=affine,
    )
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


def _cases(
    shape: str,
    *,
    widths: list[int],
    head_widths: list[int],
    rows: list[int],
    threads: list[int],
    group_size: int,
    affine: str,
) -> list[Case]:
    """Each once: layers of all models, then their heads."""
    from elute.bench.kernels import Case
    from elute.types import Affine

    layers, heads = _shapes(shape)
    sizes = [(n, k, bits, m) for n, k in layers for bits in widths for m in rows]
    sizes += [(n, k, bits, HEAD_ROWS) for n, k in heads for bits in head_widths]
    return [
        Case(n, k, bits, group_size, m, n_threads, Affine(affine))
        for n, k, bits, m in dict.fromkeys(sizes)
        for n_threads in threads
    ]


def _shapes(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The [N, K] that a comma-separated list names: of layers or by themselves, and of heads."""
    from elute.bench.shapes import head_shape, layer_shapes

    layers: list[tuple[int, int]] = []
    heads: list[tuple[int, int]] = []
    for part in text.split(","):
        n, _, k = part.partition("x")
        if part in CONFIGS:
            layers += layer_shapes(part)
            heads.append(head_shape(part))
        elif n.isdecimal() and k.isdecimal():
            layers.append((int(n), int(k)))
        else:
            raise click.BadParameter(
                f"found {part!r} in --shape, wanted sizes such as 4096x4096, or one of "
                f"{', '.join(CONFIGS)}"
            )
    return layers, heads


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
