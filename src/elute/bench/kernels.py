"""Speed of the matmul kernels on random matrices, and what bounds it. Prints nothing.

Decode is one row, prefill is several; which kernel multiplies them is the engine's own choice
(elute.kernels.registry). Every matrix is repeated over an arena larger than the caches and each
product takes the next copy, so weights come from memory as in a model. Before each timing the
ceilings are measured, with as many threads, reading the same arena. Cases take turns, so that a
disturbance of the machine hits all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from elute import _native
from elute.bench import ceilings
from elute.bench.ceilings import Ceilings, measured_ceilings, median_ceilings
from elute.errors import BudgetError, DeviceError, ShapeError
from elute.kernels import registry
from elute.kernels.registry import Choice, Kernel
from elute.pack.quads import check_groups, planes_bytes
from elute.types import F16, F32, OVER_READ, PANEL, U8, Affine

PAGE_BYTES = 4096  # where the packed directory, too, starts a matrix
# Multiplies and adds of one timing of several rows: some 10 ms, long against a thread's wake-up.
PREFILL_OPERATIONS = 2_000_000_000
F16_FROM, F16_BELOW = 0x2000, 0x3000  # bits of positive normal halves, 2^-7 to 2^-3


@dataclass(frozen=True)
class Case:
    """One product y[rows, n] = x[rows, k] @ w[n, k].T; group_size 0 is one scale a row."""

    n: int
    k: int
    bits: int
    group_size: int
    rows: int
    threads: int
    affine: Affine = Affine.SYMMETRIC

    @property
    def columns_per_scale(self) -> int:
        return self.group_size or self.k

    @property
    def n_panels(self) -> int:
        return -(-self.n // PANEL)

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        return self.n_panels, self.k // self.columns_per_scale, PANEL

    @property
    def n_scales(self) -> int:
        return int(np.prod(self.scales_shape))

    @property
    def has_offsets(self) -> bool:
        return self.affine is not Affine.SYMMETRIC

    @property
    def n_bytes(self) -> int:
        """What a product reads of the matrix: planes, scales and offsets."""
        halves = self.n_scales * (2 if self.has_offsets else 1)
        return planes_bytes(self.n, self.k, self.bits) + 2 * halves

    @property
    def stride_bytes(self) -> int:
        """From the planes of one copy to the next."""
        size = planes_bytes(self.n, self.k, self.bits) + OVER_READ
        return -(-size // PAGE_BYTES) * PAGE_BYTES

    @property
    def rows_bytes(self) -> int:
        """Of x and y, and about what the rows take quantized, with tables and tiles."""
        return self.rows * (4 * self.n + 11 * self.k)

    @property
    def operations(self) -> int:
        return 2 * self.n * self.k * self.rows


@dataclass(frozen=True)
class KernelSpeed:
    """Of one case. gb_s counts n_bytes of the case once a product; gops multiplies and adds.

    kernel  that ran: lut_matmul looks rows up, lut_multiply and lut_gemm multiply them
    Shares are of the ceilings measured right before this case's own timings.
    """

    shape: str
    bits: int
    group_size: int
    affine: str
    threads: int
    rows: int
    kernel: str
    ms: float
    gb_s: float
    bandwidth_share: float
    gops: float
    peak_share: float


@dataclass
class _Samples:
    kernel: str = ""
    seconds: list[float] = field(default_factory=list)
    ceilings: list[Ceilings] = field(default_factory=list)


class _Arena:
    """Random planes, scales and offsets that every case cuts its copies from."""

    def __init__(self, cases: Sequence[Case], n_bytes: int) -> None:
        self.n_bytes = max(n_bytes, *(case.stride_bytes for case in cases))
        n_scales = max(self._copies(case) * case.n_scales for case in cases)
        n_offsets = max(self._copies(case) * case.n_scales * case.has_offsets for case in cases)
        rows_bytes = max(case.rows_bytes for case in cases)
        self._check_memory(self.n_bytes + 2 * (n_scales + n_offsets) + rows_bytes)
        random = np.random.Generator(np.random.PCG64(0))

        def halves(count: int) -> F16:
            bits = random.integers(F16_FROM, F16_BELOW, count, dtype=np.uint16)
            return bits.view(np.float16)

        self.planes: U8 = random.integers(0, 256, self.n_bytes, dtype=np.uint8)
        self._scales, self._offsets = halves(n_scales), halves(n_offsets)

    def _copies(self, case: Case) -> int:
        return self.n_bytes // case.stride_bytes

    def matrices(self, case: Case) -> tuple[U8, F16, F16 | None]:
        """-> planes u8 [copies, stride_bytes], scales f16 [copies, n_panels, groups, PANEL],
        offsets like scales or None."""
        copies = self._copies(case)
        shape, n_halves = (copies, *case.scales_shape), copies * case.n_scales
        planes = self.planes[: copies * case.stride_bytes].reshape(copies, case.stride_bytes)
        scales = self._scales[:n_halves].reshape(shape)
        return planes, scales, self._offsets[:n_halves].reshape(shape) if case.has_offsets else None

    @staticmethod
    def _check_memory(wanted: int) -> None:
        import psutil

        available = psutil.virtual_memory().available
        if wanted > available:
            raise BudgetError(
                f"bench: matrices and rows take {wanted >> 20} MiB, but {available >> 20} MiB are "
                "available; use smaller shapes, fewer rows or close other programs"
            )


def bench_kernels(
    cases: Sequence[Case],
    *,
    isa: str | None = None,
    kernel: str = Kernel.AUTO,
    repeats: int = 5,
    arena_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[KernelSpeed], dict[int, Ceilings]]:
    """Speed of every case and the ceilings by thread count, medians over `repeats` rounds.

    kernel       auto takes what the engine takes for these bits and rows
    arena_bytes  memory that a round of products goes through; default_arena_bytes() when None
    progress     is called with (timings done, timings in all)

    Raises ShapeError for a case that cannot be packed, DeviceError for an instruction set that this
    CPU lacks, an unknown kernel or threads that cannot be started, BudgetError when memory does not
    hold the matrices.
    """
    isa = isa or _native.best_isa()
    if isa not in _native.isas():
        raise DeviceError(
            f"isa: found {isa!r}, wanted one that this CPU runs: {', '.join(_native.isas())}"
        )
    _check(cases, repeats)
    choices = registry.choose(isa, (case.bits for case in cases), kernel)
    if arena_bytes is None:
        arena_bytes = ceilings.default_arena_bytes()
    arena = _Arena(cases, arena_bytes)
    samples = [_Samples() for _ in cases]
    done = 0
    try:
        for _ in range(repeats):
            for case, sample in zip(cases, samples, strict=True):
                _measure(case, sample, isa, arena, choices)
                done += 1
                if progress is not None:
                    progress(done, repeats * len(cases))
    except RuntimeError as error:  # of the thread pool, which says how many it could start
        raise DeviceError(str(error)) from None
    speeds = [_speed(case, sample) for case, sample in zip(cases, samples, strict=True)]
    return speeds, _ceilings(cases, samples)


def _check(cases: Sequence[Case], repeats: int) -> None:
    if not cases or repeats < 1:
        raise ShapeError(
            f"bench: found {len(cases)} cases and {repeats} repeats, wanted at least one of each"
        )
    for case in cases:
        where = f"{case.n}x{case.k}"
        check_groups(case.k, case.columns_per_scale, where=where)
        for name, value, least, most in (
            ("N", case.n, 1, 1 << 30),
            ("K", case.k, 4, 1 << 30),
            ("bits", case.bits, 1, 8),
            ("rows", case.rows, 1, 1 << 20),
            ("threads", case.threads, 1, 512),
        ):
            if not least <= value <= most:
                raise ShapeError(f"{where}: found {name}={value}, wanted {least} to {most}")


def _measure(
    case: Case, sample: _Samples, isa: str, arena: _Arena, choices: Mapping[int, Choice]
) -> None:
    planes, scales, offsets = arena.matrices(case)
    sample.ceilings.append(measured_ceilings(isa, case.threads, arena.planes))
    # Never a copy twice, which might still be in a cache.
    products = len(planes)
    if case.rows > 1:
        products = min(products, max(1, PREFILL_OPERATIONS // case.operations))
    seconds, _, sample.kernel = _native.matmul_seconds(
        isa,
        case.threads,
        random_activations(case.rows, case.k),
        planes,
        scales,
        offsets,
        case.n,
        case.bits,
        case.columns_per_scale,
        0 if case.has_offsets else 1 << case.bits - 1,
        case.affine,
        products,
        case.rows <= choices[case.bits].lookup_rows,
    )
    sample.seconds += seconds


def random_activations(rows: int, k: int) -> F32:
    """-> f32 [rows, k], the same on every machine."""
    random = np.random.Generator(np.random.PCG64(k))
    return random.standard_normal((rows, k), dtype=np.float32)


def _speed(case: Case, sample: _Samples) -> KernelSpeed:
    seconds = statistics.median(sample.seconds)
    gb_s, gops = case.n_bytes / seconds / 1e9, case.operations / seconds / 1e9
    limits = _median(sample.ceilings)
    return KernelSpeed(
        shape=f"{case.n}x{case.k}",
        bits=case.bits,
        group_size=case.columns_per_scale,
        affine=str(case.affine),
        threads=case.threads,
        rows=case.rows,
        kernel=sample.kernel,
        ms=seconds * 1e3,
        gb_s=gb_s,
        bandwidth_share=gb_s / limits.read_gb_s,
        gops=gops,
        peak_share=gops / limits.multiply_gops,
    )


def _ceilings(cases: Sequence[Case], samples: Sequence[_Samples]) -> dict[int, Ceilings]:
    found = {}
    for threads in dict.fromkeys(case.threads for case in cases):
        own = [s for case, s in zip(cases, samples, strict=True) if case.threads == threads]
        found[threads] = _median([measured for s in own for measured in s.ceilings])
    return found


def _median(measured: Sequence[Ceilings]) -> Ceilings:
    """Of at least one."""
    median = median_ceilings(measured)
    assert median is not None
    return median
