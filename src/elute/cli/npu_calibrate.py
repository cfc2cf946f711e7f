"""`elute npu calibrate`: what static int8 scales do to a model, measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elute.cli import options

if TYPE_CHECKING:
    from elute.npu.calibrate import SiteStatistics


@click.command("calibrate")
@click.argument("model", default="default")
@click.option(
    "--text",
    "text_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text like those that the model will see, UTF-8; a small one of many kinds if left out.",
)
@options.npu_pruning
@options.pack_options
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: physical cores]")
@options.as_json
@options.quiet
def command(
    model: str,
    text_path: Path | None,
    npu_pruning: float | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Measure on a text how large MODEL's activations get, and keep it with the model.

    --npu does it by itself, on a text of elute's own, when it is first used. Shown is for each kind
    of input: how many of them have their outliers added back at this pruning; the largest outlier
    in steps of the scale, of which int8 holds 127; and what the rounding is foreseen to do to
    predictions, nats a token: with no outlier added back, at this pruning, with all added back.
    """
    from elute.cli.screen import Screen, answer_json
    from elute.prepare import calibrate_npu
    from elute.runtime.npu import DEFAULT_PRUNING

    pruning = DEFAULT_PRUNING if npu_pruning is None else npu_pruning
    with Screen(quiet=quiet) as screen:
        text = None if text_path is None else options.read_text(text_path)
        path, statistics = calibrate_npu(model, text=text, progress=screen, **given)
    kinds = by_kind(statistics, pruning)
    if as_json:
        tokens = next((found.tokens for found in statistics.values()), 0)
        answer_json(
            {
                "model": model,
                "file": str(path),
                "tokens": tokens,
                "pruning": pruning,
                "inputs": kinds,
            }
        )
        return
    click.echo(_page(path, pruning, kinds))


def by_kind(
    statistics: Mapping[str, SiteStatistics], pruning: float
) -> dict[str, dict[str, float]]:
    """The rows of the page, and their sum as "all"."""
    from elute.flash.sparsity import kind
    from elute.npu.choices import SHADOWED, choose
    from elute.npu.device import Q_MAX

    effects = {name: found.effects for name, found in statistics.items()}
    chosen, without, with_all = (choose(effects, share) for share in (pruning, 1.0, 0.0))
    kinds: dict[str, dict[str, float]] = {}
    for name, found in statistics.items():
        seen = found.input
        choice = chosen[name]
        entry = {
            "inputs": 1,
            "with_shadow": int(choice.shadow),
            "largest_outlier": seen.maximum / (SHADOWED[0].bound(seen) / Q_MAX),
            "values": float(seen.histogram.sum()),
            "outliers": float(found.outliers[choice].sum()) if choice.shadow else 0.0,
            "divergence_without": found.effects[without[name]],
            "divergence": found.effects[choice],
            "divergence_with_all": found.effects[with_all[name]],
        }
        for row in (_short(kind(name)), "all"):
            total = kinds.setdefault(row, dict.fromkeys(entry, 0))
            for key, value in entry.items():
                longest = key == "largest_outlier"
                total[key] = max(total[key], value) if longest else total[key] + value
    for total in kinds.values():
        total["outlier_share"] = total.pop("outliers") / max(total.pop("values"), 1.0)
    return dict(sorted(kinds.items(), key=lambda row: row[0] == "all"))


def _short(kind: str) -> str:
    """model.layers.*.mlp.down_proj.weight -> down_proj"""
    return kind.removesuffix(".weight").split(".")[-1]


def _page(path: Path, pruning: float, kinds: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        str(path),
        f"{f'pruning {pruning:g}':<14}{'shadows':>12}{'largest outlier':>20}{'outliers':>10}"
        f"{'nats without':>15}{'chosen':>11}{'with all':>11}",
    ]
    for name, found in kinds.items():
        shadows = f"{found['with_shadow']:.0f} of {found['inputs']:.0f}"
        lines.append(
            f"{name:<14}{shadows:>12}{found['largest_outlier']:>14.0f} steps"
            f"{found['outlier_share']:>10.3%}{found['divergence_without']:>15.5f}"
            f"{found['divergence']:>11.5f}{found['divergence_with_all']:>11.5f}"
        )
    return "\n".join(lines)
