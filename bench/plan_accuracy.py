"""How near `elute plan` is to what a run measures.

    python bench/plan_accuracy.py [--shapes llama-3.2-1b] [--bits 2,4] [--shares 0.4,0.65,0.9]
                                  [--runs 3] [--tokens 24] [--folder DIR] [--no-default]

Of every shape, random weights in every number of bits (groups of 32, head of 8 bits) are packed
into DIR, where they are kept for the next time; llama-2-7b takes 2 and 4 GB. A budget is what the
process needs beside the layers plus a share of the layers. Forecast and run take turns, each a
process of its own; medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from elute.bench.memory_group import NoGroup
from elute.bench.memory_sweep import elute_run, foretold
from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import shape_config
from elute.errors import EluteError
from elute.runtime.store import is_packed, open_packed

CONTEXT = 256
UNLIMITED = 10**12
WANTED = 0.2  # how far a forecast may be off


def models(given: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Name -> packed folder."""
    found = {} if given.no_default else {"default": open_packed("default").path}
    for shape in filter(None, given.shapes.split(",")):
        for bits in map(int, given.bits.split(",")):
            path = folder / f"{shape}-{bits}-bits"
            if not is_packed(path):
                random_packed(shape_config(shape), random_recipe(bits=bits, outer_bits=8), path)
            found[path.name] = path
    return found


def row(name: str, packed: Path, share: float, given: argparse.Namespace) -> dict[str, Any]:
    whole = foretold(packed, UNLIMITED, CONTEXT, given.threads)
    budget = sum(whole["fixed_bytes"].values()) + int(share * whole["pinned_bytes"])
    predicted, measured, missed = [], [], 0
    for _ in range(given.runs):
        plan = foretold(packed, budget, CONTEXT, given.threads)
        told = elute_run(NoGroup(), packed, budget, CONTEXT, given.tokens, given.threads, 0.0)
        predicted.append(plan["tok_s"])
        measured.append(told["tok_s"])
        missed = plan["missed_bytes"]
    foreseen, found = statistics.median(predicted), statistics.median(measured)
    return {
        "model": name,
        "share": share,
        "budget_bytes": budget,
        "missed_bytes": missed,
        "predicted_tok_s": round(foreseen, 3),
        "measured_tok_s": round(found, 3),
        "ratio": round(foreseen / found, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="llama-3.2-1b")
    parser.add_argument("--bits", default="2,4")
    parser.add_argument("--shares", default="0.4,0.65,0.9")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--no-default", action="store_true")
    given = parser.parse_args()
    rows = []
    print(
        f"{'model':<22}{'share':>6}{'memory':>10}{'flash':>9}{'predicted':>11}{'measured':>10}{'ratio':>7}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for name, packed in models(given, given.folder or Path(temporary)).items():
            for share in map(float, given.shares.split(",")):
                try:
                    found = row(name, packed, share, given)
                except EluteError as error:
                    print(f"{name:<22}{share:>6.0%}  {error}")
                    continue
                rows.append(found)
                print(
                    f"{name:<22}{share:>6.0%}{found['budget_bytes'] / 1e6:>7.0f} MB"
                    f"{found['missed_bytes'] / 1e6:>6.0f} MB{found['predicted_tok_s']:>11.2f}"
                    f"{found['measured_tok_s']:>10.2f}{found['ratio']:>7.2f}",
                    flush=True,
                )
    near = sum(abs(found["ratio"] - 1) <= WANTED for found in rows)
    print(f"{near} of {len(rows)} within {WANTED:.0%}")
    print(json.dumps({"runs": given.runs, "tokens": given.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
