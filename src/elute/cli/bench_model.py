"""`elute bench model`: prompt and generation speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from elute.bench.shapes import CONFIGS
from elute.cli import options

if TYPE_CHECKING:
    from elute.bench.end_to_end import Speed
    from elute.bench.subject import Subject
    from elute.cli.screen import Screen

TERNARY = "ternary"
DEFAULT_BITS = "4"
DEFAULT_HEAD_BITS = 8
# Options that describe a random model; of a MODEL they would be ignored.
OF_SHAPE = ("group_size", "head_bits", "vocabulary")


@click.command("model")
@click.argument("model", required=False)
@click.option(
    "--shape",
    metavar="NAME",
    help=f"Instead of MODEL, random weights in memory: {', '.join(CONFIGS)}.",
)
@click.option(
    "--bits",
    type=click.Choice([*map(str, range(1, 9)), TERNARY]),
    help="Bits a weight of linear layers. Of a MODEL this quantizes again what is quantized; "
    f"{TERNARY} is for --shape.  [default: the model's own, or {DEFAULT_BITS}]",
)
@options.recipe
@click.option(
    "--group-size",
    type=click.IntRange(0),
    help="With --shape, columns that share a scale; 0 is the whole row.  [default: 32, or a row "
    f"of {TERNARY}]",
)
@click.option(
    "--head-bits",
    type=click.IntRange(1, 8),
    help=f"With --shape, bits of embedding and head.  [default: {DEFAULT_HEAD_BITS}]",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(32),
    help="With --shape, another number of tokens than the model's own.",
)
@click.option(
    "-p",
    "--prompt",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Tokens of pp; 0 leaves it out.",
)
@click.option(
    "-n",
    "--generate",
    type=click.IntRange(0),
    default=128,
    show_default=True,
    help="Tokens of tg; 0 leaves it out.",
)
@click.option(
    "-d",
    "--depth",
    metavar="N,N",
    default="0",
    show_default=True,
    help="Positions that are in the cache before a test, filled untimed.",
)
@click.option("-r", "--repeats", type=click.IntRange(1), default=5, show_default=True)
@options.thread_counts
@options.kernel_options
@options.as_json
@options.quiet
def command(
    model: str | None,
    prompt: int,
    generate: int,
    depth: str,
    repeats: int,
    threads: str | None,
    isa: str | None,
    kernel: str,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Measure MODEL, or a random model of a shape, under the names of llama-bench.

    pp512 is a prompt, tg128 is generation, @d4096 behind 4096 cached tokens. Thread counts take
    turns within each repeat; figures are medians, with the best and the worst. Beside each stands
    its share of a ceiling that is measured in between: of tg, bytes a token over the bandwidth of
    reading memory in order; of pp, multiplies and adds with weights over the peak of int8.

    Results of --json are rows as of llama-bench -o json, with keys of our own.
    """
    from elute.bench.end_to_end import MeasuredCeilings, bench, context_of, speed_tests
    from elute.bench.rows import row
    from elute.cli.screen import Screen, answer_json
    from elute.runtime.executor import Executor

    if prompt == generate == 0:
        raise click.UsageError("wanted --prompt or --generate above 0: nothing is left to measure")
    counts = options.chosen_thread_counts(threads)
    depths = options.whole_numbers("--depth", depth, least=0)
    _check_usage(model, given)
    with Screen(quiet=quiet) as screen:
        subject = _subject(model, given, screen)
        tests = speed_tests(prompt, generate, depths)
        executors = {
            n: Executor(
                subject.ops,
                subject.weights,
                context=context_of(tests),
                n_threads=n,
                isa=isa,
                kernel=kernel,
            )
            for n in counts
        }
        isa = executors[counts[0]].isa
        speeds = bench(
            executors,
            tests,
            repeats=repeats,
            ceilings=MeasuredCeilings(isa),
            progress=lambda done, total: screen("bench", done, total),
        )
    if as_json:
        answer_json(
            {
                "model": subject.name,
                "bits_per_weight": round(subject.traffic.bits_per_weight, 3),
                "isa": isa,
                "kernel": kernel,
                "results": [row(subject, speed, isa=isa) for speed in speeds],
            }
        )
        return
    _print(subject, speeds, isa)


def _check_usage(model: str | None, given: dict[str, Any]) -> None:
    shape, bits = given["shape"], given["bits"]
    if shape is None:
        for name in OF_SHAPE:
            if given[name] is not None:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} describes a random model; give --shape, or use "
                    "--recipe for MODEL"
                )
        if bits == TERNARY:
            raise click.UsageError(f"--bits {TERNARY} is for --shape; use --recipe for MODEL")
        return
    if model is not None:
        raise click.UsageError(f"found MODEL {model} and --shape {shape}, wanted one of them")
    if shape not in CONFIGS:
        raise click.BadParameter(f"found {shape!r} in --shape, wanted one of {', '.join(CONFIGS)}")
    if given["recipe"] is not None:
        for name in ("bits", "group_size", "head_bits"):
            if given[name] is not None:
                raise click.UsageError(
                    f"found --{name.replace('_', '-')} beside --recipe, wanted one of them"
                )


def _subject(model: str | None, given: dict[str, Any], screen: Screen) -> Subject:
    from elute.bench.random_weights import random_recipe
    from elute.bench.subject import packed_subject, random_subject
    from elute.quantize.recipe import DEFAULT_GROUP, Recipe
    from elute.runtime.store import open_packed

    shape, bits, recipe = given["shape"], given["bits"], given["recipe"]
    if shape is None:
        name = model or "default"
        width = None if bits is None else int(bits)
        return packed_subject(name, open_packed(name, bits=width, recipe=recipe, progress=screen))
    if recipe is not None:
        return random_subject(shape, Recipe.load(recipe), vocabulary=given["vocabulary"])
    bits = bits or DEFAULT_BITS
    group = given["group_size"]
    if group is None:
        group = 0 if bits == TERNARY else DEFAULT_GROUP
    chosen = random_recipe(
        bits=None if bits == TERNARY else int(bits),
        group_size=group or None,
        outer_bits=given["head_bits"] or DEFAULT_HEAD_BITS,
    )
    return random_subject(shape, chosen, vocabulary=given["vocabulary"])


def _print(subject: Subject, speeds: list[Speed], isa: str) -> None:
    from elute.bench.rows import bandwidth_share, peak_share

    click.echo(
        f"{subject.name}: {subject.model_type}, {subject.traffic.model_bytes / 1e9:.2f} GB, "
        f"{subject.traffic.bits_per_weight:.2f} bits a weight, {isa}"
    )
    for n_threads in dict.fromkeys(speed.n_threads for speed in speeds):
        ceilings = next(s.ceilings for s in speeds if s.n_threads == n_threads)
        assert ceilings is not None
        click.echo(
            f"ceilings of {n_threads} thread{'s'[: n_threads - 1]}: "
            f"read {ceilings.read_gb_s:.1f} GB/s, multiply {ceilings.multiply_gops:.0f} GOPS"
        )
    click.echo(
        f"{'test':<12}{'threads':>8}{'tok/s':>10}{'best':>10}{'worst':>10}{'of read':>9}"
        f"{'of peak':>9}"
    )
    for s in speeds:
        click.echo(
            f"{s.test.name:<12}{s.n_threads:>8}{s.median_tok_s:>10.1f}{s.best_tok_s:>10.1f}"
            f"{s.worst_tok_s:>10.1f}{_share(bandwidth_share(subject, s)):>9}"
            f"{_share(peak_share(subject, s)):>9}"
        )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
