"""`elute bench memory-sweep`: speed over budgets of memory, as data and as a plot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elute.cli import options

if TYPE_CHECKING:
    from elute.bench.memory_sweep import Rival, Sweep

DEFAULT_SHARES = "0.4,0.65,0.9"
PROGRAM = "llama-bench"


@click.command("memory-sweep")
@click.argument("model", default="default")
@click.option("--budgets", metavar="SIZE,SIZE", help="What the whole process may hold.")
@click.option(
    "--shares",
    metavar="X,X",
    default=DEFAULT_SHARES,
    show_default=True,
    help="Instead of --budgets: of the packed size.",
)
@click.option(
    "--sparsity",
    metavar="X,X",
    default="0",
    show_default=True,
    help="A curve for each: the share of a token's channels that is left out.",
)
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What llama.cpp runs: a file with as many bytes a weight.  [default: MODEL, where it is "
    "one]",
)
@click.option(
    "--llama-bench",
    metavar="FILE",
    default=PROGRAM,
    show_default=True,
    help="Its program; without one there is no curve of it.",
)
@click.option("--context", type=click.IntRange(16), default=512, show_default=True)
@click.option("--tokens", type=click.IntRange(3), default=16, show_default=True)
@click.option("--rival-tokens", type=click.IntRange(1), default=4, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: physical cores]")
@click.option("-r", "--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--no-limit",
    is_flag=True,
    help="Run without control groups; llama.cpp, which knows no budget, is left out.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("memory-sweep"),
    show_default=True,
    help="Writes OUT.svg, OUT.png, OUT.csv and OUT.json.",
)
@options.as_json
@options.quiet
def command(
    model: str,
    budgets: str | None,
    shares: str,
    sparsity: str,
    gguf: Path | None,
    llama_bench: str,
    context: int,
    tokens: int,
    rival_tokens: int,
    threads: int | None,
    repeats: int,
    no_limit: bool,
    out: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure MODEL under several budgets of memory, and draw tokens/s over memory.

    Every run is a process of its own in a memory control group of its budget, in turns with
    llama.cpp and a mapped file; wants root for the groups. A dashed line is what the measured rates
    of disk and memory allow; a second panel shows when processor and disk worked during one token.
    """
    from elute.bench.memory_sweep import sweep
    from elute.bench.sweep_plot import check_matplotlib, draw
    from elute.cli.screen import Screen, answer_json
    from elute.runtime.memory import parse_size
    from elute.runtime.store import fetch, open_packed

    check_matplotlib()
    sparsities = _shares("--sparsity", sparsity, least=0.0)
    with Screen(quiet=quiet) as screen:
        source = fetch(model, progress=screen).path
        rival = _rival(gguf, source, llama_bench, rival_tokens, no_limit)
        packed = open_packed(model, progress=screen)
        size = sum(record.size for record in packed.files.values())
        chosen = (
            [int(share * size) for share in _shares("--shares", shares)]
            if budgets is None
            else [parse_size(text) for text in budgets.split(",")]
        )
        found = sweep(
            packed.path,
            chosen,
            name=packed.path.name if model != "default" else model,
            sparsities=sparsities,
            context=context,
            tokens=tokens,
            threads=threads,
            runs=repeats,
            limited=not no_limit,
            rival=rival,
            progress=lambda done, total: screen("memory sweep", done, total),
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.csv").write_text(found.to_csv())
        out.with_name(f"{out.name}.json").write_text(_json(found))
        svg, _ = draw(found, out)
        screen.note(f"{svg}, and beside it .png, .csv and .json")
    if as_json:
        answer_json(found.to_json())
    else:
        click.echo(_table(found))


def _json(found: Sweep) -> str:
    import json

    return json.dumps(found.to_json(), indent=1) + "\n"


def _rival(
    gguf: Path | None, source: Path, program: str, tokens: int, no_limit: bool
) -> Rival | None:
    """None where it cannot run: no program, no file of its own format, or no limit to hold it."""
    from elute.bench.memory_sweep import Rival

    path = shutil.which(program)
    if gguf is not None and path is None:
        raise click.UsageError(f"found no {program} to run --gguf with; install llama.cpp")
    if gguf is None and source.is_file():  # packed from a GGUF file: the same weights
        gguf = source
    return None if no_limit or gguf is None or path is None else Rival(path, gguf, tokens)


def _shares(option: str, text: str, *, least: float = 0.01) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value < 100 for value in values):
        raise click.BadParameter(f"found {text!r} in {option}, wanted numbers such as 0.4,0.65")
    return list(dict.fromkeys(values))


def _table(found: Sweep) -> str:
    lines = [
        f"{'memory':>10}{'sparsity':>10}{'tok/s':>9}{'expected':>10}{'bound':>9}{'llama.cpp':>11}"
    ]
    for point in found.points:
        for row in point.elute:
            theirs = "" if point.llama_cpp_tok_s is None else f"{point.llama_cpp_tok_s:.2f}"
            lines.append(
                f"{point.memory_bytes / 1e6:>7.0f} MB{row['sparsity']:>10g}{row['tok_s']:>9.2f}"
                f"{row['predicted_tok_s']:>10.2f}{row['bound_tok_s']:>9.2f}{theirs:>11}"
            )
    return "\n".join(line.rstrip() for line in lines)
