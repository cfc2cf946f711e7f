"""What generating text costs beyond the forwards: sampling, decoding, Python in between.

    python bench/generation.py [--model default] [--tokens 128] [--rounds 15] [--threads 2]

`elute bench model` times forwards alone; `elute run` prints the speed of text. Here every forward
of a generation is timed, and what is left of its time is what the rest cost: in microseconds a
token and as a share of the forwards, which is how far `run` is behind `bench`. The goal is at most
3 %. Generations start from an empty cache, go on past the end token and take turns; figures are
medians over the rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import elute
from elute.api import Model, SamplingOptions
from elute.runtime.session import Executor
from elute.types import F32, I32

WAYS: dict[str, SamplingOptions] = {
    "greedy": {"temperature": 0.0},
    "sampled": {},
    "top-p alone": {"top_k": 0, "min_p": 0.0},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs 5": {"logprobs": 5},
}


class Timed:
    """An executor that adds up the seconds of its forwards."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.context, self.vocabulary = executor.context, executor.vocabulary
        self.seconds = 0.0

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        started = time.perf_counter()
        logits = self._executor.forward(tokens, position, all_logits=all_logits)
        self.seconds += time.perf_counter() - started
        return logits


def generate(model: Model, timed: Timed, n: int, options: SamplingOptions) -> tuple[float, float]:
    """-> seconds in all, seconds in forwards, of n tokens of text."""
    model.engine.session.reset()
    before = timed.seconds
    started = time.perf_counter()
    for _ in model.stream([0], max_tokens=n, ignore_end=True, seed=1, **options):
        pass
    return time.perf_counter() - started, timed.seconds - before


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="default")
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--threads", type=int)
    given = options.parse_args()
    n = given.tokens
    with elute.load(given.model, context=n + 1, threads=given.threads) as model:
        timed = Timed(model.executor)
        model.engine.session.executor = timed
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for round_ in range(given.rounds + 1):
            for name, sampling in WAYS.items():
                sample = generate(model, timed, n, sampling)
                if round_:  # the first touches memory and starts threads
                    samples[name].append(sample)
    told = {}
    for name, taken in samples.items():
        rate = n / statistics.median(total for total, _ in taken)
        beyond_us = statistics.median(1e6 * (total - inside) / n for total, inside in taken)
        share = statistics.median(total / inside - 1 for total, inside in taken)
        print(f"{name:<14}{rate:>8.1f} tok/s{beyond_us:>8.1f} us a token{share:>8.2%}")
        told[name] = {
            "tok_s": round(rate, 2),
            "beyond_forward_us": round(beyond_us, 1),
            "share": round(share, 4),
        }
    print(json.dumps({"model": given.model, "tokens": n, "ways": told}))


if __name__ == "__main__":
    main()
