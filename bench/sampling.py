"""What choosing a token costs, beside the decode step that made its logits.

    python bench/sampling.py [--shapes qwen2.5-0.5b,llama-2-7b] [--threads 2] [--rounds 20]

For each shape: the time of a decode step (`Executor.forward` of one token; random weights, 4 bits,
head at 8) and of `Sampler.sample` on logits of that vocabulary. The share is sample / (step +
sample), of medians; the goal at a vocabulary of 150k is under 2 %. Steps and samples take turns, so
that each sample finds its code and data pushed out of the caches by the weights, as in use.

`peaked` logits have a few dozen tokens well above a normal bulk, as a chat model's have; `flat`
ones fall as a power of the rank, so that top-p keeps tens of thousands. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from elute.bench.random_weights import RandomWeights, random_recipe
from elute.bench.shapes import shape_config
from elute.model.families import op_list
from elute.runtime.executor import Executor
from elute.runtime.sampler import Sampler, Sampling
from elute.runtime.threads import default_threads
from elute.types import F32

TOP_P = Sampling(seed=1, top_k=0, min_p=0.0)
PENALTIES = Sampling(
    seed=1,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    logit_bias=dict.fromkeys(range(0, 1000, 10), -1.0),
)
# name -> settings, whether the logits are flat
CASES: dict[str, tuple[Sampling, bool]] = {
    "greedy": (Sampling(temperature=0.0), False),
    "defaults": (Sampling(seed=1), False),
    "penalties, bias": (PENALTIES, False),
    "top-p alone": (TOP_P, False),
    "top-p alone, flat": (TOP_P, True),
    "temperature alone": (Sampling(seed=1, top_k=0, top_p=1.0, min_p=0.0), False),
    "logprobs 5": (Sampling(seed=1, logprobs=5), False),
}
PROMPT_TOKENS = 1000  # that the penalties know
POSITION = 16  # of the steps: attention costs nothing yet


def logits_of(vocabulary: int, *, flat: bool) -> F32:
    """-> f32 [vocabulary], the same on every machine."""
    random = np.random.Generator(np.random.PCG64(vocabulary))
    if flat:
        return (-1.1 * np.log(random.permutation(vocabulary) + 2.7)).astype(np.float32)
    logits = random.normal(0, 2, vocabulary)
    logits[random.choice(vocabulary, 50, replace=False)] += random.normal(10, 3, 50)
    return logits.astype(np.float32)


def measure(shape: str, n_threads: int, rounds: int) -> tuple[float, dict[str, float]]:
    """-> seconds of a step, seconds of a sample by case; medians."""
    ops = op_list(shape_config(shape))
    weights = RandomWeights(ops, random_recipe(bits=4, outer_bits=8))
    executor = Executor(ops, weights, context=64, n_threads=n_threads)
    random = np.random.Generator(np.random.PCG64(0))
    prompt = random.integers(0, ops.vocabulary, PROMPT_TOKENS).tolist()
    samplers = {
        name: Sampler(sampling, vocabulary=ops.vocabulary, prompt=prompt)
        for name, (sampling, _) in CASES.items()
    }
    logits = {flat: logits_of(ops.vocabulary, flat=flat) for flat in (False, True)}
    token = np.zeros(1, np.int32)
    executor.forward(np.zeros(POSITION, np.int32), 0)
    steps: list[float] = []
    samples: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, (_, flat) in CASES.items():
            started = time.perf_counter()
            made = executor.forward(token, POSITION)[0]
            steps.append(time.perf_counter() - started)
            made[:] = logits[flat]
            started = time.perf_counter()
            samplers[name].sample(made)
            samples[name].append(time.perf_counter() - started)
    return statistics.median(steps), {k: statistics.median(v) for k, v in samples.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--shapes", default="smollm2-135m,qwen2.5-0.5b,llama-3.2-1b")
    options.add_argument("--threads", type=int, default=default_threads())
    options.add_argument("--rounds", type=int, default=20)
    given = options.parse_args()
    told = {}
    for shape in given.shapes.split(","):
        vocabulary = shape_config(shape)["vocab_size"]
        step_s, samples = measure(shape, given.threads, given.rounds)
        shares = {name: took / (step_s + took) for name, took in samples.items()}
        print(f"{shape}, vocabulary {vocabulary}: step {step_s * 1e3:.2f} ms")
        for name, took in samples.items():
            print(f"  {name:<20}{took * 1e6:>8.1f} us{shares[name]:>8.2%}")
        told[shape] = {
            "vocabulary": vocabulary,
            "step_ms": round(step_s * 1e3, 3),
            "sample_us": {name: round(took * 1e6, 1) for name, took in samples.items()},
            "share": {name: round(share, 4) for name, share in shares.items()},
        }
    print(json.dumps({"threads": given.threads, "shapes": told}))


if __name__ == "__main__":
    main()
