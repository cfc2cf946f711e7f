"""Perplexity and KL divergence of round-to-nearest at 8 to 2 bits, in groups of 32 and 64.

    python bench/quantization_table.py --text FILE [--model default] [--windows 40]

Prints a markdown table row by row and one JSON object at the end. Embedding and head stay at 8
bits. KL is D(lossless import || quantized), nats a token, both run natively.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (32, 64)
SCHEMES = ("symmetric", "asymmetric")


def evaluate(model: str, text: Path, windows: int, recipe: Path | None) -> dict[str, float]:
    command = [sys.executable, "-m", "elute", "eval", model, "--text", str(text), "--json", "-q"]
    command += ["--context", "512", "--windows", str(windows)]
    if recipe is not None:
        command += ["--recipe", str(recipe), "--against", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--windows", type=int, default=40)
    given = parser.parse_args()
    lossless = evaluate(given.model, given.text, given.windows, None)["perplexity"]
    print(f"lossless import: perplexity {lossless:.4f}\n")
    print("| scheme | bits | group | perplexity | against lossless | KL, nats |")
    print("|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for scheme, bits, group_size in itertools.product(SCHEMES, BITS, GROUPS):
            settings = {"bits": bits, "group_size": group_size, "scheme": scheme}
            recipe = Path(folder) / f"{bits}-{group_size}-{scheme}.json"
            head = {"match": "*embed_tokens*", "bits": 8, "scheme": "keep"}
            recipe.write_text(json.dumps({**settings, "requantize": True, "rules": [head]}))
            found = evaluate(given.model, given.text, given.windows, recipe)
            row = {**settings, "perplexity": found["perplexity"], "kl": found["kl"]}
            rows.append(row)
            print(
                f"| {scheme} | {bits} | {group_size} | {row['perplexity']:.3f} "
                f"| {row['perplexity'] / lossless - 1:+.2%} | {row['kl']:.4f} |",
                flush=True,
            )
    told = {"model": given.model, "windows": given.windows, "lossless": lossless, "rows": rows}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
