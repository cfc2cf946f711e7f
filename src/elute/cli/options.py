"""Options that several verbs share, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from elute.api import Model
    from elute.cli.screen import Screen

MAX_SPARSITY = 0.9  # flash.sparsity's, which is not imported for a help text

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


def _hush(_ctx: click.Context, _option: click.Parameter, quiet: bool) -> bool:
    if quiet:
        logging.getLogger("elute").setLevel(logging.WARNING)
    return quiet


quiet = click.option(
    "-q", "--quiet", is_flag=True, callback=_hush, help="Say nothing but the answer and errors."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def _all(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


thread_counts = click.option(
    "-t",
    "--threads",
    metavar="N,N",
    help="Thread counts to compare.  [default: 1, 2, 4 … all physical cores]",
)


def chosen_thread_counts(threads: str | None) -> list[int]:
    """What the option thread_counts means."""
    if threads is not None:
        return whole_numbers("--threads", threads)
    from elute.runtime.threads import default_threads

    most = default_threads()
    return [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]


def whole_numbers(option: str, text: str, *, least: int = 1, most: int | None = None) -> list[int]:
    """A comma-separated list of numbers, each once; a usage error when it is not one."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least or (most is not None and max(numbers) > most):
        limits = f"from {least}" if most is None else f"from {least} to {most}"
        raise click.BadParameter(
            f"found {text!r} in {option}, wanted numbers {limits} such as 1,2,4"
        )
    return list(dict.fromkeys(numbers))


recipe = click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file that says what each tensor gets.",
)

pack_options = _all(
    click.option(
        "--bits",
        type=click.IntRange(1, 8),
        help="Bits a weight of linear layers, also where that quantizes a quantized model again.  "
        "[default: the model's own, or 4]",
    ),
    recipe,
)

kernel_options = _all(
    click.option("--isa", help="Instruction set to use instead of the best one; see doctor."),
    click.option(
        "--kernel",
        type=click.Choice(["auto", "lookup", "multiply"]),
        default="auto",
        metavar="KERNEL",
        help="auto, lookup or multiply: how weights are multiplied, with the same answers; auto "
        "is the faster one by measurement, see info.  [default: auto]",
    ),
)

cache_type = click.option(
    "--cache-type",
    type=click.Choice(["f16", "q8"]),
    help="What keys and values are kept in: f16, or 8-bit codes in half the memory.  "
    "[default: f16]",
)

sparsity = click.option(
    "--sparsity",
    type=click.FloatRange(0, MAX_SPARSITY),
    default=0.0,
    metavar="SHARE",
    help="Leave out this share of the weights, 0 to 0.9: for each token those that matter least to "
    "it. Answers get worse; the first use measures the model, as calibrate does.  [default: 0]",
)

npu_pruning = click.option(
    "--npu-pruning",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Of the NPU: add no outliers back at this share of the inputs, 0 to 1.  [default: 0.35]",
)

npu_chunk = click.option(
    "--npu-chunk",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Of the NPU: tokens of a prompt that are multiplied at a time.  [default: 256]",
)

npu_options = _all(
    click.option(
        "--npu",
        default="off",
        metavar="DEVICE",
        help="What multiplies prompts, in int8: qnn, qnn:CHIP, openvino, cpu, sim, auto or off; "
        "require:DEVICE fails where that does not work; see doctor and docs/npu.md.  "
        "[default: off]",
    ),
    npu_pruning,
    npu_chunk,
    click.option(
        "--npu-hot",
        metavar="SHARE|SIZE",
        help="With --npu, weight rows of outliers that stay in memory: a share of the int8 "
        "weights, 0 to 1, or a size such as 64M. Others are made, or read, when they are wanted, "
        "with the same answers.  [default: 0.03]",
    ),
)

load_options = _all(
    pack_options,
    click.option("--context", type=click.IntRange(1), help="Tokens of prompt and answer together."),
    click.option("--threads", type=click.IntRange(1), help="Threads.  [default: physical cores]"),
    kernel_options,
    cache_type,
    sparsity,
    npu_options,
)

memory = click.option(
    "--memory",
    metavar="SIZE",
    help="All that the process may hold, such as 1.5G; weights beyond it are read from flash "
    "for every token, with the same answers.  [default: no limit]",
)

cache_aware = click.option(
    "--cache-aware",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="MARGIN",
    help="With --memory and --sparsity, prefer weights that are in memory, 0 to 1: fewer are read, "
    "and the answer depends on the budget and on what was answered before.  [default: 0]",
)

checked = click.option(
    "--checked",
    is_flag=True,
    help="Compare weights with their checksums when they are read: damage is an error, never a "
    "token.",
)

# Longer than an answer with its reasoning; a small model that repeats itself never ends by itself.
MAX_TOKENS = 2048

sampling_options = _all(
    click.option(
        "--max-tokens",
        type=click.IntRange(0),
        default=MAX_TOKENS,
        show_default=True,
        help="Longest answer.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this; repeatable."),
    click.option("--temperature", type=float, help="0 is greedy."),
    click.option("--top-k", type=int, help="Keep the K most probable tokens; 0 keeps all."),
    click.option("--top-p", type=float, help="Keep the most probable tokens that reach P."),
    click.option("--min-p", type=float, help="Keep tokens P times as probable as the best."),
    click.option("--repetition-penalty", type=float, help="Divides logits of earlier tokens."),
    click.option("--presence-penalty", type=float, help="Subtracted once from used tokens."),
    click.option("--frequency-penalty", type=float, help="Subtracted for every use of a token."),
    click.option("--seed", type=int, help="Repeat an answer."),
)

SAMPLING_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)


def given_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling options that were given, out of all options of a command."""
    return {name: options[name] for name in SAMPLING_NAMES if options.get(name) is not None}


def load_model(model: str, screen: Screen, options: dict[str, Any]) -> Model:
    """elute.load with the load_options of a command."""
    from elute import api

    return api.load(
        model,
        bits=options["bits"],
        recipe=options["recipe"],
        context=options["context"],
        threads=options["threads"],
        isa=options["isa"],
        kernel=options["kernel"],
        cache_type=options["cache_type"] or "f16",
        memory=options.get("memory"),
        sparsity=options["sparsity"],
        cache_aware=options.get("cache_aware", 0.0),
        npu=options["npu"],
        npu_pruning=options["npu_pruning"],
        npu_chunk=options["npu_chunk"],
        npu_hot=options["npu_hot"],
        checked=options.get("checked", False),
        score_bytes=options.get("score_bytes"),
        progress=screen,
    )


def read_text(path: Path) -> str:
    """Raises FormatError unless it is UTF-8."""
    from elute.errors import FormatError

    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: byte {error.start} is not UTF-8; convert the text to UTF-8"
        ) from None
