"""`elute convert`: a model into a packed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from elute.cli import options


@click.command("convert")
@click.argument("source", metavar="SRC")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@options.pack_options
@click.option(
    "--order",
    type=click.Choice(["panels", "channels"]),
    default="panels",
    metavar="ORDER",
    help="panels, fastest when every weight is used; or channels, from which --sparsity with "
    "--memory reads only those that count.  [default: panels]",
)
@click.option(
    "--layer-group",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Layers whose channels lie side by side, so that one read brings one of each.",
)
@click.option("--force", is_flag=True, help="Replace a packed model that OUT has already.")
@click.option("--fetch-only", is_flag=True, help="Download SRC into the cache and stop there.")
@options.as_json
@options.quiet
def command(
    source: str,
    out: Path | None,
    order: str,
    layer_group: int,
    fetch_only: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Pack the model SRC into the new folder OUT.

    Codes of a quantized SRC are kept, without any loss, unless --bits or the recipe asks for
    others. OUT appears when it is complete, or not at all. With --order channels, SRC may be packed
    already: its codes are moved, nothing else.
    """
    from elute.cli.screen import MIB, Screen, answer_json
    from elute.errors import UnsupportedError
    from elute.runtime.store import (
        choose_recipe,
        fetch,
        is_packed,
        pack_checkpoint,
        reorder,
    )

    if (out is None) != fetch_only:
        raise click.UsageError("wanted either OUT or --fetch-only")
    if layer_group > 1 and order != "channels":
        raise click.UsageError("--layer-group is of --order channels")
    recipe = choose_recipe(given["bits"], given["recipe"])
    with Screen(quiet=quiet) as screen:
        path = fetch(source, progress=screen).path
        if out is None:
            screen.note(f"{source}: {path}")
            if as_json:
                answer_json({"path": str(path)})
            return
        if order == "channels":
            packed = reorder(
                source,
                out,
                layer_group=layer_group,
                bits=given["bits"],
                recipe=given["recipe"],
                force=given["force"],
                progress=screen,
            )
        elif is_packed(path):
            raise UnsupportedError(f"{path}: is packed already; give the model it was made from")
        else:
            packed = pack_checkpoint(path, out, recipe, force=given["force"], progress=screen)
        screen.note(
            f"{packed.path}: {packed.nbytes / MIB:.0f} MiB, "
            f"{packed.bits_per_weight:.2f} bits a weight"
        )
    if as_json:
        answer_json(
            {
                "path": str(packed.path),
                "bytes": packed.nbytes,
                "bits_per_weight": round(packed.bits_per_weight, 3),
            }
        )
