"""`elute bench model`: prompt and generation speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elute.bench.shapes import CONFIGS
from elute.cli import options
from elute.cli.bench_versus import (
    DEFAULT_BITS,
    TERNARY,
    check_versus,
    chosen_rival,
    shape_bits,
    versus_options,
)

if TYPE_CHECKING:
    from elute.bench.subject import Subject
    from elute.cli.screen import Screen

DEFAULT_HEAD_BITS = 8
WHOLE_ROW = 0  # as --group-size says it
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
@options.cache_type
@versus_options
@click.option(
    "--record",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Merge the results into FOLDER/ratios.json and FOLDER/machines/NAME.csv.",
)
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
    record: Path | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Measure MODEL, or a random model of a shape, under the names of llama-bench.

    pp512 is a prompt, tg128 is generation, @d4096 behind 4096 cached tokens. Thread counts take
    turns within each repeat; figures are medians, with the best and the worst. Beside each stands
    its share of a ceiling that is measured in between: of tg, bytes a token over the bandwidth of
    reading memory in order, in one to three streams a thread, whichever is fastest; of pp,
    multiplies and adds with weights over the peak of int8.

    With --versus, runs of the other program take turns with ours on the same weights, or on random
    ones of the same shape, and the ratio is the median over neighbouring runs.

    Results of --json are rows as of llama-bench -o json, with keys of our own.
    """
    from elute.bench import record as records
    from elute.bench.ceilings import MeasuredCeilings
    from elute.bench.end_to_end import bench, context_of, speed_tests
    from elute.bench.random_weights import check_memory
    from elute.cli.bench_report import print_table, told
    from elute.cli.screen import Screen, answer_json
    from elute.runtime.executor import Executor

    if prompt == generate == 0:
        raise click.UsageError("wanted --prompt or --generate above 0: nothing is left to measure")
    counts = options.chosen_thread_counts(threads)
    depths = options.whole_numbers("--depth", depth, least=0)
    _check_usage(model, given)
    check_versus(given)
    with Screen(quiet=quiet) as screen:
        subject = _subject(model, given, screen)
        rival = chosen_rival(subject, given, screen)
        tests = speed_tests(prompt, generate, depths)
        context = context_of(tests)
        check_memory(len(counts) * subject.traffic.cache_bytes(context), "the key-value caches")
        executors = {
            n: Executor(
                subject.ops,
                subject.weights,
                context=context,
                n_threads=n,
                isa=isa,
                kernel=kernel,
                cache_type=subject.cache_type,
            )
            for n in counts
        }
        isa = executors[counts[0]].isa
        speeds = bench(
            executors,
            tests,
            repeats=repeats,
            rival=rival,
            ceilings=MeasuredCeilings(isa),
            progress=lambda done, total: screen("bench", done, total),
        )
        if rival is not None and not rival.on_cpu:
            screen.note(f"{rival.name} ran with {rival.told('backends')}, not on the CPU alone")
        if record is not None:
            forced = isa if kernel == "auto" else f"{isa} {kernel}"
            if given["cache_type"] == "q8":
                forced += " q8 cache"
            for path in records.record(record, subject, speeds, isa=forced, rival=rival):
                screen.note(f"recorded in {path}")
    if as_json:
        answer_json({"kernel": kernel, **told(subject, speeds, isa=isa, rival=rival)})
    else:
        print_table(subject, speeds, isa=isa, rival=rival)


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
    cache_type = given["cache_type"] or "f16"
    if shape is None:
        name = model or "default"
        width = None if bits is None else int(bits)
        packed = open_packed(name, bits=width, recipe=recipe, progress=screen)
        return packed_subject(name, packed, cache_type=cache_type)
    if recipe is not None:
        return random_subject(
            shape, Recipe.load(recipe), vocabulary=given["vocabulary"], cache_type=cache_type
        )
    width, group = shape_bits(bits), given["group_size"]
    if group is None:
        group = WHOLE_ROW if width is None else DEFAULT_GROUP
    chosen = random_recipe(
        bits=width,
        group_size=group or None,
        outer_bits=given["head_bits"] or DEFAULT_HEAD_BITS,
    )
    return random_subject(shape, chosen, vocabulary=given["vocabulary"], cache_type=cache_type)
