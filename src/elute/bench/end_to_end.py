"""Prompt and generation speed of a whole model, under llama-bench's names. Prints nothing.

pp512 is one prompt of 512 tokens from an empty cache, tg128 is 128 single tokens from an empty
cache; pp512@d4096 is the same behind 4096 positions, whose filling is not timed. Tokens are
random: speed does not depend on them. Thread counts and tests take turns, and so does a rival where
there is one, so that a disturbance of the machine hits all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elute.bench.ceilings import Ceilings, median_ceilings
from elute.errors import BudgetError
from elute.runtime.session import Executor
from elute.types import I32

# Touches the registers and the thread pool; each token reads all weights.
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class SpeedTest:
    """A prompt of n_prompt tokens or n_gen single ones (the other is 0), at n_depth positions."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        kind = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{kind}@d{self.n_depth}" if self.n_depth else kind

    @property
    def n_tokens(self) -> int:
        return self.n_prompt or self.n_gen


@dataclass(frozen=True)
class Speed:
    """Of one test at one thread count; one time a repeat, the rival's in the same order."""

    test: SpeedTest
    n_threads: int
    seconds: tuple[float, ...]
    rival_seconds: tuple[float, ...] = ()
    ceilings: Ceilings | None = None

    @property
    def median_tok_s(self) -> float:
        return self.test.n_tokens / statistics.median(self.seconds)

    @property
    def best_tok_s(self) -> float:
        return self.test.n_tokens / min(self.seconds)

    @property
    def worst_tok_s(self) -> float:
        return self.test.n_tokens / max(self.seconds)

    @property
    def rival_median_tok_s(self) -> float | None:
        if not self.rival_seconds:
            return None
        return self.test.n_tokens / statistics.median(self.rival_seconds)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the rival: the median over the pairs of neighbouring runs."""
        if not self.rival_seconds:
            return None
        pairs = zip(self.rival_seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def speed_tests(prompt: int, generate: int, depths: Iterable[int] = (0,)) -> list[SpeedTest]:
    """pp and tg at every depth, each depth once; a test of 0 tokens is left out."""
    kinds = [(prompt, 0)] * bool(prompt) + [(0, generate)] * bool(generate)
    return [SpeedTest(*kind, depth) for depth in dict.fromkeys(depths) for kind in kinds]


def context_of(tests: Iterable[SpeedTest]) -> int:
    """Positions that an executor needs for all of them."""
    return max(WARM_UP_TOKENS, *(test.n_depth + test.n_tokens for test in tests))


def bench(
    executors: Mapping[int, Executor],
    tests: Sequence[SpeedTest],
    *,
    repeats: int = 5,
    rival: Callable[[SpeedTest, int], float] | None = None,
    ceilings: Callable[[int], Ceilings] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Speed of executors by thread count.

    rival     (test, threads) -> seconds of its own run, before ours every other time
    ceilings  threads -> what the machine does now; asked before and after each of our runs
    progress  is called with (runs done, runs in all), ours and the rival's

    Raises BudgetError when a test does not fit the context, and what rival raises.
    """
    for executor in executors.values():
        if context_of(tests) > executor.context:
            raise BudgetError(
                f"bench: found {context_of(tests)} tokens, but the context is "
                f"{executor.context}; use a smaller --prompt, --generate or --depth"
            )
        run_generation(executor, random_tokens(WARM_UP_TOKENS, executor.vocabulary), 0)
    ours: dict[tuple[SpeedTest, int], list[float]] = {
        (test, n_threads): [] for test in tests for n_threads in executors
    }
    theirs: dict[tuple[SpeedTest, int], list[float]] = {key: [] for key in ours}
    limits: dict[tuple[SpeedTest, int], list[Ceilings]] = {key: [] for key in ours}

    def run_ours(test: SpeedTest, n_threads: int) -> None:
        measured = [ceilings(n_threads)] if ceilings is not None else []
        ours[test, n_threads].append(seconds_of(executors[n_threads], test))
        measured += [ceilings(n_threads)] if ceilings is not None else []
        limits[test, n_threads] += measured

    def run_theirs(test: SpeedTest, n_threads: int) -> None:
        assert rival is not None
        theirs[test, n_threads].append(rival(test, n_threads))

    turns = [run_ours] if rival is None else [run_ours, run_theirs]
    done = 0
    # A depth is filled once, not before every run: what runs there leaves the positions before it.
    for depth in dict.fromkeys(test.n_depth for test in tests):
        for executor in executors.values():
            fill(executor, depth)
        for repeat in range(repeats):
            for test in (test for test in tests if test.n_depth == depth):
                for n_threads in executors:
                    for turn in turns if repeat % 2 == 0 else reversed(turns):
                        turn(test, n_threads)
                        done += 1
                        if progress is not None:
                            progress(done, repeats * len(ours) * len(turns))
    return [
        Speed(*key, tuple(ours[key]), tuple(theirs[key]), median_ceilings(limits[key]))
        for key in ours
    ]


def seconds_of(executor: Executor, test: SpeedTest) -> float:
    """Of one run behind test.n_depth cached positions."""
    tokens = random_tokens(test.n_tokens, executor.vocabulary)
    started = time.perf_counter()
    if test.n_prompt:
        executor.forward(tokens, test.n_depth)
    else:
        run_generation(executor, tokens, test.n_depth)
    return time.perf_counter() - started


def fill(executor: Executor, depth: int) -> None:
    """Puts `depth` random tokens into the cache."""
    if depth:
        executor.forward(random_tokens(depth, executor.vocabulary), 0)


def random_tokens(n: int, vocabulary: int) -> I32:
    """-> i32 [n], the same on every machine."""
    return np.random.Generator(np.random.PCG64(n)).integers(0, vocabulary, n, dtype=np.int32)


def run_generation(executor: Executor, tokens: I32, first: int) -> None:
    for i in range(len(tokens)):
        executor.forward(tokens[i : i + 1], first + i)
