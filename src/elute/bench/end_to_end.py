"""Prompt and generation speed of a whole model, under llama-bench's names. Prints nothing.

pp512 is one prompt of 512 tokens from an empty cache; tg128 is 128 single tokens from an empty
cache. Tokens are random: speed does not depend on them. Thread counts and tests take turns, so that
a disturbance of the machine hits all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from elute.errors import BudgetError
from elute.runtime.session import Executor
from elute.types import I32

# Touches the registers and the thread pool; weights are warm after the first repeat.
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Speed:
    """Of one test at one thread count; rates in tokens a second, over `repeats` runs."""

    test: str
    n_threads: int
    median_tok_s: float
    best_tok_s: float
    worst_tok_s: float
    repeats: int


def bench(
    executors: Mapping[int, Executor],
    *,
    prompt: int = 512,
    generate: int = 128,
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Speed of executors by thread count. A test with 0 tokens is left out.

    progress is called with (runs done, runs in all). Raises BudgetError when a test does not fit
    the context.
    """
    tests = {
        name: (run, n)
        for name, run, n in (
            (f"pp{prompt}", run_prompt, prompt),
            (f"tg{generate}", run_generation, generate),
        )
        if n
    }
    for executor in executors.values():
        if max(prompt, generate) > executor.context:
            raise BudgetError(
                f"bench: found {max(prompt, generate)} tokens, but the context is "
                f"{executor.context}; use a smaller --prompt or --generate"
            )
        run_generation(executor, random_tokens(WARM_UP_TOKENS, executor.vocabulary))
    seconds: dict[tuple[str, int], list[float]] = {
        (name, n_threads): [] for name in tests for n_threads in executors
    }
    done = 0
    for _ in range(repeats):
        for name, (run, n) in tests.items():
            for n_threads, executor in executors.items():
                tokens = random_tokens(n, executor.vocabulary)
                started = time.perf_counter()
                run(executor, tokens)
                seconds[name, n_threads].append(time.perf_counter() - started)
                done += 1
                if progress is not None:
                    progress(done, repeats * len(seconds))
    return [
        _speed(name, n_threads, tests[name][1], took) for (name, n_threads), took in seconds.items()
    ]


def _speed(test: str, n_threads: int, n_tokens: int, seconds: list[float]) -> Speed:
    return Speed(
        test=test,
        n_threads=n_threads,
        median_tok_s=n_tokens / statistics.median(seconds),
        best_tok_s=n_tokens / min(seconds),
        worst_tok_s=n_tokens / max(seconds),
        repeats=len(seconds),
    )


def random_tokens(n: int, vocabulary: int) -> I32:
    """-> i32 [n], the same on every machine."""
    return np.random.Generator(np.random.PCG64(n)).integers(0, vocabulary, n, dtype=np.int32)


def run_prompt(executor: Executor, tokens: I32) -> None:
    executor.forward(tokens, 0)


def run_generation(executor: Executor, tokens: I32) -> None:
    for position in range(len(tokens)):
        executor.forward(tokens[position : position + 1], position)
