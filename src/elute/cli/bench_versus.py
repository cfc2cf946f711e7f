"""What `elute bench model --versus` runs: which program, on which file. Prints what it makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elute.cli.options import Decorator, Function

if TYPE_CHECKING:
    from elute.bench.llama_cpp import LlamaCpp
    from elute.bench.subject import Subject
    from elute.cli.screen import Screen

TERNARY = "ternary"
DEFAULT_BITS = 4  # of a random model
RIVALS = ("llama.cpp",)
TIMEOUT_S = 1800
# Without --versus they would be ignored.
OF_VERSUS = ("llama_bench", "gguf", "versus_type", "no_warmup", "timeout")
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def shape_bits(bits: str | None) -> int | None:
    """What --bits says of a random model; None is ternary."""
    return None if bits == TERNARY else int(bits or DEFAULT_BITS)


def versus_options(function: Function) -> Function:
    """The options of this module."""
    decorators: tuple[Decorator[Function], ...] = (
        click.option(
            "--versus",
            type=click.Choice(RIVALS),
            help="Take turns with this program, and show how many times as fast elute is.",
        ),
        click.option(
            "--llama-bench",
            type=FILE,
            help="The program.  [default: llama-bench on PATH, or else llama-cpp-python]",
        ),
        click.option(
            "--gguf",
            type=FILE,
            help="What it runs.  [default: the file that MODEL was made from; with --shape, a "
            "random file of that shape, kept in ELUTE_HOME]",
        ),
        click.option(
            "--versus-type",
            metavar="TYPE",
            help="Type of the random file, such as Q4_0.  [default: the one of as many bits]",
        ),
        click.option(
            "--no-warmup",
            is_flag=True,
            default=None,
            help="Do not let llama-bench run each test once before it times it.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(0, min_open=True),
            metavar="SECONDS",
            help=f"Longest run of the other program.  [default: {TIMEOUT_S}]",
        ),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def check_versus(given: dict[str, Any]) -> None:
    """A usage error for options that nothing would heed."""
    from elute.bench.random_gguf import FILE_TYPES

    if given["versus"] is None:
        for name in OF_VERSUS:
            if given[name] is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} is for --versus {RIVALS[0]}")
    elif given["cache_type"] == "q8":
        raise click.UsageError(
            f"found --cache-type q8 beside --versus: {RIVALS[0]} is run with its f16 cache; leave "
            "one of them out"
        )
    chosen = given["versus_type"]
    if chosen is not None:
        if given["shape"] is None or given["gguf"] is not None:
            raise click.UsageError("--versus-type is for --shape without --gguf")
        if chosen not in FILE_TYPES:
            raise click.BadParameter(
                f"found {chosen!r} in --versus-type, wanted one of {', '.join(FILE_TYPES)}"
            )


def chosen_rival(subject: Subject, given: dict[str, Any], screen: Screen) -> LlamaCpp | None:
    """The rival over its file, which is made where there is none; None without --versus."""
    from elute.bench.llama_cpp import LlamaCpp, find_llama_bench

    if given["versus"] is None:
        return None
    command = find_llama_bench(given["llama_bench"])
    return LlamaCpp(
        command,
        given["gguf"] or _file_of(subject, given, screen),
        timeout_s=given["timeout"] or TIMEOUT_S,
        warm_up=not given["no_warmup"],
    )


def _file_of(subject: Subject, given: dict[str, Any], screen: Screen) -> Path:
    if given["shape"] is not None:
        return _random_file(subject, given, screen)
    if subject.gguf is not None:
        return subject.gguf
    raise click.UsageError(
        f"{subject.name} was not packed from the codes of a GGUF file that is still there; "
        "name one with --gguf"
    )


def _random_file(subject: Subject, given: dict[str, Any], screen: Screen) -> Path:
    from elute.bench.random_gguf import file_type_of, random_gguf
    from elute.formats.sources import cache_dir

    file_type = given["versus_type"]
    if file_type is None:
        if given["recipe"] is not None:
            raise click.UsageError("a recipe has no one type of llama.cpp; give --versus-type")
        file_type = file_type_of(shape_bits(given["bits"]))
    folder = cache_dir() / "bench"
    file = random_gguf(
        subject.name,
        subject.config,
        file_type,
        folder,
        progress=lambda done, total: screen("write", done, total),
    )
    screen.note(
        f"{file.path}: random {file_type} of {file.n_bytes >> 20} MiB, "
        f"{'made and kept' if file.made else 'found'}; remove {folder} when you are done"
    )
    if file.stand_ins:
        screen.note(
            f"{file.path}: {file.stand_ins} matrices have other types, as llama-quantize chooses "
            "them where blocks do not divide a row"
        )
    return file.path
