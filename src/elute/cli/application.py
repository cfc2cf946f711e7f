"""The command group. A verb is imported when it is used, so that `elute --help` is quick."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import click

from elute.errors import NOTE

# verb -> its line in `elute --help`
VERBS = {
    "run": "Answer one prompt.",
    "chat": "Talk with a model.",
    "convert": "Pack a model into a folder.",
    "info": "Show what a model consists of.",
    "verify": "Check every byte of a packed model.",
    "plan": "Show what a budget of memory would give.",
    "calibrate": "Measure a model for --sparsity.",
    "npu": "Prepare a model for NPUs.",
    "eval": "Measure the perplexity of a model on a text.",
    "bench": "Measure the speed of a model or of the kernels.",
    "doctor": "Show what elute finds on this machine.",
}


class VerbGroup(click.Group):
    """Knows the names and one-line helps of its verbs without importing them.

    verbs    verb -> its line in the help
    modules  the module <modules><verb> has the verb's command, named `command`
    """

    def __init__(
        self, *arguments: Any, verbs: Mapping[str, str], modules: str, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._verbs = verbs
        self._modules = modules

    def invoke(self, ctx: click.Context) -> Any:
        """Ends quietly when the reader of a pipe has enough; click itself would exit with 1."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still buffered must not fail again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return result

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._verbs:
            return None
        command = importlib.import_module(self._modules + cmd_name.replace("-", "_")).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._verbs.items()))


class _Stderr(logging.Handler):
    """What the library has to say, as lines on the stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.lower()}: {self.format(record)}", err=True)


@click.group(
    cls=VerbGroup,
    verbs=VERBS,
    modules="elute.cli.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
    invoke_without_command=True,
)
@click.option("--version", is_flag=True, help="Show the version and leave.")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr of what is done and why.")
@click.pass_context
def application(ctx: click.Context, version: bool, verbose: bool) -> None:
    """Language models larger than the memory they are given, at 1-4 bits, on ordinary CPUs.

    MODEL is a path (a GGUF file, a Hugging Face folder, a packed folder), a Hugging Face id, or
    "default", a small model for a first try. The answer goes to stdout, everything else to stderr.
    """
    _speak_utf8()
    # The hub client's warnings of each retry; when all fail, its error becomes ours.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logger = logging.getLogger("elute")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logging.addLevelName(NOTE, "note")
        logger.addHandler(_Stderr())
        logger.propagate = False
    logger.setLevel(logging.INFO if verbose else NOTE)
    if version:
        from importlib.metadata import version as version_of

        click.echo(f"elute {version_of('elute')}")
    elif ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _speak_utf8() -> None:
    """Models write every script; a terminal that cannot show a character shows a replacement."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
