import numpy as np
import pytest

from elute import _native
from elute.bench import ceilings
from elute.bench.ceilings import Ceilings, MeasuredCeilings, measured_ceilings, median_ceilings


def test_the_ceiling_is_the_fastest_of_the_reads():
    assert (Ceilings((7.0, 9.0, 8.0), 1.0).read_gb_s, Ceilings((7.0,), 1.0).read_streams) == (9, 1)
    assert Ceilings((7.0, 9.0, 8.0), 1.0).read_streams == 2
    assert Ceilings((9.0, 9.0), 1.0).read_streams == 1  # no more than it takes


def test_each_median_is_by_itself_so_that_one_lucky_pass_is_no_ceiling():
    measured = [Ceilings((5.0, 30.0), 3.0), Ceilings((6.0, 4.0), 1.0), Ceilings((7.0, 4.0), 2.0)]
    assert median_ceilings(measured) == Ceilings((6.0, 4.0), 2.0)
    assert median_ceilings([]) is None


@pytest.mark.parametrize("passes", [1, 3])
def test_every_number_of_streams_is_read_and_the_best_pass_counts(monkeypatch, passes):
    data, reads = np.ones(4096, np.uint8), []

    def read_gb_s(isa, n_threads, given, n_streams):
        assert (isa, n_threads) == ("scalar", 2)
        assert given is data
        reads.append(n_streams)
        # the second pass is the best
        return (10.0 * n_streams + (reads.count(n_streams) == 2), 0)

    peaks = iter([3.0, 5.0, 4.0])
    monkeypatch.setattr(_native, "read_gb_s", read_gb_s)
    monkeypatch.setattr(_native, "multiply_gops", lambda isa, n_threads: next(peaks))
    measured = measured_ceilings("scalar", 2, data, passes=passes)
    best = int(passes > 1)
    assert measured == Ceilings((10.0 + best, 20.0 + best, 30.0 + best), 5.0 if passes > 1 else 3.0)
    assert sorted(reads) == sorted([1, 2, 3] * passes)


def test_measured_ceilings_are_positive(monkeypatch):
    monkeypatch.setattr(ceilings, "default_arena_bytes", lambda: 1 << 20)
    measured = MeasuredCeilings("scalar")(2)
    assert len(measured.reads_gb_s) == 3
    assert min(measured.reads_gb_s) > 0
    assert measured.multiply_gops > 0


def test_the_arena_exceeds_the_caches():
    assert ceilings.default_arena_bytes() >= 256 << 20
