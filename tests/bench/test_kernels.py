import dataclasses

import numpy as np
import pytest

from elute import _native
from elute.bench import kernels
from elute.bench.ceilings import Ceilings
from elute.bench.kernels import Case, bench_kernels
from elute.errors import BudgetError, DeviceError, ShapeError
from elute.kernels.lut_matmul import reference
from elute.kernels.registry import Choice
from elute.types import OVER_READ, Affine, PackedMatrix

ARENA_BYTES = 1 << 20
RUN = 128  # bytes that a stream reads at a time
ISA = _native.best_isa()
CASE = Case(n=96, k=128, bits=2, group_size=64, rows=1, threads=1)


def test_every_case_has_a_row_and_every_thread_count_its_ceilings():
    cases = [
        dataclasses.replace(CASE, bits=bits, rows=rows, threads=threads, group_size=group_size)
        for bits in (1, 3, 8)
        for rows, group_size in ((1, 64), (5, 0))
        for threads in (1, 2)
    ]
    seen = []
    speeds, ceilings = bench_kernels(
        cases, repeats=2, arena_bytes=ARENA_BYTES, progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (24, 24)
    assert [(s.bits, s.rows, s.threads, s.group_size) for s in speeds] == [
        (c.bits, c.rows, c.threads, c.group_size or 128) for c in cases
    ]
    for speed in speeds:
        assert speed.shape == "96x128"
        assert speed.bandwidth_share > 0
        assert (
            speed.peak_share > 0
        )  # no bound above: on a busy machine the ceiling may be the slow one
        assert speed.gops == pytest.approx(2 * 96 * 128 * speed.rows / speed.ms / 1e6)
        n_bytes = 96 * 128 * speed.bits / 8 + 2 * 96 * (128 / speed.group_size)
        assert speed.gb_s == pytest.approx(n_bytes / speed.ms / 1e6)
    assert list(ceilings) == [1, 2]
    assert all(c.read_gb_s > 0 and c.multiply_gops > 0 for c in ceilings.values())


@pytest.mark.parametrize("affine", Affine)
def test_bytes_count_offsets_where_there_are_some(affine):
    ((speed,), _) = bench_kernels(
        [dataclasses.replace(CASE, affine=affine)], repeats=1, arena_bytes=ARENA_BYTES
    )
    assert speed.affine == affine
    scales_bytes = 2 * 96 * 128 // 64
    n_bytes = 96 * 128 * 2 // 8 + scales_bytes * (1 if affine is Affine.SYMMETRIC else 2)
    assert speed.gb_s == pytest.approx(n_bytes / speed.ms / 1e6)


def spy(monkeypatch, name):
    """Arguments of every call of a native function, which still runs."""
    calls, native = [], getattr(_native, name)

    def called(*arguments):
        calls.append(arguments)
        return native(*arguments)

    monkeypatch.setattr(_native, name, called)
    return calls


@pytest.mark.parametrize("affine", Affine)
def test_the_matrices_have_the_affine_map_of_the_case(monkeypatch, affine):
    calls = spy(monkeypatch, "matmul_seconds")
    # the smaller one first: its copies are more
    cases = [dataclasses.replace(CASE, n=n, affine=affine) for n in (32, 96)]
    bench_kernels(cases, repeats=1, arena_bytes=ARENA_BYTES)
    for case, call in zip(cases, calls, strict=True):
        planes, scales, offsets, zero, told = call[3], call[4], call[5], call[9], call[10]
        assert told == affine
        assert len(planes) == len(scales) == ARENA_BYTES // 4096
        if affine is Affine.SYMMETRIC:
            assert offsets is None
            assert zero == 2
        else:
            assert offsets.shape == scales.shape == (len(planes), case.n // 32, 2, 32)
            assert not np.shares_memory(offsets, scales)
            assert zero == 0


def multiplying(rows):
    """The kernel that multiplies so many rows on this CPU."""
    return "lut_multiply" if _native.multiplies_directly(ISA) and rows <= 8 else "lut_gemm"


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_a_forced_kernel_runs_and_is_named(rows):
    cases = [dataclasses.replace(CASE, rows=rows)]
    named = {}
    for kernel in ("lookup", "multiply"):
        ((speed,), _) = bench_kernels(cases, kernel=kernel, repeats=1, arena_bytes=ARENA_BYTES)
        named[kernel] = speed.kernel
    assert named == {"lookup": "lut_matmul", "multiply": multiplying(rows)}


def test_auto_takes_what_the_race_found_for_the_bits_and_the_rows(monkeypatch):
    found = {2: Choice(2, lookup_rows=3), 4: Choice(4, lookup_rows=0)}
    asked = []

    def choose(isa, widths, kernel):
        asked.append((isa, set(widths), kernel))
        return found

    monkeypatch.setattr(kernels.registry, "choose", choose)
    cases = [
        dataclasses.replace(CASE, bits=bits, rows=rows)
        for bits, rows in ((2, 1), (2, 3), (2, 4), (4, 1), (4, 100))
    ]
    speeds, _ = bench_kernels(cases, repeats=1, arena_bytes=ARENA_BYTES)
    assert asked == [(ISA, {2, 4}, "auto")]
    assert [speed.kernel for speed in speeds] == [
        "lut_matmul", "lut_matmul", multiplying(4), multiplying(1), multiplying(100),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"k": 130}, ShapeError, "96x130: K=130 is not a multiple of 4"),
        ({"group_size": 48}, ShapeError, "96x128: group_size=48 neither"),
        ({"bits": 9}, ShapeError, "96x128: found bits=9, wanted 1 to 8"),
        ({"rows": 0}, ShapeError, "96x128: found rows=0"),
        ({"threads": 513}, ShapeError, "96x128: found threads=513, wanted 1 to 512"),
        ({"n": 1 << 29, "k": 4096}, BudgetError, "use smaller shapes"),
        ({"n": 1 << 20, "rows": 1 << 20}, BudgetError, "fewer rows"),
    ],
)
def test_a_case_that_cannot_be_measured_is_refused(changes, error, told):
    with pytest.raises(error, match=told):
        bench_kernels([dataclasses.replace(CASE, **changes)], arena_bytes=ARENA_BYTES)


def test_no_case_and_unknown_choices_are_refused():
    with pytest.raises(ShapeError, match="found 0 cases and 5 repeats"):
        bench_kernels([])
    with pytest.raises(DeviceError, match="found 'mmx', wanted one that this CPU runs"):
        bench_kernels([CASE], isa="mmx")
    with pytest.raises(DeviceError, match="kernel: found 'magic', wanted one of auto, lookup"):
        bench_kernels([CASE], kernel="magic")


def test_shares_are_of_the_ceilings_before_the_case_s_own_timings(monkeypatch):
    measured = iter([Ceilings((4.0, 2.0), 50.0), Ceilings((1.0, 1.0), 10.0)] * 3)
    monkeypatch.setattr(kernels, "measured_ceilings", lambda *_: next(measured))
    cases = [CASE, dataclasses.replace(CASE, rows=2)]
    speeds, ceilings = bench_kernels(cases, repeats=3, arena_bytes=ARENA_BYTES)
    for speed, read, multiply in zip(speeds, (4.0, 1.0), (50.0, 10.0), strict=True):
        assert speed.bandwidth_share == pytest.approx(speed.gb_s / read)
        assert speed.peak_share == pytest.approx(speed.gops / multiply)
    assert ceilings == {1: Ceilings((2.5, 1.5), 30.0)}


def random_copies(n_copies: int) -> dict:
    """Arguments of matmul_seconds for w[40, 144], 3 bits, groups of 16."""
    rng = np.random.default_rng(n_copies)
    groups = (n_copies, 2, 9, 32)
    return {
        "planes": rng.integers(0, 256, (n_copies, 2 * 36 * 16 * 3 + OVER_READ), np.uint8),
        "scales": rng.uniform(0.01, 0.1, groups).astype(np.float16),
        "offsets": rng.normal(0, 1, groups).astype(np.float16),
        "n": 40, "bits": 3, "group_size": 16, "zero": 0, "affine": "min", "repeats": 3,
    }  # fmt: skip


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("rows", [1, 4, 300])  # 300: more than a chunk of several panels may hold
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("lookup", [True, False])
def test_the_timed_product_is_the_reference_s(isa, rows, threads, lookup):
    given = random_copies(2)
    x = kernels.random_activations(rows, 144)
    seconds, y, kernel = _native.matmul_seconds(isa, threads, x, **given, lookup=lookup)
    assert len(seconds) == 3
    assert all(s > 0 for s in seconds)
    assert (kernel == "lut_matmul") == lookup
    # The third product takes the first of the two copies again.
    matrix = PackedMatrix(
        (40, 144), given["planes"][0][:-OVER_READ], given["scales"][0], given["offsets"][0],
        Affine.MIN, 0, 3, 16,
    )  # fmt: skip
    assert np.array_equal(y, reference.lut_matmul(x, matrix))


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_streams", range(1, _native.MOST_STREAMS + 1))
@pytest.mark.parametrize("n_runs", [2, 3, 63, 64])  # with and without runs that no stream gets
def test_a_read_sees_every_run(isa, threads, n_streams, n_runs):
    data = np.zeros((n_runs, RUN // 8), np.uint64)
    for run in range(n_runs):
        data[run, run % (RUN // 8)] = 1 << run
    gb_s, seen = _native.read_gb_s(isa, threads, data.view(np.uint8).ravel(), n_streams)
    assert gb_s > 0
    assert seen == (1 << n_runs) - 1


@pytest.mark.parametrize("isa", _native.isas())
def test_the_peak_is_positive(isa):
    assert _native.multiply_gops(isa, 1) > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"isa": "mmx"}, "isa: found 'mmx'"),
        ({"n_threads": 0}, "n_threads: found 0, wanted 1 to 512"),
        ({"repeats": 0}, "repeats: found 0, wanted at least 1"),
        ({"x": np.zeros((0, 144), np.float32)}, "x: found 0 rows"),
        ({"planes": np.zeros((0, 4096), np.uint8)}, "planes: found 0 copies"),
        ({"planes": np.zeros((2, 4096), np.uint8)}, "scales: found 1 copies, wanted 2"),
        ({"planes": np.zeros((1, 2 * 36 * 16 * 3), np.uint8)}, "matrix: planes hold 3456 bytes"),
        ({"scales": np.zeros((1, 2, 9, 32), np.float32)}, "matrix: scales are not float16"),
        ({"scales": np.zeros((1, 2, 8, 32), np.float16)}, "matrix: scales have the wrong shape"),
        ({"offsets": np.zeros((2, 2, 9, 32), np.float16)}, "offsets: found 2 copies, wanted 1"),
        ({"offsets": None}, "matrix: offsets are missing"),
    ],
)
def test_wrong_arguments_of_a_timing_are_refused_in_a_sentence(changes, told):
    given = {"isa": "scalar", "n_threads": 1, "x": np.zeros((1, 144), np.float32)}
    given |= random_copies(1) | {"lookup": True} | changes
    with pytest.raises(ValueError, match=told):
        _native.matmul_seconds(**given)


def test_wrong_arguments_of_a_ceiling_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="data: found 64 bytes, wanted 256 to"):
        _native.read_gb_s("scalar", 2, np.zeros(64, np.uint8), 1)
    for n_streams in (0, 4):
        with pytest.raises(ValueError, match=f"n_streams: found {n_streams}, wanted 1 to 3"):
            _native.read_gb_s("scalar", 2, np.zeros(4096, np.uint8), n_streams)
    with pytest.raises(ValueError, match="n_threads: found 513"):
        _native.multiply_gops("scalar", 513)
