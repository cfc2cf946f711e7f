"""What contextual sparsity costs: perplexity by share, by how it is spread, and by skip unit.

    python bench/sparsity.py --text FILE [--model default] [--windows 20] [--context 512]
                             [--shares 0.3,0.4,0.5,0.6] [--units 1,2,4,8] [--unit-windows 4]

First the native executor: thresholds of equal measured error a byte (what --sparsity does) by
magnitude and weighted by norms, and the same share of every input. Then the numpy forward in
float: units of several consecutive channels, kept or left out by the sum of their squares, the
same share of every input; the prompt is sparse, too. A table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from elute.api import text_tokens
from elute.evaluate.perplexity import perplexity, text_windows
from elute.evaluate.reference import FloatExecutor
from elute.flash.sparsity import Threshold, thresholds
from elute.formats.tokenizer import Tokenizer
from elute.model.families import op_list
from elute.model.ops import Linear
from elute.runtime import calibration
from elute.runtime.executor import Executor
from elute.runtime.store import open_packed
from elute.types import F32


class UnitExecutor(FloatExecutor):
    """A float forward whose inputs of linears count by units of channels."""

    def mask(
        self, inputs: Mapping[str, str], unit: int, values: Mapping[str, float] | None
    ) -> None:
        """values: the least sum of squares that counts; None: collect them in `seen`."""
        reference = self._executor
        plain = type(reference)._multiply.__get__(reference)
        self.seen: dict[str, list[F32]] = {}

        def linear(x: F32, name: str) -> F32:
            key = inputs.get(name)
            if key is None:
                return plain(x, name)
            squares = np.square(x).reshape(len(x), -1, unit).sum(axis=-1)
            if values is None:
                if key == name:
                    self.seen.setdefault(key, []).append(squares.ravel())
                return plain(x, name)
            kept = np.repeat(squares >= values[key], unit, axis=1)
            return plain(np.where(kept, x, np.float32(0)), name)

        reference._linear = linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--unit-windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--shares", default="0.3,0.4,0.5,0.6")
    parser.add_argument("--units", default="1,2,4,8")
    given = parser.parse_args()
    shares = [float(share) for share in given.shares.split(",")]

    packed = open_packed(given.model)
    ops = op_list(packed.config)
    tokenizer = Tokenizer.from_files(packed.tokenizer_files())
    tokens, bos = text_tokens(tokenizer, given.text.read_text())
    windows = text_windows(tokens, context=given.context, n_windows=given.windows, bos=bos)
    own, _ = text_tokens(tokenizer, calibration.own_text())
    executor = Executor(ops, packed, context=max(given.context, calibration.WINDOW))
    dense = perplexity(executor, windows).perplexity
    found: dict[str, dict[str, float]] = {}

    def show(name: str, values: dict[str, float]) -> None:
        found[name] = values
        print(f"{name:<34}" + "".join(f"{value:10.2f}" for value in values.values()), flush=True)

    print(f"{'':<34}" + "".join(f"{share:10}" for share in shares))
    show("dense", {str(share): dense for share in shares})
    for weighted in (False, True):
        norms = calibration.importances(packed, ops, weighted=weighted)
        scores = calibration.calibrate(executor, ops, norms, own)
        score = "value times norm" if weighted else "value"
        spread, even = {}, {}
        for share in shares:
            executor.sparsify(thresholds(scores, share))
            spread[str(share)] = perplexity(executor, windows).perplexity
            executor.sparsify(
                {n: Threshold(s.importance, s.threshold(share)) for n, s in scores.items()}
            )
            even[str(share)] = perplexity(executor, windows).perplexity
        show(f"{score}, equal error a byte", spread)
        show(f"{score}, equal share", even)

    inputs = {
        name: op.weights[0] for op in ops.ops if isinstance(op, Linear) for name in op.weights
    }
    small = windows[: given.unit_windows]
    floats = UnitExecutor(packed, context=max(given.context, len(own)))
    base = perplexity(floats, small).perplexity
    show(f"float, {len(small)} windows, dense", {str(share): base for share in shares})
    for unit in (int(unit) for unit in given.units.split(",")):
        floats.mask(inputs, unit, None)
        floats.forward(np.asarray(own[: given.context], np.int32), 0)
        seen = {name: np.sort(np.concatenate(values)) for name, values in floats.seen.items()}
        line = {}
        for share in shares:
            cut = {name: float(v[int(share * v.size)]) for name, v in seen.items()}
            floats.mask(inputs, unit, cut)
            line[str(share)] = perplexity(floats, small).perplexity
        show(f"float, units of {unit}", line)
    print(json.dumps({"model": given.model, "windows": given.windows, "perplexity": found}))


if __name__ == "__main__":
    main()
