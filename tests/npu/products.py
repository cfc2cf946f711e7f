"""Small graphs of random products for tests of devices."""

from __future__ import annotations

import hashlib

import numpy as np

from elute.npu.device import Graph, Product


def product(
    n: int,
    k: int,
    *,
    seed: int = 0,
    per_channel: bool = True,
    name: str = "",
    input_scale: float = 0.05,
    extremes: bool = True,
) -> Product:
    """Random weights; with `extremes` the first two outputs have only 127 and only -127."""
    random = np.random.default_rng([seed, n, k])
    w = np.clip(np.rint(random.normal(0, 40, (n, k))), -127, 127).astype(np.int8)
    if extremes:
        w[:2] = np.array([[127], [-127]], np.int8)[:n]
    scales = random.uniform(0.005, 0.02, n if per_channel else 1).astype(np.float32)
    output_scale = 0.9 * np.sqrt(k) * input_scale  # a spread of some 40 steps: some saturate
    told = f"{n} {k} {seed} {per_channel} {input_scale} {extremes}"
    digest = hashlib.sha256(told.encode()).hexdigest()
    name = name or f"p{seed}.{n}x{k}"
    return Product(name, (n, k), lambda: w, scales, input_scale, float(output_scale), digest)


def graph(rows: int, k: int, *widths: int, seed: int = 0, per_channel: bool = True) -> Graph:
    return Graph(
        rows,
        tuple(product(n, k, seed=seed + i, per_channel=per_channel) for i, n in enumerate(widths)),
    )


def inputs(rows: int, k: int, *, seed: int = 0) -> np.ndarray:
    """i8 [rows, k], with rows of only 127 and only -128."""
    x = np.random.default_rng(seed).integers(-128, 128, (rows, k)).astype(np.int8)
    x[:2] = np.array([[127], [-128]], np.int8)[:rows]
    return x


def exact(x: np.ndarray, of: Product) -> np.ndarray:
    """i64 [M, N]."""
    return x.astype(np.int64) @ of.weights().astype(np.int64).T
