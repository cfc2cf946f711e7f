"""`elute verify`: whether a packed model is on the disk as it was written."""

from __future__ import annotations

from typing import Any

import click

from elute.cli import EXIT_ERROR, options

MOST_SHOWN = 10  # faults; --json has them all


@click.command("verify")
@click.argument("model", default="default")
@options.pack_options
@options.as_json
@options.quiet
def command(model: str, as_json: bool, quiet: bool, **given: Any) -> int:
    """Check every page of MODEL's weights and every other file, packed first where it is not.

    Reads past the page cache, so what is checked is what the disk holds. Leaves with 1, and names
    file, page and tensor, when something is wrong.
    """
    from elute.cli.screen import Screen, answer_json
    from elute.formats.verify import verify
    from elute.runtime.store import packed_folder

    with Screen(quiet=quiet) as screen:
        path = packed_folder(model, bits=given["bits"], recipe=given["recipe"], progress=screen)
        verdict = verify(path, progress=lambda done, total: screen("verify", done, total))
        if not verdict.by_page:
            screen.note(
                f"{path}: found no checksums of pages, so whole files were hashed; convert the "
                "model again to have them"
            )
    if as_json:
        answer_json(
            {
                "path": str(path),
                "bytes": verdict.n_bytes,
                "by_page": verdict.by_page,
                "faults": verdict.faults,
            }
        )
    else:
        for fault in verdict.faults[:MOST_SHOWN]:
            click.echo(f"error: {fault}", err=True)
        if verdict.faults:
            more = len(verdict.faults) - MOST_SHOWN
            click.echo(
                f"error: {path}: {f'{more} more faults; ' if more > 0 else ''}check the disk and "
                "convert the model again",
                err=True,
            )
        else:
            click.echo(f"{path}: {verdict.n_bytes} bytes, all as they were written")
    return EXIT_ERROR if verdict.faults else 0
