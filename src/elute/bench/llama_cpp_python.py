"""One test of llama-bench, run through llama-cpp-python: python -m elute.bench.llama_cpp_python.

Takes llama-bench's options and prints one row as `llama-bench -o json` does, for users who have the
library but not the program.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

N_BATCH, N_UBATCH = 2048, 512  # llama-bench's defaults
NAME_BYTES = 128
SEED = 0


def main() -> int:
    given = _arguments()
    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = given.ngl
    model = llama_cpp.llama_model_load_from_file(given.m.encode(), parameters)
    if not model:
        print(f"{given.m}: cannot be loaded", file=sys.stderr)
        return 1
    context = _context(llama_cpp, model, given)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    run = _Run(llama_cpp, context, vocabulary)
    if not given.no_warmup:
        run.clear()
        run.prompt(given.p) if given.p else run.generate(1)
    run.clear()
    run.prompt(given.d)
    started = time.perf_counter_ns()
    run.prompt(given.p)
    run.generate(given.n)
    nanoseconds = time.perf_counter_ns() - started
    print(json.dumps([_row(llama_cpp, model, given, nanoseconds)]))
    return 0


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-m", required=True, metavar="FILE")
    for letter, default in (("p", 0), ("n", 0), ("d", 0), ("t", 1), ("r", 1), ("ngl", 0)):
        options.add_argument(f"-{letter}", type=int, default=default)
    options.add_argument("-o", choices=["json"], default="json")
    options.add_argument("--no-warmup", action="store_true")
    given = options.parse_args()
    if given.r != 1:
        options.error("-r: wanted 1")
    return given


def _context(llama_cpp: Any, model: Any, given: argparse.Namespace) -> Any:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = given.p + given.n + given.d
    parameters.n_batch, parameters.n_ubatch = N_BATCH, N_UBATCH
    parameters.n_threads = parameters.n_threads_batch = given.t
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"{given.m}: no context of {parameters.n_ctx} positions")
    return context


class _Run:
    """Decodes random tokens into a context."""

    def __init__(self, llama_cpp: Any, context: Any, vocabulary: int) -> None:
        self._llama_cpp = llama_cpp
        self._context = context
        self._vocabulary = vocabulary
        self._random = np.random.Generator(np.random.PCG64(SEED))

    def clear(self) -> None:
        memory = self._llama_cpp.llama_get_memory(self._context)
        self._llama_cpp.llama_memory_clear(memory, False)

    def prompt(self, n_tokens: int) -> None:
        for start in range(0, n_tokens, N_BATCH):
            self._decode(min(N_BATCH, n_tokens - start))

    def generate(self, n_tokens: int) -> None:
        for _ in range(n_tokens):
            self._decode(1)

    def _decode(self, n_tokens: int) -> None:
        drawn = self._random.integers(0, self._vocabulary, n_tokens)
        tokens = (self._llama_cpp.llama_token * n_tokens)(*drawn.tolist())
        batch = self._llama_cpp.llama_batch_get_one(tokens, n_tokens)
        code = self._llama_cpp.llama_decode(self._context, batch)
        if code:
            raise SystemExit(f"llama_decode of {n_tokens} tokens failed with code {code}")
        self._llama_cpp.llama_synchronize(self._context)


def _row(llama_cpp: Any, model: Any, given: argparse.Namespace, nanoseconds: int) -> dict[str, Any]:
    import ctypes

    from elute.bench.machine import cpu_name

    name = ctypes.create_string_buffer(NAME_BYTES)
    llama_cpp.llama_model_desc(model, name, NAME_BYTES)
    rate = (given.p + given.n) * 1e9 / nanoseconds
    return {
        "build_commit": f"llama-cpp-python {llama_cpp.__version__}",
        "cpu_info": cpu_name(),
        "backends": "CPU",
        "model_filename": given.m,
        "model_type": name.value.decode(),
        "model_size": llama_cpp.llama_model_size(model),
        "model_n_params": llama_cpp.llama_model_n_params(model),
        "n_batch": N_BATCH,
        "n_ubatch": N_UBATCH,
        "n_threads": given.t,
        "type_k": "f16",
        "type_v": "f16",
        "n_prompt": given.p,
        "n_gen": given.n,
        "n_depth": given.d,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "avg_ns": nanoseconds,
        "stddev_ns": 0,
        "avg_ts": rate,
        "stddev_ts": 0.0,
        "samples_ns": [nanoseconds],
        "samples_ts": [rate],
    }


if __name__ == "__main__":
    sys.exit(main())
