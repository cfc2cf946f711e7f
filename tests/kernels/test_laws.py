"""Laws 1 and 2 on the numpy references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_matrix

from elute.kernels.activations import build_tables, quantize_activations
from elute.kernels.lut_dequant import reference as lut_dequant
from elute.kernels.lut_matmul import reference as lut_matmul
from elute.pack import quads
from elute.types import Affine

AFFINES = list(Affine)


def activations(m: int, k: int, seed: int, outlier: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[:, rng.integers(k)] *= np.float32(outlier)
    return x


@given(
    bits=st.integers(1, 8), n=st.integers(1, 40), blocks=st.integers(1, 10),
    group_size=st.sampled_from([16, 32, 64, 0]), seed=st.integers(0, 2**32 - 1),
    outlier=st.sampled_from([0.0, 1.0, 1e4, 1e30]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_lookup_is_a_multiply(bits, n, blocks, group_size, seed, outlier) -> None:
    k = blocks * (group_size or 20)
    matrix = random_matrix(
        n, k, bits=bits, group_size=group_size or k, affine=Affine.MIN, seed=seed
    )
    packed = quads.pack(matrix)
    acts = quantize_activations(activations(2, k, seed, outlier))
    for start, stop in lut_matmul.segments(k, matrix.group_size):
        looked_up = lut_matmul.dot_by_lookup(acts, packed.planes, packed.shape, bits, start, stop)
        multiplied = lut_matmul.dot_by_multiply(
            acts, packed.planes, packed.shape, bits, start, stop
        )
        assert np.array_equal(looked_up, multiplied)


@given(
    values=st.lists(st.integers(-127, 127), min_size=4, max_size=4).filter(
        lambda v: sum(map(abs, v)) <= 255
    )
)
@settings(max_examples=300, deadline=None)
def test_a_table_holds_every_subset_sum_in_a_byte(values) -> None:
    acts = quantize_activations(np.zeros((1, 64), np.float32))
    acts.q[0, :4] = values
    tables = build_tables(acts)
    for i in range(16):
        subset = sum(v for bit, v in enumerate(values) if i >> bit & 1)
        assert int(tables.entries[0, 0, i]) + int(tables.lows[0, 0]) == subset


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-38, 1e37), k=st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_quantized_activations_always_fit_their_tables(seed, size, k) -> None:
    x = activations(1, 4 * k, seed) * np.float32(size)
    acts = quantize_activations(x)
    build_tables(acts)  # raises when a table does not fit
    restored = acts.q.astype(np.float32) * np.repeat(acts.scales, 64, axis=1)
    bound = np.repeat(acts.scales, 64, axis=1) * np.float32(0.5001)
    tiny = np.finfo(np.float32).tiny * 128
    assert np.all(np.abs(restored[:, : 4 * k] - x) <= np.maximum(bound[:, : 4 * k], tiny))


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [False, True])
def test_two_tables_are_unpack_then_affine(bits: int, affine: Affine, columns: bool) -> None:
    matrix = random_matrix(
        45, 96, bits=bits, group_size=32, affine=affine, seed=bits, columns=columns
    )
    packed = quads.pack(matrix)
    assert np.array_equal(lut_dequant.codes_by_table(packed), matrix.codes)
    assert np.array_equal(lut_dequant.lut_dequant(packed), matrix.dequantize())


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 192])
def test_matmul_is_within_the_rounding_of_its_activations(affine: Affine, group_size: int) -> None:
    matrix = random_matrix(
        40, 384, bits=4, group_size=group_size, affine=affine, seed=3, columns=True
    )
    x = activations(3, 384, seed=4)
    got = lut_matmul.lut_matmul(x, quads.pack(matrix))
    w = matrix.dequantize().astype(np.float64)
    want = x.astype(np.float64) @ w.T
    acts = quantize_activations(x[:, matrix.columns])
    step = np.empty((3, 384))
    step[:, matrix.columns] = np.repeat(acts.scales, 64, axis=1)[:, :384]
    bound = (step / 2) @ np.abs(w).T + 1e-5 * np.abs(x) @ np.abs(w).T
    assert np.all(np.abs(got - want) <= bound), np.max(np.abs(got - want) / bound)
