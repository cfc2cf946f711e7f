"""How well the next channels are foreseen, by operator: before they are read, how many are known?

    python bench/recall.py [--model default] [--text FILE] [--tokens 64] [--sparsity 0.5]

Runs a model in channel order within a small budget and, after every token, compares what each input
wanted with what could have been guessed: the same input 1, 2, 4 and 8 layers before, that of the
token before, and the channels that were wanted most often so far, as many as are wanted. Chance is
the share that is wanted. A table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from elute.api import text_tokens
from elute.flash.banks import active_rows, bank_uses, channel_sizes
from elute.flash.plan import solve_banks
from elute.flash.sparsity import kind, thresholds
from elute.flash.weights import FlashWeights
from elute.formats.tokenizer import Tokenizer
from elute.model.families import op_list
from elute.runtime import calibration
from elute.runtime.executor import Executor
from elute.runtime.store import open_packed

DISTANCES = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.5)
    given = parser.parse_args()

    packed = open_packed(given.model, by_channel=True)
    ops = op_list(packed.config)
    tokenizer = Tokenizer.from_files(packed.tokenizer_files())
    own, _ = text_tokens(tokenizer, calibration.own_text())
    text = own if given.text is None else text_tokens(tokenizer, given.text.read_text())[0]
    scores = calibration.saved(packed, ops)
    if scores is None:
        ones = calibration.importances(packed, ops)
        scores = calibration.calibrate(Executor(ops, packed), ops, ones, own)
        calibration.save(packed, scores)

    sizes = [sized.size for sized in channel_sizes(ops, packed.records, given.sparsity)]
    plan = solve_banks(2 * max(size.total for size in sizes), {}, sizes)
    weights = FlashWeights(packed, ops, plan)
    executor = Executor(ops, weights, context=given.tokens)
    executor.sparsify(thresholds(scores, given.sparsity))
    uses = bank_uses(ops, packed.records)
    kinds: dict[str, list[int]] = defaultdict(list)  # uses, by layer
    for use, name in enumerate(executor.inputs):
        kinds[kind(name)].append(use)
    widths = [packed.banks[use.bank].n_rows for use in uses]
    counts = [np.zeros(width, np.int64) for width in widths]
    before: list[np.ndarray | None] = [None] * len(uses)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for at, token in enumerate(text[: given.tokens]):
        executor.forward(np.array([token], np.int32), at)
        assert weights.banks is not None
        wanted = [active_rows(weights.banks, use, widths[use]) for use in range(len(uses))]
        for name, members in kinds.items():
            told = found[name.removesuffix(".weight").split(".")[-1]]
            for layer, use in enumerate(members):
                mine = wanted[use]
                n = max(1, int(mine.sum()))
                told["wanted"].append(float(mine.mean()))
                for distance in DISTANCES:
                    if layer >= distance:
                        there = wanted[members[layer - distance]]
                        told[f"{distance} before"].append(float((mine & there).sum() / n))
                last = before[use]
                if last is not None:
                    told["last token"].append(float((mine & last).sum() / n))
                    often = np.argsort(-counts[use], kind="stable")[:n]
                    told["most often"].append(float(mine[often].sum() / n))
        for use, mine in enumerate(wanted):
            counts[use] += mine
            before[use] = mine

    columns = ["wanted", *(f"{d} before" for d in DISTANCES), "last token", "most often"]
    print(f"{'':<12}" + "".join(f"{column:>12}" for column in columns))
    table = {
        name: {column: float(np.mean(told[column])) for column in columns if told[column]}
        for name, told in found.items()
    }
    for name, told in table.items():
        cells = (f"{told[column]:12.2f}" if column in told else f"{'':>12}" for column in columns)
        print(f"{name:<12}" + "".join(cells))
    figures = weights.banks.figures() if weights.banks is not None else {}
    print(json.dumps({"model": given.model, "sparsity": given.sparsity, "recall": table} | figures))


if __name__ == "__main__":
    main()
