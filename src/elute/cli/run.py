"""`elute run`: one prompt, one answer."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elute.cli import EXIT_INTERRUPTED, options

if TYPE_CHECKING:
    from elute.api import Model
    from elute.cli.memory_report import MemoryReport
    from elute.cli.screen import Screen
    from elute.runtime.engine import Chunk, Completion


@click.command("run")
@click.argument("model_and_prompt", nargs=-1, metavar="[MODEL] PROMPT")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
@click.option("--system", metavar="TEXT", help="System message, before the prompt.")
@click.option("--logprobs", type=int, metavar="N", help="With --json: N alternatives a token.")
@options.sampling_options
@options.load_options
@options.memory
@options.cache_aware
@options.checked
@options.as_json
@options.quiet
def command(model_and_prompt: tuple[str, ...], **given: Any) -> int:
    """Answer PROMPT, streaming it to stdout; "-" reads the prompt from stdin.

    MODEL is the default model when it is left out. The last line on stderr has the figures of the
    run; with --memory two more have what a rehearsal of it gave and what it took. Ctrl-C ends the
    answer, and once more leaves at once; both exit with 130.

    \b
        elute run "Why is the sky blue?"
        elute run Qwen/Qwen3-0.6B --bits 3 "Why is the sky blue?"
        git diff | elute run default --system "Write a commit message." -
    """
    from elute.cli.memory_report import MemoryReport
    from elute.cli.screen import Screen, figures_line

    name, text = _split(model_and_prompt)
    if given["logprobs"] is not None and not given["as_json"]:
        raise click.UsageError("--logprobs needs --json")
    if given["raw"] and given["system"] is not None:
        raise click.UsageError("--system needs the chat template, which --raw leaves out")
    if text == "-":
        text = _read_stdin()
    if not text:
        raise click.UsageError("found an empty PROMPT, wanted some text")
    with Screen(quiet=given["quiet"]) as screen:
        started = time.perf_counter()
        with options.load_model(name, screen, given) as model:
            load_s = time.perf_counter() - started
            prompt: Any = text
            if not given["raw"] and model.can_chat:
                system = given["system"]
                before = [] if system is None else [{"role": "system", "content": system}]
                prompt = [*before, {"role": "user", "content": text}]
            elif given["system"] is not None:
                raise click.UsageError("--system needs a chat template, and this model has none")
            report = None if model.flash is None else MemoryReport(model)
            show = not given["as_json"]
            done = answer(model, prompt, given, screen=screen, show=show, report=report)
            if given["as_json"]:
                _print_json(model, done, load_s, report)
            else:
                screen.note(figures_line(done.figures, bits_per_weight=model.bits_per_weight))
                note_npu(model, screen)
                note_report(model, report, screen)
    return EXIT_INTERRUPTED if done.finish_reason == "cancelled" else 0


def _split(arguments: tuple[str, ...]) -> tuple[str, str]:
    """-> model, prompt"""
    if len(arguments) == 2:
        return arguments[0], arguments[1]
    if len(arguments) == 1:
        if _names_a_model(arguments[0]):
            raise click.UsageError(f"found the model {arguments[0]} but no PROMPT; - reads stdin")
        return "default", arguments[0]
    raise click.UsageError(
        f"found {len(arguments)} arguments, wanted [MODEL] PROMPT; is the prompt in quotes?"
    )


def _names_a_model(text: str) -> bool:
    try:
        return text == "default" or (text != "" and Path(text).exists())
    except OSError:  # longer than any name of a file: a prompt
        return False


def _read_stdin() -> str:
    from elute.errors import FormatError

    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"stdin: byte {error.start} is not UTF-8; convert the prompt to UTF-8"
        ) from None


def note_npu(model: Model, screen: Screen) -> None:
    """What a device did for the prompts."""
    from elute.cli.screen import npu_line

    if model.prompts is not None:
        screen.note(npu_line(model.prompts))


def note_report(model: Model, report: MemoryReport | None, screen: Screen) -> None:
    """What a run under a budget took beside what was to be expected; closes the model."""
    from elute.cli.memory_report import report_lines
    from elute.cli.screen import flash_line

    if report is None or screen.quiet:
        return
    if model.flash is not None and model.flash.plan.missed:
        screen.note(flash_line(model.flash))
    for line in report_lines(*report.close()):
        screen.note(line)


def answer(
    model: Model,
    prompt: Any,
    given: dict[str, Any],
    *,
    screen: Screen,
    show: bool,
    report: MemoryReport | None = None,
) -> Completion:
    """Generates; Ctrl-C ends the answer. show: stream it to stdout, with a newline at its end.

    Says so when a limit cut the answer.
    """
    from elute.cli.interrupts import Interrupts
    from elute.runtime.engine import join

    chunks: list[Chunk] = []
    if report is not None:
        report.begin()
    with Interrupts() as interrupts:
        for chunk in model.stream(
            prompt,
            max_tokens=given["max_tokens"],
            stop=given["stop"],
            on_prompt=lambda done, total: screen("prompt", done, total),
            cancelled=interrupts.cancelled,
            **options.given_sampling(given),
        ):
            chunks.append(chunk)
            if report is not None:
                report.chunk(chunk)
            if show and chunk.text:
                screen.clear()
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    if show:
        sys.stdout.write("\n")
        sys.stdout.flush()
    done = join(chunks)
    if done.finish_reason == "length":
        limit = given["max_tokens"]
        full = len(done.tokens) < limit
        at = f"the end of the context, {model.context} tokens" if full else f"--max-tokens {limit}"
        screen.note(f"the answer was cut at {at}")
    return done


def _print_json(model: Model, done: Completion, load_s: float, report: MemoryReport | None) -> None:
    from elute.cli.screen import (
        answer_json,
        figures_json,
        flash_json,
        npu_json,
        seconds_since_start,
    )

    value: dict[str, Any] = {
        "model": model.name,
        "text": done.text,
        "finish_reason": done.finish_reason,
        "stop": done.stop,
        "seed": done.seed,
        **figures_json(done.figures, bits_per_weight=model.bits_per_weight),
        "load_s": round(load_s, 4),
        # Measured at the end, less what came after the first token.
        "start_to_first_token_s": round(seconds_since_start() - done.figures.generation_s, 3),
    }
    if model.flash is not None:
        value["flash"] = flash_json(model.flash)
    if model.prompts is not None:
        value["npu"] = npu_json(model.prompts)
    if done.logprobs:
        value["logprobs"] = [
            {
                "token": entry.token,
                "text": model.detokenize([entry.token]),
                "logprob": entry.logprob,
                "top": [
                    {"token": token, "text": model.detokenize([token]), "logprob": logprob}
                    for token, logprob in entry.top
                ],
            }
            for entry in done.logprobs
        ]
    if report is not None:
        prediction, measured = report.close()
        value["predicted"] = None if prediction is None else prediction.to_json()
        value["measured"] = measured.to_json()
    answer_json(value)
