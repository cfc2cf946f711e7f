"""`elute eval`: perplexity, and the distance to another model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elute.cli import options

if TYPE_CHECKING:
    from elute.cli.screen import Screen
    from elute.runtime.session import Executor

LOGITS_SHARE = 16  # of a budget, that the logits of one step may take; there are two at a time


@click.command("eval")
@click.argument("model", default="default")
@click.option(
    "--text",
    "text_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The text, UTF-8.",
)
@click.option("--windows", type=click.IntRange(1), help="Windows to use.  [default: all]")
@click.option(
    "--reference", is_flag=True, help="Run the slow float reference instead, of BASE too."
)
@click.option("--against", metavar="BASE", help="Also D(BASE || MODEL), nats a token.")
@options.load_options
@options.memory
@options.as_json
@options.quiet
def command(
    model: str,
    text_path: Path,
    windows: int | None,
    reference: bool,
    against: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Measure the perplexity of MODEL on a text, by the protocol of llama.cpp.

    The text is cut into windows of --context tokens (512), each evaluated alone, the predictions of
    its second half scored. --reference runs the weights in float: of a packed folder, or with
    --bits or --recipe, the packed codes; otherwise what the source holds; its cache is float unless
    --cache-type says otherwise. BASE has the cache that is the default, and no --sparsity. With
    --memory the logits are counted too; it is for one model, so not with --reference or --against.
    """
    from elute.bench.machine import peak_memory_bytes
    from elute.cli.screen import Screen, answer_json
    from elute.evaluate.kl import divergence
    from elute.evaluate.perplexity import perplexity, text_windows

    if given["memory"] is not None and (reference or against is not None):
        raise click.UsageError(
            "--memory is for one model: found --reference or --against beside it"
        )
    context = given["context"] or 512
    if reference and given["sparsity"]:
        raise click.UsageError("found --sparsity with --reference, which is dense; leave one out")
    with Screen(quiet=quiet) as screen:
        executor, tokens, bos = _subject(model, text_path, screen, reference, context, given)
        cut = text_windows(tokens, context=context, n_windows=windows, bos=bos)
        distance = None
        if against is None:
            result = perplexity(
                executor, cut, progress=lambda done, total: screen("perplexity", done, total)
            )
        else:
            plain = {**given, "bits": None, "recipe": None, "cache_type": None, "sparsity": 0.0}
            base, base_tokens, _ = _subject(against, text_path, screen, reference, context, plain)
            _check_same_tokens(tokens, base_tokens, against)
            distance = divergence(
                base, executor, cut, progress=lambda done, total: screen("kl", done, total)
            )
            result = distance.perplexity
    told: dict[str, Any] = {
        "model": model,
        "reference": reference,
        "sparsity": given["sparsity"],
        "text": text_path.name,
        "context": context,
        "windows": result.n_windows,
        "tokens_scored": result.n_scored,
        "perplexity": round(result.perplexity, 4),
        "standard_error": round(result.standard_error, 4),
    }
    if distance is not None:
        told |= {
            "against": against,
            "kl": round(distance.mean, 6),
            "kl_median": round(distance.median, 6),
            "kl_99": round(distance.percentile_99, 6),
            "kl_max": round(distance.maximum, 6),
            "same_top": round(distance.same_top, 5),
        }
    if given["memory"] is not None:
        told["peak_memory_bytes"] = peak_memory_bytes()
    if as_json:
        answer_json(told)
        return
    click.echo(
        f"perplexity {told['perplexity']:.4f} ± {told['standard_error']:.4f} "
        f"({told['windows']} windows of {context}, {told['tokens_scored']} tokens scored)"
    )
    if distance is not None:
        click.echo(
            f"kl to {against} {told['kl']:.4f}, median {told['kl_median']:.4f}, 99 % "
            f"{told['kl_99']:.4f}; same best token {100 * told['same_top']:.1f} %"
        )


def _subject(
    model: str,
    text_path: Path,
    screen: Screen,
    reference: bool,
    context: int,
    given: dict[str, Any],
) -> tuple[Executor, list[int], int | None]:
    """-> what runs, the tokens of the text, the token that every window begins with"""
    from elute.runtime.store import fetch, open_packed

    if given.get("memory") is not None:
        return _limited_subject(model, text_path, screen, context, given)
    if not reference:
        loaded = options.load_model(model, screen, {**given, "context": context})
        tokens, bos = loaded.text_tokens(options.read_text(text_path))
        return loaded.executor, tokens, bos
    from elute.api import text_tokens
    from elute.evaluate.reference import reference_executor
    from elute.formats import open_checkpoint
    from elute.formats.packed import PackedModel
    from elute.formats.tokenizer import Tokenizer
    from elute.runtime.store import is_packed

    asked = {"bits": given["bits"], "recipe": given["recipe"]}
    if any(value is not None for value in asked.values()):
        path = open_packed(model, **asked, progress=screen).path
    else:
        path = fetch(model, progress=screen).path
    source = PackedModel.open(path) if is_packed(path) else open_checkpoint(path)
    tokenizer = Tokenizer.from_files(source.tokenizer_files())
    tokens, bos = text_tokens(tokenizer, options.read_text(text_path))
    return (
        reference_executor(path, context=context, cache_type=given["cache_type"]),
        tokens,
        bos,
    )


def _limited_subject(
    model: str, text_path: Path, screen: Screen, context: int, given: dict[str, Any]
) -> tuple[Executor, list[int], int | None]:
    """The text is cut before the model is loaded, so that what that takes is in the budget."""
    from elute import _native
    from elute.api import text_tokens
    from elute.formats.tokenizer import Tokenizer
    from elute.runtime.memory import parse_size
    from elute.runtime.session import LOGITS_BYTES
    from elute.runtime.store import open_packed

    packed = open_packed(model, bits=given["bits"], recipe=given["recipe"], progress=screen)
    tokens, bos = text_tokens(
        Tokenizer.from_files(packed.tokenizer_files()), options.read_text(text_path)
    )
    del packed
    _native.return_freed_memory()
    score_bytes = min(LOGITS_BYTES, parse_size(given["memory"]) // LOGITS_SHARE)
    loaded = options.load_model(
        model, screen, {**given, "context": context, "score_bytes": score_bytes}
    )
    return loaded.executor, tokens, bos


def _check_same_tokens(tokens: list[int], base_tokens: list[int], against: str) -> None:
    from elute.errors import UnsupportedError

    if tokens != base_tokens:
        raise UnsupportedError(
            f"{against}: its tokenizer cuts the text into other tokens, wanted the same; compare "
            "models with one tokenizer"
        )
