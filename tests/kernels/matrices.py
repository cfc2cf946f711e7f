"""Random matrices of every kind that the kernels accept."""

import numpy as np

from elute.types import Affine, QuantizedMatrix


def random_matrix(
    n: int, k: int, *, bits: int, group_size: int, affine: Affine, seed: int, columns: bool = False
) -> QuantizedMatrix:
    rng = np.random.default_rng(seed)
    groups = k // group_size
    scales = (
        rng.uniform(0.5, 2.0, (groups, n)) * rng.choice([-1, 1], (groups, n)) / (1 << bits)
    ).astype(np.float16)
    offsets = None
    if affine is Affine.ZERO:
        offsets = rng.integers(0, 1 << bits, (groups, n)).astype(np.float16)
    elif affine is Affine.MIN:
        offsets = rng.normal(size=(groups, n)).astype(np.float16)
    return QuantizedMatrix(
        codes=rng.integers(0, 1 << bits, (n, k), np.uint8),
        scales=scales,
        offsets=offsets,
        affine=affine,
        zero=1 << bits - 1 if affine is Affine.SYMMETRIC else 0,
        bits=bits,
        group_size=group_size,
        columns=rng.permutation(k).astype(np.int32) if columns else None,
    )
