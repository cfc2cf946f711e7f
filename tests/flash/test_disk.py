"""What a disk gives: the fit alone, the choice alone, and that a measurement is kept and believed
as long as disk and kernel are the same."""

import json
import logging
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elute import _native
from elute.errors import DeviceError, NoHomeError
from elute.flash import disk
from elute.flash.disk import Device, Disk, choose, fit
from elute.flash.weights import pages

SIZES = (4096, 16384, 65536, 262144)
SOME = Disk(2e9, 5e-5, 3e9, 4, 1 << 20, "io_uring")


@given(
    request_s=st.floats(1e-6, 1e-2),
    bytes_s=st.floats(1e7, 2e10),
)
def test_the_fit_finds_what_reads_were_made_of(request_s, bytes_s):
    found = fit([(size, request_s + size / bytes_s) for size in SIZES])
    assert found == pytest.approx((request_s, bytes_s), rel=1e-3)


def test_the_fit_is_near_under_noise():
    draw = np.random.default_rng(3)
    points = [(size, (8e-5 + size / 1.5e9) * draw.uniform(0.95, 1.05)) for size in SIZES]
    request_s, bytes_s = fit(points)
    assert request_s == pytest.approx(8e-5, rel=0.1)
    assert bytes_s == pytest.approx(1.5e9, rel=0.25)


def test_a_request_never_costs_less_than_nothing():
    request_s, bytes_s = fit([(size, size**1.2 / 1e9) for size in SIZES])  # bends upwards
    assert request_s == 0
    assert 0 < bytes_s < 1e9
    request_s, bytes_s = fit([(4096, 2e-4), (16384, 1e-4)])  # falls: noise
    assert request_s == 0
    assert bytes_s > 0


def test_the_most_bytes_in_flight_that_give_about_the_most_are_chosen():
    rates = {(8, 1 << 20): 2.0e9, (4, 1 << 20): 2.05e9, (16, 1 << 20): 1.5e9, (16, 1 << 18): 1.6e9}
    assert choose(rates) == (8, 1 << 20)
    rates[32, 1 << 18] = 2.02e9
    assert choose(rates) == (8, 1 << 20)  # as many bytes, fewer requests
    assert choose({(2, 1 << 17): 1e9, (4, 1 << 17): 1.2e9}) == (4, 1 << 17)


def test_small_pieces_get_more_requests():
    assert SOME.depth_of(1 << 22) == 4
    assert SOME.depth_of(1 << 20) == 4
    assert SOME.depth_of(300_000) == 14
    assert SOME.depth_of(4096) == disk.MOST_DEPTH
    assert replace(SOME, depth=64).depth_of(4096) == 64
    assert SOME.read_s(3_000_000) == pytest.approx(5e-5 + 1e-3)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(9 << 20))
    return path


def test_the_rate_of_this_moment(file, tmp_path):
    assert 1e6 < disk.rate_now(file, SOME) < 1e12
    small = tmp_path / "small"
    small.write_bytes(bytes(3 * 4096))
    assert disk.rate_now(small, SOME) > 0  # in requests of what there is
    with pytest.raises(DeviceError, match="No such file"):
        disk.rate_now(tmp_path / "gone", SOME)
    (tmp_path / "empty").touch()
    with pytest.raises(DeviceError, match=r"empty: found 0 bytes, wanted at least 4096"):
        disk.rate_now(tmp_path / "empty", SOME)


def test_a_measurement_is_quick_and_plausible(file):
    found = disk.measure(file)
    assert found.reader in ("io_uring", "pread")
    assert 1e6 < found.sequential_bytes_s < 1e12
    assert 0 <= found.request_s < 1
    assert found.depth * found.request_bytes <= disk.MOST_IN_FLIGHT
    assert (found.depth, found.request_bytes) in disk.SEQUENTIAL


@pytest.mark.parametrize("n_bytes", [4096, 8192, 100_000, 1 << 19])
def test_a_small_file_is_measured_too(tmp_path, n_bytes):
    path = tmp_path / "small"
    path.write_bytes(bytes(n_bytes))
    found = disk.measure(path)
    assert found.sequential_bytes_s > 0
    assert found.request_bytes % 4096 == 0


@pytest.fixture
def measurements(monkeypatch):
    """Counts them."""
    disk._measure_once.cache_clear()
    seen = []

    def measure(path):
        seen.append(path)
        return SOME

    monkeypatch.setattr(disk, "measure", measure)
    yield seen
    disk._measure_once.cache_clear()


def test_a_disk_is_measured_once(file, measurements, tmp_path):
    home = tmp_path / "home"
    assert disk.known(file, folder=home) is None
    for _ in range(3):
        assert disk.measured(file, folder=home) == SOME
        disk._measure_once.cache_clear()
    assert measurements == [file]
    assert disk.known(tmp_path, folder=home) == SOME


@pytest.mark.parametrize("change", ["number", "size", "kernel"])
def test_another_disk_or_kernel_is_measured_and_the_first_kept(
    file, measurements, tmp_path, monkeypatch, change
):
    disk.measured(file, folder=tmp_path)
    here = Device.of(file)
    other = replace(here, **{change: "6.0" if change == "kernel" else 1})
    monkeypatch.setattr(Device, "of", lambda _path: other)
    disk._measure_once.cache_clear()
    disk.measured(file, folder=tmp_path)
    assert len(measurements) == 2
    told = json.loads((tmp_path / "disks.json").read_text())
    assert [entry["device"] for entry in told["disks"]] == [asdict(here), asdict(other)]


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        '{"format": "elute-disks", "version": 2, "disks": []}',
        '{"format": "elute-disks", "version": 1, "disks": [{"disk": {}}]}',
        json.dumps(
            {
                "format": "elute-disks",
                "version": 1,
                "disks": [
                    {
                        "device": {"number": 1, "size": 1, "kernel": ""},
                        "disk": asdict(SOME) | {"depth": 0},
                    }
                ],
            }
        ),
    ],
)
def test_a_broken_file_is_told_of_and_replaced(file, measurements, tmp_path, caplog, broken):
    (tmp_path / "disks.json").write_text(broken)
    with caplog.at_level(logging.INFO, "elute"):
        assert disk.measured(file, folder=tmp_path) == SOME
    assert any("disks.json: not disks of this version" in r.getMessage() for r in caplog.records)
    assert disk.known(file, folder=tmp_path) == SOME


def test_without_a_home_a_process_measures_once(file, measurements, monkeypatch):
    def nowhere():
        raise NoHomeError("cache: found no home folder")

    monkeypatch.setattr(disk, "cache_dir", nowhere)
    assert disk.measured(file) == disk.measured(file) == SOME
    assert measurements == [file]


def test_a_read_that_fails_is_an_error_that_says_where(file, tmp_path):
    memory = pages(1 << 20)
    with pytest.raises(RuntimeError, match=r"model\.safetensors: byte 8192: Input/output error"):
        _native.time_reads(str(file), [0, 4096, 8192], 4096, 1, memory, 1.0, "faulty:pread eio@3")
    with pytest.raises(RuntimeError, match=r"byte 9437184"):
        _native.time_reads(str(file), [9 << 20], 4096, 1, memory, 1.0)
    disk._measure_once.cache_clear()
    with pytest.raises(DeviceError, match=r"No such file.*; check the model's files"):
        disk.measured(tmp_path / "gone", folder=tmp_path / "home")


def test_a_disk_that_fails_is_a_device_error(file, tmp_path, monkeypatch):
    def time_reads(*_):
        raise RuntimeError("EIO")

    monkeypatch.setattr(_native, "time_reads", time_reads)
    disk._measure_once.cache_clear()
    with pytest.raises(DeviceError, match="EIO; check the model's files"):
        disk.measured(file, folder=tmp_path / "home")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([], 4096, 1), "no offsets"),
        (([1], 4096, 1), "an offset is not aligned"),
        (([0], 4096, 300), "memory: wanted depth"),
        (([0], 4097, 1), "request_bytes: wanted a multiple"),
        (([0], 4096, 0), "depth: wanted 1 to 1024"),
    ],
)
def test_what_cannot_be_timed_is_refused(file, arguments, says):
    with pytest.raises(ValueError, match=says):
        _native.time_reads(str(file), *arguments, pages(1 << 20), 0.01)
