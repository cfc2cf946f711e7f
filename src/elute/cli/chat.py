"""`elute chat`: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from elute.cli import EXIT_ERROR, EXIT_INTERRUPTED, options
from elute.cli.run import answer, note_npu, note_report

if TYPE_CHECKING:
    from elute.api import Model
    from elute.cli.memory_report import MemoryReport
    from elute.cli.screen import Screen

HELP = "/reset starts over, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


@click.command("chat")
@click.argument("model", default="default")
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
@options.sampling_options
@options.load_options
@options.memory
@options.cache_aware
@options.checked
@options.quiet
def command(model: str, **given: Any) -> int:
    """Talk with MODEL, line by line. What a turn shares with the last one is not computed again.

    Commands: /reset starts over, /exit or Ctrl-D leaves. Ctrl-C ends an answer, twice leaves. Lines
    are read from stdin; without a terminal there is no prompt. What you type is kept for the arrow
    keys and not saved.
    """
    from elute.cli.memory_report import MemoryReport
    from elute.cli.screen import Screen

    with (
        Screen(quiet=given["quiet"]) as screen,
        options.load_model(model, screen, given) as loaded,
    ):
        if not loaded.can_chat:
            from elute.errors import UnsupportedError

            raise UnsupportedError(
                f"{loaded.name}: found no chat template, wanted one to chat; use elute run --raw"
            )
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() its arrow keys and history

            screen.note(f"{loaded.name}, context {loaded.context}. {HELP}.")
        report = None if loaded.flash is None else MemoryReport(loaded)
        code = _converse(loaded, given, screen, report)
        note_npu(loaded, screen)
        note_report(loaded, report, screen)
        return code


def _converse(
    model: Model, given: dict[str, Any], screen: Screen, report: MemoryReport | None
) -> int:
    from elute.errors import BudgetError, EluteError

    start = [] if given["system"] is None else [{"role": "system", "content": given["system"]}]
    messages = list(start)
    interrupted = False  # the last line was a Ctrl-C as well
    code = 0
    while True:
        try:
            line = _typed_line() if sys.stdin.isatty() else _next_line()
            interrupted = False
        except EOFError:
            return code
        except KeyboardInterrupt:
            if interrupted or not sys.stdin.isatty():
                click.echo("", err=True)
                return EXIT_INTERRUPTED
            interrupted = True
            screen.note("\nCtrl-C again, /exit or Ctrl-D leaves")
            continue
        text = line.strip()
        if text in ("/exit", "/quit"):
            return code
        if text == "/reset":
            messages = list(start)
            screen.note("a new conversation")
        elif text == "/help":
            screen.note(HELP)
        elif text.startswith("/") and " " not in text and text.count("/") == 1:
            screen.note(f"no command {text}; {HELP}")
        elif text:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                done = answer(model, asked, given, screen=screen, show=True, report=report)
            except EluteError as error:
                # The conversation as it was is still good; only this message is left out.
                hint = " (/reset starts over)" if isinstance(error, BudgetError) else ""
                click.echo(f"error: {error}{hint}", err=True)
                code = 0 if sys.stdin.isatty() else EXIT_ERROR
                continue
            from elute.cli.screen import figures_line

            messages = [*asked, {"role": "assistant", "content": done.text}]
            screen.note(figures_line(done.figures, bits_per_weight=model.bits_per_weight))


def _typed_line() -> str:
    """Raises EOFError after Ctrl-D, KeyboardInterrupt after Ctrl-C."""
    to_terminal = sys.stdout.isatty()
    if not to_terminal:
        # input() would write it to stdout, into the file that keeps the answers.
        click.echo(">>> ", err=True, nl=False)
    try:
        return input(">>> " if to_terminal else "")
    except EOFError:
        click.echo("", err=True)  # the shell's prompt begins a line of its own
        raise


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
