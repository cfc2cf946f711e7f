"""`elute bench model`: prompt and generation speed."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from elute.cli import options


@click.command("model")
@click.argument("model", default="default")
@click.option(
    "--prompt",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Tokens of pp; 0 leaves it out.",
)
@click.option(
    "--generate",
    type=click.IntRange(0),
    default=128,
    show_default=True,
    help="Tokens of tg; 0 leaves it out.",
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@options.thread_counts
@click.option("--isa", help="Instruction set to use instead of the best one; see doctor.")
@options.pack_options
@options.as_json
@options.quiet
def command(
    model: str,
    prompt: int,
    generate: int,
    repeats: int,
    threads: str | None,
    isa: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Measure MODEL under the names of llama-bench: pp512 is a prompt, tg128 is generation.

    Thread counts take turns within each repeat; figures are medians, with the best and the worst.
    """
    from elute.bench.end_to_end import WARM_UP_TOKENS, bench
    from elute.cli.screen import Screen, answer_json, peak_memory_bytes
    from elute.model.families import op_list
    from elute.runtime.executor import Executor
    from elute.runtime.store import open_packed

    if prompt == generate == 0:
        raise click.UsageError("wanted --prompt or --generate above 0: nothing is left to measure")
    counts = options.chosen_thread_counts(threads)
    with Screen(quiet=quiet) as screen:
        packed = open_packed(model, bits=given["bits"], recipe=given["recipe"], progress=screen)
        ops = op_list(packed.config)
        context = max(prompt, generate, WARM_UP_TOKENS)
        executors = {
            n: Executor(ops, packed, context=context, n_threads=n, isa=isa) for n in counts
        }
        speeds = bench(
            executors,
            prompt=prompt,
            generate=generate,
            repeats=repeats,
            progress=lambda done, total: screen("bench", done, total),
        )
    if as_json:
        answer_json(
            {
                "model": model,
                "bits_per_weight": round(packed.bits_per_weight, 3),
                "isa": executors[counts[0]].isa,
                "peak_memory_bytes": peak_memory_bytes(),
                "results": [
                    {
                        key: round(value, 2) if isinstance(value, float) else value
                        for key, value in dataclasses.asdict(speed).items()
                    }
                    for speed in speeds
                ],
            }
        )
        return
    click.echo(f"{'test':<8}{'threads':>8}{'tok/s':>10}{'best':>10}{'worst':>10}")
    for speed in speeds:
        click.echo(
            f"{speed.test:<8}{speed.n_threads:>8}{speed.median_tok_s:>10.1f}"
            f"{speed.best_tok_s:>10.1f}{speed.worst_tok_s:>10.1f}"
        )
