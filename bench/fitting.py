"""What a budget costs that the whole model fits in: decode with `--memory`, beside mapped weights.

    python bench/fitting.py [MODEL] [--rounds 7] [--tokens 32] [--context 512]

MODEL is anything that `elute.load` takes, by default `default`. Both ways are loaded in one process
and answer in turns: the same prompt, the same tokens. Medians over the rounds; a ratio under 1 is
slower than mapped. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import elute

PROMPT = [5 + i for i in range(16)]
AMPLE = 10**12  # bytes: of any model all fits


def decode_s(model: elute.Model, n_tokens: int) -> tuple[float, list[int]]:
    """Seconds a token after the first, and the tokens."""
    seen, times = [], []
    for chunk in model.stream(PROMPT, max_tokens=n_tokens, temperature=0, ignore_end=True):
        seen.extend(chunk.tokens)
        times.append((time.perf_counter(), len(seen)))
    (start, first), (end, last) = times[0], times[-1]
    return (end - start) / (last - first), seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    given = parser.parse_args()
    with (
        elute.load(given.model, context=given.context) as mapped,
        elute.load(given.model, context=given.context, memory=AMPLE) as budgeted,
    ):
        assert budgeted.flash is not None
        assert budgeted.flash.plan.missed == 0
        found: dict[str, list[float]] = {"mapped": [], "memory": []}
        for round_number in range(given.rounds + 1):
            a_s, a_tokens = decode_s(mapped, given.tokens)
            b_s, b_tokens = decode_s(budgeted, given.tokens)
            if a_tokens != b_tokens:
                raise SystemExit(f"found {b_tokens} with memory, wanted {a_tokens}")
            if round_number:  # the first one reads pages
                found["mapped"].append(a_s)
                found["memory"].append(b_s)
    rates = {name: 1 / statistics.median(seconds) for name, seconds in found.items()}
    ratio = statistics.median(a / b for a, b in zip(found["mapped"], found["memory"], strict=True))
    print(
        f"mapped {rates['mapped']:.2f} tok/s, with memory {rates['memory']:.2f}, ratio {ratio:.3f}"
    )
    print(json.dumps({"model": given.model, "rounds": given.rounds, **rates, "ratio": ratio}))


if __name__ == "__main__":
    main()
