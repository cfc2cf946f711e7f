"""Do this machine's kernels multiply as the reference does? Seconds at most; for `elute doctor`."""

from __future__ import annotations

import numpy as np

from elute import _native
from elute.formats.packed_layout import OVER_READ
from elute.kernels.lut_matmul import reference
from elute.pack.quads import pack
from elute.types import F32, Affine, PackedMatrix, QuantizedMatrix

# Two panels of outputs, the second ragged; two blocks of 64 channels and a short one.
N, K, GROUP, ROWS = 40, 144, 16, 2


def best_isa() -> str:
    return str(_native.best_isa())


def kernels_are_right(isa: str) -> bool:
    """Whether lookup and multiply equal the reference bit for bit, at 1 to 8 bits."""
    random = np.random.Generator(np.random.PCG64(0))
    for bits in range(1, 9):
        packed = _random_matrix(random, bits)
        x = random.normal(0, 1, (ROWS, K)).astype(np.float32)
        wanted = reference.lut_matmul(x, packed)
        if not all(np.array_equal(_multiply(isa, x, packed, lookup), wanted) for lookup in (0, 1)):
            return False
    return True


def _random_matrix(random: np.random.Generator, bits: int) -> PackedMatrix:
    groups = (K // GROUP, N)
    matrix = QuantizedMatrix(
        codes=random.integers(0, 1 << bits, (N, K), dtype=np.uint8),
        scales=random.uniform(0.01, 0.1, groups).astype(np.float16),
        offsets=random.normal(0, 1, groups).astype(np.float16),
        affine=Affine.MIN,
        zero=0,
        bits=bits,
        group_size=GROUP,
    )
    return pack(matrix)


def _multiply(isa: str, x: F32, packed: PackedMatrix, lookup: int) -> F32:
    y: F32 = _native.lut_matmul(
        isa,
        x,
        np.pad(packed.planes, (0, OVER_READ)),
        packed.scales,
        packed.offsets,
        packed.shape[0],
        packed.bits,
        packed.group_size,
        packed.zero,
        packed.affine.value,
        lookup=bool(lookup),
    )
    return y
