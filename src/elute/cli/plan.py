"""`elute plan`: what a budget of memory would be spent on, and how fast the model would be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elute.cli import options

if TYPE_CHECKING:
    from elute.bench.budget import Forecast

EXIT_SLOW, EXIT_IMPOSSIBLE = 1, 2


@click.command("plan")
@click.argument("model", default="default")
@click.option("--memory", required=True, metavar="SIZE", help="The budget, such as 1.5G.")
@options.pack_options
@click.option("--context", type=click.IntRange(1), help="Tokens of prompt and answer together.")
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: physical cores]")
@options.cache_type
@options.sparsity
@click.option(
    "--flash",
    "flash_gb_s",
    type=click.FloatRange(min=0.001),
    help="GB/s of the disk, instead of measuring the one that the model is on.",
)
@options.as_json
@options.quiet
def command(
    model: str,
    memory: str,
    context: int | None,
    threads: int | None,
    cache_type: str | None,
    sparsity: float,
    flash_gb_s: float | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> int:
    """Show how a budget of memory is split, the bound that the disk sets, and the expected rate.

    Sizes follow from headers alone: nothing is packed, and of a repository that is not here some
    kilobytes are fetched. The rate is that of a rehearsal of some seconds, where one can be made:
    layers of this shape run under the plan, with the disk that the model is on, or would be packed
    to. Leaves with 0 when
    all weights fit, with 1 when some are read from flash for every token, with 2 when the budget is
    too small.
    """
    import psutil

    from elute.bench.budget import forecast
    from elute.cli.screen import Screen, answer_json
    from elute.errors import BudgetError
    from elute.formats.packed import PackedModel
    from elute.runtime.store import can_reorder, foresee_packed, is_packed

    held = psutil.Process().memory_info().rss
    with Screen(quiet=quiet) as screen:
        packed = foresee_packed(model, bits=given["bits"], recipe=given["recipe"])
        if not isinstance(packed, PackedModel):
            screen.note(f"{model}: is not packed yet; its sizes follow from headers")
        try:
            found = forecast(
                packed,
                memory,
                context=context,
                threads=threads,
                cache_type=cache_type or "f16",
                flash_gb_s=flash_gb_s,
                held=held,
                sparsity=sparsity,
                by_channel=sparsity > 0 and not is_packed(Path(model)) and can_reorder(packed),
            )
        except BudgetError as error:
            click.echo(f"error: {error}", err=True)
            return EXIT_IMPOSSIBLE
    if as_json:
        answer_json(found.to_json())
    else:
        click.echo(_page(found))
    return EXIT_SLOW if found.plan.missed else 0


def _page(found: Forecast) -> str:
    plan = found.plan
    kept = plan.pinned_bytes + plan.slot_bytes
    layers = sum(bank.total for bank in plan.banks) or plan.pinned_bytes + plan.missed
    rows = [(purpose, f"{size / 1e6:9.1f} MB") for purpose, size in plan.fixed.items()]
    rows += [
        (
            "model",
            f"{found.model_bytes / 1e6:9.1f} MB, {found.bits_per_weight:.2f} bits a weight",
        ),
        ("layers kept", f"{kept / 1e6:9.1f} MB of {layers / 1e6:.1f}"),
        ("window", f"{(plan.window + plan.staging) / 1e6:9.1f} MB"),
        ("in all", f"{plan.total / 1e6:9.1f} MB of {plan.budget / 1e6:.1f}"),
        (
            "a token reads",
            f"{plan.missed / 1e6:9.1f} MB of flash, {found.touched / 1e6:.1f} in all",
        ),
        ("flash", f"{found.flash_gb_s:9.2f} GB/s"),
        ("memory", f"{found.dram_gb_s:9.2f} GB/s"),
        ("context", f"{found.context:9d} tokens"),
        ("bound", f"{found.bound_tok_s:9.2f} tok/s by {found.limit}, were nothing else to do"),
        (
            "expected",
            f"{found.prediction.tok_s:9.2f} tok/s, of which "
            f"{1e3 * found.prediction.waited_s:.1f} ms a token wait for flash",
        ),
        ("verdict", "fits" if not plan.missed else "slow: reads flash for every token"),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)
