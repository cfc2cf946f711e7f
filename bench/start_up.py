"""Import time and time to first token, each in fresh processes.

    python bench/start_up.py [--model default] [--runs 7]

The model is fetched and packed by a first run that does not count. Seconds are medians; `first
token` counts from the start of the process, imports and opening the model included. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

PROMPT = "Why is the sky blue?"


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def first_token_s(model: str) -> float:
    command = [sys.executable, "-m", "elute", "run", model, PROMPT, "--max-tokens", "1"]
    done = subprocess.run([*command, "--json", "-q"], stdout=subprocess.PIPE, check=True, text=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told["start_to_first_token_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    first_token_s(given.model)
    bare, imported, first = [], [], []
    for _ in range(given.runs):  # interleaved: a noisy moment hits all three
        bare.append(seconds("pass"))
        imported.append(seconds("import elute"))
        first.append(first_token_s(given.model))
    told = {
        "model": given.model,
        "import_s": round(statistics.median(imported) - statistics.median(bare), 4),
        "first_token_s": round(statistics.median(first), 4),
        "runs": given.runs,
    }
    print(f"import elute {told['import_s']:.3f} s · first token {told['first_token_s']:.3f} s")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
