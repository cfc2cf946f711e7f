"""Speed of attention alone, beside what bounds it: reading the cache, or f32 multiply-adds.

    python bench/attention.py [--shape smollm2-135m] [--depth 4096] [--prompt 512] [--threads 1,2]
                              [--rounds 5]

The native executor runs an op list of nothing but attention, over as many layers as make the cache
larger than the processor's. Decode: one token behind `depth` others, GB/s of the keys and values
that it reads, and their share of a plain read in one to three streams. Prefill: `prompt` tokens
behind `depth` others, GFLOP/s, and their share of f32 multiply-adds on registers. The ceilings are
measured in each round; variants take turns; figures are medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import numpy as np

from elute import _native
from elute.bench.ceilings import measured_ceilings
from elute.model.ops import Attention, Embed, Head, OpList
from elute.pack import quads
from elute.quantize.rtn import quantize
from elute.runtime.executor import Executor
from elute.types import F32, OVER_READ, PackedMatrix

VOCABULARY = 32
CACHE_BYTES = 64 << 20  # in all layers, so that each reads its own from memory
READ_BYTES = 256 << 20


@dataclass(frozen=True)
class Shape:
    n_heads: int
    n_kv_heads: int
    head_width: int

    def cache_bytes(self, positions: int) -> int:
        """Keys and values of one layer."""
        return 2 * 2 * self.n_kv_heads * self.head_width * positions

    def operations(self, n_tokens: int, depth: int) -> int:
        """Multiplies and adds of one layer; a token sees `depth` keys, those before it, itself."""
        keys = n_tokens * depth + n_tokens * (n_tokens + 1) // 2
        return 4 * self.n_heads * self.head_width * keys


SHAPES = {
    "smollm2-135m": Shape(9, 3, 64),
    "llama-2-7b": Shape(32, 32, 128),
    "llama-3-8b": Shape(32, 8, 128),
}


class _Weights:
    """Random embeddings, and a head that costs nothing."""

    def matrix(self, name: str) -> PackedMatrix:
        width = int(name.rpartition(" ")[2])
        rng = np.random.default_rng(width)
        w = rng.standard_normal((VOCABULARY, width), np.float32)
        packed = quads.pack(quantize(w, bits=8, group_size=32, symmetric=True))
        room = np.zeros(packed.planes.size + OVER_READ, np.uint8)
        room[: packed.planes.size] = packed.planes
        object.__setattr__(packed, "planes", room[: packed.planes.size])
        return packed

    def vector(self, name: str) -> F32:
        raise AssertionError(name)


def attention_only(shape: Shape, n_layers: int, context: int) -> OpList:
    widths = {
        "query": shape.n_heads * shape.head_width,
        "key": shape.n_kv_heads * shape.head_width,
        "value": shape.n_kv_heads * shape.head_width,
    }
    embeds = [Embed(f"{name} {width}", name) for name, width in widths.items()]
    layers = [
        Attention(
            "query",
            "key",
            "value",
            "output",
            layer,
            shape.n_heads,
            shape.n_kv_heads,
            shape.head_width,
            scale=shape.head_width**-0.5,
        )
        for layer in range(n_layers)
    ]
    return OpList(
        ops=(*embeds, *layers, Head("output", f"head {widths['query']}")),
        registers={**widths, "output": widths["query"]},
        n_layers=n_layers,
        n_kv_heads=shape.n_kv_heads,
        head_width=shape.head_width,
        vocabulary=VOCABULARY,
        context=context,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--isa", default=_native.best_isa(), choices=_native.isas())
    options.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    options.add_argument("--depth", type=int, default=4096)
    options.add_argument("--prompt", type=int, default=512)
    options.add_argument("--threads", default="1,2")
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    shape = SHAPES[args.shape]
    arena = np.ones(READ_BYTES, np.uint8)
    n_layers = -(-CACHE_BYTES // shape.cache_bytes(args.depth + args.prompt))
    ops = attention_only(shape, n_layers, args.depth + args.prompt)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, args.depth + args.prompt).astype(np.int32)
    executors = {
        n: Executor(ops, _Weights(), n_threads=n, isa=args.isa)
        for n in map(int, args.threads.split(","))
    }
    for executor in executors.values():
        executor.forward(tokens[: max(args.depth, 1)], 0)

    samples: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for n, executor in executors.items():
            took = {
                "read": measured_ceilings(args.isa, n, arena).read_gb_s,
                "fma": _native.fma_gflops(args.isa, n),
                "decode": seconds(executor, tokens[:1], args.depth),
                "prefill": seconds(executor, tokens[args.depth :], args.depth),
            }
            for name, value in took.items():
                samples.setdefault((name, n), []).append(value)
    rows = [row(shape, n_layers, args.depth, args.prompt, n, samples) for n in executors]
    for each in rows:
        print("  ".join(f"{name} {value}" for name, value in each.items()))
    print(json.dumps({"isa": args.isa, "shape": args.shape, "layers": n_layers, "results": rows}))


def seconds(executor: Executor, tokens: np.ndarray, position: int) -> float:
    start = time.perf_counter()
    executor.forward(tokens, position)
    return time.perf_counter() - start


def row(
    shape: Shape,
    n_layers: int,
    depth: int,
    prompt: int,
    n_threads: int,
    samples: dict[tuple[str, int], list[float]],
) -> dict[str, float]:
    read, fma, decode, prefill = (
        statistics.median(samples[name, n_threads]) for name in ("read", "fma", "decode", "prefill")
    )
    gb_s = n_layers * shape.cache_bytes(depth + 1) / decode / 1e9
    gflops = n_layers * shape.operations(prompt, depth) / prefill / 1e9
    return {
        "threads": n_threads,
        "decode_us_a_layer": round(decode / n_layers * 1e6, 1),
        "decode_gb_s": round(gb_s, 2),
        "bandwidth_share": round(gb_s / read, 3),
        "prefill_ms_a_layer": round(prefill / n_layers * 1e3, 2),
        "prefill_gflops": round(gflops, 1),
        "peak_share": round(gflops / fma, 3),
        "read_gb_s": round(read, 1),
        "fma_gflops": round(fma, 1),
    }


if __name__ == "__main__":
    main()
