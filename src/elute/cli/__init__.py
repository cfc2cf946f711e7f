"""The `elute` command: what a user types. Here: exit codes, and errors as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line (sys.argv when None) and exits: 1 error, 2 usage, 130 interrupted.

    Errors are one line on stderr. ELUTE_DEBUG=1 shows the traceback of unexpected ones.
    """
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    import click

    from elute.cli.application import application
    from elute.errors import EluteError

    _open_closed_streams()
    try:
        code = application.main(
            args=None if arguments is None else list(arguments),
            prog_name="elute",
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("", err=True)
        return EXIT_INTERRUPTED
    except EluteError as error:
        click.echo(f"error: {_one_line(error)}", err=True)
        return EXIT_ERROR
    except Exception as error:
        if os.environ.get("ELUTE_DEBUG"):
            raise
        told = _one_line(error) or "no message"
        click.echo(
            f"error: {type(error).__name__}: {told} (unexpected; ELUTE_DEBUG=1 shows more)",
            err=True,
        )
        return EXIT_ERROR


def _open_closed_streams() -> None:
    """After `>&-` Python has None in place of a stream; here one that holds nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open to the end)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
