"""`elute calibrate`: what --sparsity needs to know of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from elute.cli import options

SHOWN = (0.3, 0.5, 0.7)


@click.command("calibrate")
@click.argument("model", default="default")
@click.option(
    "--text",
    "text_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text like those that the model will see, UTF-8; a small one of many kinds if left out.",
)
@click.option(
    "--weighted",
    is_flag=True,
    help="Let a channel matter by its value times the norm of its weights, not by its value alone.",
)
@options.pack_options
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: physical cores]")
@options.memory
@options.as_json
@options.quiet
def command(model: str, text_path: Path | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure which channels of MODEL matter, on a text, and keep it with the model.

    --sparsity does it by itself, on a text of elute's own, when it is first used. Shown is what
    share of the weights of each kind would be left out.
    """
    from elute.cli.screen import Screen, answer_json
    from elute.flash.sparsity import kind, thresholds
    from elute.prepare import calibrate

    with Screen(quiet=quiet) as screen:
        text = None if text_path is None else options.read_text(text_path)
        path, scores = calibrate(model, text=text, progress=screen, **given)
    kinds: dict[str, dict[str, float]] = {}
    for sparsity in SHOWN:
        chosen = thresholds(scores, sparsity)
        members: dict[str, list[float]] = {}
        for name, threshold in chosen.items():
            share = scores[name].sparsity(threshold.value)
            members.setdefault(kind(name), []).append(share)
        for name, shares in members.items():
            kinds.setdefault(name, {})[str(sparsity)] = round(sum(shares) / len(shares), 3)
    if as_json:
        answer_json({"model": model, "file": str(path), "left_out": kinds})
        return
    click.echo(f"{path}")
    click.echo("left out at    " + "".join(f"{sparsity:>8}" for sparsity in SHOWN))
    for name, found in kinds.items():
        short = name.removesuffix(".weight").split(".")[-1]
        click.echo(f"{short:<15}" + "".join(f"{found[str(s)]:8.2f}" for s in SHOWN))
