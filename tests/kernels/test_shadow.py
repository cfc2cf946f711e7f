"""What an NPU clips and its product, on every level: bit for bit the reference's."""

import threading

import levels
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_matrix
from test_matmul import at_the_end_of_memory

from elute import _native
from elute.npu import reference
from elute.pack import channels as channel_order
from elute.pack import quads
from elute.types import Affine, QuantizedMatrix

ISAS = levels.float_isas()
each_isa = pytest.mark.parametrize("isa", ISAS)
# Around the vectors (1 to 16 floats, 2 to 32 outputs) and runs of them (up to 256).
LENGTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 100, 255, 256, 257, 300, 576]
SCALE = 0.37


def same(got, want) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(g, w)


def matrix_arguments(matrix: QuantizedMatrix) -> dict:
    packed = quads.pack(matrix)
    return {
        "planes": packed.planes, "scales": packed.scales, "offsets": packed.offsets,
        "n": packed.shape[0], "k": packed.shape[1], "bits": packed.bits,
        "group_size": packed.group_size, "zero": packed.zero, "affine": str(packed.affine),
    }  # fmt: skip


def row_arguments(matrix: QuantizedMatrix) -> dict:
    given = matrix_arguments(matrix)
    del given["planes"]
    return given


def some_outliers(m: int, slots: int, share: float, most: int, seed: int):
    """-> starts, slots, residuals"""
    rng = np.random.default_rng(seed)
    picked = rng.random((m, slots)) < share
    starts = np.concatenate([[0], np.cumsum(picked.sum(axis=1))]).astype(np.int32)
    at = np.nonzero(picked)[1].astype(np.int32)
    return starts, at, rng.integers(-most, most + 1, at.size).astype(np.int32)


# ---- the law


@each_isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_two_halves_are_the_whole_product(isa: str, data: st.DataObject) -> None:
    m, k, n = (data.draw(st.integers(1, most)) for most in (5, 40, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    share = data.draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    q = rng.integers(-128, 128, (m, k)).astype(np.float64)
    outliers = rng.random((m, k)) < share
    reach = data.draw(st.sampled_from([1, 300, 40_000, 1 << 23]))
    q[outliers] = rng.integers(-reach, reach + 1, outliers.sum())
    special = [-129, -128, -127, 127, 128, 129, 126.5, 127.5, -127.5, -128.5, 0.5, 1.5, -0.0]
    at = rng.integers(0, q.size, min(q.size, 6))
    q.ravel()[at] = rng.choice(special, at.size)
    x = (q * SCALE).astype(np.float32)
    found = levels.split_outliers(isa, x, SCALE)
    same(found, reference.split_outliers(x, SCALE))
    codes, starts, channels, residuals = found
    whole = reference.unclipped(*found)
    np.testing.assert_array_equal(whole, np.rint(x / np.float32(SCALE)).astype(np.int64))
    w = rng.integers(-127, 128, (n, k)).astype(np.int8)
    union, slots = np.unique(channels, return_inverse=True)
    shadow = levels.shadow_product(
        isa, starts, slots.astype(np.int32), residuals, np.ascontiguousarray(w.T[union])
    )
    npu = codes.astype(np.int64) @ w.T.astype(np.int64)
    np.testing.assert_array_equal(npu + shadow, whole @ w.T.astype(np.int64))


# ---- split


@each_isa
@pytest.mark.parametrize("k", LENGTHS)
def test_split_equals_the_reference(isa: str, k: int) -> None:
    rng = np.random.default_rng(k)
    for share in (0.0, 0.01, 1.0):
        x = rng.normal(size=(5, k)).astype(np.float32)
        x[rng.random(x.shape) < share] *= 1e4
        same(levels.split_outliers(isa, x, 0.05), reference.split_outliers(x, 0.05))


@each_isa
def test_every_tie_goes_to_the_even_one(isa: str) -> None:
    """x = (i + 0.5) * s, and its neighbours, for a scale that is exact and one that is not."""
    steps = np.arange(-300, 300, dtype=np.float64) + 0.5
    for scale in (0.25, SCALE):
        x = (steps * np.float32(scale)).astype(np.float32)
        x = np.stack([np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))])
        same(levels.split_outliers(isa, x, scale), reference.split_outliers(x, scale))
    q = levels.split_outliers(isa, np.array([[127.5, -128.5, 126.5, -127.5]], np.float32), 1.0)
    want = np.int8([[127, -128, 126, -128]]), np.int32([0, 1]), np.int32([0]), np.int32([1])
    same(q, want)


@each_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 16777218.0, -16777218.0])
@pytest.mark.parametrize("at", [0, 15, 16, 36])
def test_what_cannot_be_split_is_named(isa: str, bad: float, at: int) -> None:
    x = np.ones((3, 37), np.float32)
    x[1, at] = bad
    for split in (reference.split_outliers, lambda *a: levels.split_outliers(isa, *a)):
        with pytest.raises(ValueError, match=rf"x\[1, {at}\]: found .*, wanted a finite"):
            split(x, 1.0)


@each_isa
def test_the_largest_steps_are_split(isa: str) -> None:
    x = np.array([[1 << 24, -(1 << 24), (1 << 24) - 1, 0]], np.float32)
    same(levels.split_outliers(isa, x, 1.0), reference.split_outliers(x, 1.0))


@each_isa
def test_empty_inputs_have_no_outliers(isa: str) -> None:
    same(
        levels.split_outliers(isa, np.zeros((0, 8), np.float32), 1.0),
        reference.split_outliers(np.zeros((0, 8), np.float32), 1.0),
    )


@each_isa
def test_split_reads_nothing_beyond_its_input(isa: str) -> None:
    x = np.random.default_rng(1).normal(size=(3, 37)).astype(np.float32)
    same(
        levels.split_outliers(isa, at_the_end_of_memory(x), 0.01), reference.split_outliers(x, 0.01)
    )


# ---- weights


@each_isa
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("affine", list(Affine))
def test_weights_equal_the_reference(isa: str, bits: int, affine: Affine) -> None:
    for n, k, group_size in ((1, 4, 4), (33, 100, 100), (130, 192, 64), (64, 128, 16)):
        matrix = random_matrix(n, k, bits=bits, group_size=group_size, affine=affine, seed=n)
        rng = np.random.default_rng(bits)
        columns = rng.integers(0, k, 9).astype(np.int32)
        outputs = rng.integers(0, n, 5).astype(np.int32)
        given = matrix_arguments(matrix)
        given["planes"] = at_the_end_of_memory(given["planes"])
        rows = channel_order.pack_codes(matrix.codes, bits)[columns]
        rows = at_the_end_of_memory(np.pad(rows, ((0, 0), (5, 0)), constant_values=0xAB))
        # The last one clips most weights.
        for scales in ([0.013], rng.uniform(0.005, 0.02, n), [1e-4]):
            scales = np.array(scales, np.float32)
            want = reference.weight_columns(matrix, columns, scales)
            same([levels.weight_columns(isa, columns, scales, **given)], [want])
            of_rows = levels.weight_columns_of_rows(
                isa, rows, columns, scales, **row_arguments(matrix), offset=5
            )
            same([of_rows], [want])
            same(
                [levels.weight_rows(isa, outputs, scales, **given)],
                [reference.weight_rows(matrix, outputs, scales)],
            )


@each_isa
def test_weights_at_ties_go_to_the_even_step(isa: str) -> None:
    """Codes 0 to 255 less 128, times 0.5: every other one is a tie."""
    matrix = QuantizedMatrix(
        codes=np.arange(256, dtype=np.uint8).reshape(64, 4),
        scales=np.full((1, 64), 0.5, np.float16), offsets=None, affine=Affine.SYMMETRIC, zero=128,
        bits=8, group_size=4,
    )  # fmt: skip
    one = np.ones(1, np.float32)
    want = np.rint((np.arange(256) - 128) / 2).reshape(64, 4).astype(np.int8)
    every = np.arange(4, dtype=np.int32)
    got = levels.weight_columns(isa, every, one, **matrix_arguments(matrix))
    np.testing.assert_array_equal(got, want.T)
    half = np.full(1, 0.5, np.float32)
    got = levels.weight_columns(isa, every, half, **matrix_arguments(matrix))
    assert got.min() == -127  # not -128: weights are symmetric
    assert got.max() == 127


@each_isa
def test_damaged_weights_are_refused(isa: str) -> None:
    matrix = random_matrix(33, 8, bits=4, group_size=8, affine=Affine.MIN, seed=1)
    scale, at = np.ones(1, np.float32), np.zeros(1, np.int32)
    rows = channel_order.pack_codes(matrix.codes, 4)[at]
    for bad in (np.nan, np.inf):
        matrix.scales[0, 32] = bad
        given, of_rows = matrix_arguments(matrix), row_arguments(matrix)
        with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
            reference.weight_columns(matrix, at, scale)
        with pytest.raises(ValueError, match="not finite"):
            levels.weight_columns(isa, at, scale, **given)
        with pytest.raises(ValueError, match="not finite"):
            levels.weight_columns_of_rows(isa, rows, at, scale, **of_rows)
        with pytest.raises(ValueError, match="not finite"):
            levels.weight_rows(isa, at + 32, scale, **given)
        levels.weight_rows(isa, at, scale, **given)


# ---- products


@each_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_shadow_product_equals_the_reference(isa: str, n: int) -> None:
    rows = np.random.default_rng(n).integers(-128, 128, (29, n)).astype(np.int8)
    for m, share, most in ((1, 1.0, 300), (7, 0.0, 1), (9, 0.2, 32767), (5, 1.0, 500_000)):
        outliers = some_outliers(m, len(rows), share, most, seed=n)
        want = reference.shadow_product(*outliers, rows)
        got = levels.shadow_product(isa, *outliers, at_the_end_of_memory(rows))
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)


@each_isa
@pytest.mark.parametrize("residual", [-32769, -32768, 32767, 32768])
def test_residuals_at_the_ends_of_16_bits(isa: str, residual: int) -> None:
    rows = np.full((2, 70), -128, np.int8)
    starts, slots = np.int32([0, 2, 3]), np.int32([0, 1, 1])
    residuals = np.full(3, residual, np.int32)
    got = levels.shadow_product(isa, starts, slots, residuals, rows)
    np.testing.assert_array_equal(got, [[-256 * residual] * 70, [-128 * residual] * 70])


@each_isa
def test_sums_that_may_not_fit_are_64_bits_wide(isa: str) -> None:
    rows = np.full((2, 70), -128, np.int8)
    starts, slots = np.int32([0, 2, 3]), np.int32([0, 1, 1])
    for total, dtype in (((1 << 24) - 1, np.int32), (1 << 24, np.int64), (3 << 30, np.int64)):
        residuals = np.array([-(total // 2), -(total - total // 2), 5], np.int32)
        out = np.zeros((2, 70), np.int32)
        got = levels.shadow_product(isa, starts, slots, residuals, rows, out)
        assert got.dtype == dtype
        assert (got is out) == (dtype is np.int32)
        np.testing.assert_array_equal(got, [[128 * total] * 70, [-640] * 70])


@each_isa
def test_saturated_products_equal_the_reference(isa: str) -> None:
    for k in (1, 31, 64, 300):
        rng = np.random.default_rng(k)
        x = rng.normal(size=(4, k)).astype(np.float32)
        x[rng.random(x.shape) < 0.1] *= 1e4
        split = levels.split_outliers(isa, x, 0.01)
        rows = rng.integers(-127, 128, (3, k)).astype(np.int8)
        at = [rng.integers(0, most, 20).astype(np.int32) for most in (4, 3)]
        got = levels.saturated_products(isa, *split, rows, *at)
        same([got], [reference.saturated_products(*split, rows, *at)])


@each_isa
def test_long_products_do_not_overflow(isa: str) -> None:
    k = 3 * (1 << 16) + 1
    q, rows = np.full((1, k), -128, np.int8), np.full((1, k), -127, np.int8)
    none, at = np.zeros(0, np.int32), np.zeros(1, np.int32)
    got = levels.saturated_products(isa, q, np.zeros(2, np.int32), none, none, rows, at, at)
    assert got.tolist() == [128 * 127 * k]


# ---- finish


@each_isa
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("result", [np.int32, np.int8, np.float32])
def test_finish_equals_the_reference(isa: str, n: int, result: type) -> None:
    rng = np.random.default_rng(n)
    m = 3
    reach = {np.int32: 1 << 30, np.int8: 128, np.float32: 1000}[result]
    of_device = rng.integers(-reach, reach, (m, n)).astype(result)
    shadow = rng.integers(-(1 << 31), 1 << 31, (m, n))
    bias = rng.normal(size=n).astype(np.float32)
    for scales in (rng.uniform(1e-4, 1e-3, n), [1e-3]):
        scales = np.array(scales, np.float32)
        for of_shadow in (None, shadow.astype(np.int32), shadow * 5):
            for of_bias in (None, bias):
                got, want = np.full((2, m, n + 9), 7.0, np.float32)
                given = of_device, of_shadow, scales, of_bias
                levels.finish_product(isa, *given, got[:, 4 : n + 4], 0.21)
                reference.finish_product(*given, want[:, 4 : n + 4], 0.21)
                np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


# ---- the boundary


def test_wrong_arguments_are_refused_not_read() -> None:
    starts, slots, residuals = np.int32([0, 1, 2]), np.int32([0, 1]), np.int32([5, 6])
    rows, q = np.ones((2, 40), np.int8), np.ones((2, 40), np.int8)
    at = np.zeros(1, np.int32)
    product = _native.shadow_product
    for call, says in [
        (lambda: product("scalar", starts[:2], slots, residuals, rows), "starts: wanted"),
        (lambda: product("scalar", starts[::-1].copy(), slots, residuals, rows), "starts: wanted"),
        (lambda: product("scalar", np.int32([0, 3, 2]), slots, residuals, rows), "starts: wanted"),
        (lambda: product("scalar", starts[:0], slots, residuals, rows), "starts: wanted"),
        (lambda: product("scalar", starts, slots + 1, residuals, rows), "slots: found 2"),
        (lambda: product("scalar", starts, slots - 1, residuals, rows), "slots: found -1"),
        (lambda: product("scalar", starts, slots, residuals[:1], rows), "residuals: found 1"),
        (
            lambda: product("scalar", starts, slots, residuals, rows, np.zeros((2, 39), np.int32)),
            "out: wanted",
        ),
        (
            lambda: product("scalar", starts, slots, residuals, rows, np.zeros((2, 40))),
            "out: wanted",
        ),
        (lambda: product("none", starts, slots, residuals, rows), "isa: found 'none'"),
        (lambda: _native.split_outliers("scalar", np.ones((1, 4), np.float32), 0.0), "scale"),
        (lambda: _native.split_outliers("scalar", np.ones((1, 4), np.float32), np.nan), "scale"),
        (
            lambda: _native.saturated_products(
                "scalar", q, starts, slots, residuals, rows, at + 2, at
            ),
            "at_rows: found 2",
        ),
        (
            lambda: _native.saturated_products(
                "scalar", q, starts, slots, residuals, rows, at, at - 1
            ),
            "at_slots: found -1",
        ),
        (
            lambda: _native.saturated_products(
                "scalar", q, starts, slots + 39, residuals, rows, at, at
            ),
            "channels: found 40",
        ),
        (
            lambda: _native.saturated_products(
                "scalar", q[:1], starts, slots, residuals, rows, at, at
            ),
            "starts: found 3",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    matrix = random_matrix(33, 8, bits=4, group_size=8, affine=Affine.MIN, seed=1)
    given, scale = matrix_arguments(matrix), np.ones(1, np.float32)
    codes = channel_order.pack_codes(matrix.codes, 4)[at]
    for call, says in [
        (lambda: _native.weight_columns("scalar", at + 8, scale, **given), "channels: found 8"),
        (lambda: _native.weight_rows("scalar", at + 33, scale, **given), "outputs: found 33"),
        (lambda: _native.weight_columns("scalar", at, scale * 0, **given), "weight_scales: found"),
        (
            lambda: _native.weight_columns("scalar", at, np.ones(32, np.float32), **given),
            "weight_scales: found 32",
        ),
        (
            lambda: _native.weight_columns(
                "scalar", at, scale, **{**given, "planes": given["planes"][:-1]}
            ),
            "planes hold",
        ),
        (
            lambda: _native.weight_columns_of_rows(
                "scalar", codes, at, scale, **row_arguments(matrix), offset=1
            ),
            "from byte 1",
        ),
        (
            lambda: _native.weight_columns_of_rows(
                "scalar", codes, np.int32([0, 1]), scale, **row_arguments(matrix)
            ),
            "wanted 2 of",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    result, y = np.ones((2, 5), np.int32), np.ones((2, 5), np.float32)
    for arguments, says in [
        ((result.astype(np.int64), None, scale, None, y), "result: wanted"),
        ((result, np.ones((2, 4), np.int32), scale, None, y), "shadow: found"),
        ((result, y, scale, None, y), "shadow: wanted"),
        ((result, None, np.ones(4, np.float32), None, y), "scales: found 4"),
        ((result, None, scale, np.ones(4, np.float32), y), "bias: found 4"),
        ((result, None, scale, None, y[:1]), "y: wanted"),
        ((result, None, scale, None, np.ones((5, 2), np.float32).T), "y: wanted"),
        ((result.astype(np.int8), None, scale, None, y), "output_scale"),
    ]:
        with pytest.raises(ValueError, match=says):
            _native.finish_product("scalar", *arguments)
    with pytest.raises(TypeError):
        _native.finish_product("scalar", result, None, scale, None, y.astype(np.float64))


def test_other_threads_run_meanwhile() -> None:
    """A product in plain C of some 0.1 s, during which this thread counts."""
    rows = np.ones((64, 1 << 14), np.int8)
    outliers = some_outliers(256, 64, 1.0, 100, seed=1)
    thread = threading.Thread(target=_native.shadow_product, args=("scalar", *outliers, rows))
    thread.start()
    counted = 0
    while thread.is_alive():
        counted += 1
    assert counted > 1000
