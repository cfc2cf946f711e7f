"""A calibration on disk: it comes back as it was, or as one sentence, never as something else."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_npu import Tiny, tiny

from elute.errors import FormatError
from elute.npu import saved
from elute.npu.calibrate import SiteStatistics
from elute.npu.choices import CHOICES
from elute.npu.ranges import Range


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny("qwen2")


@pytest.fixture(scope="module")
def sites(model: Tiny):
    return model.executor().sites


@pytest.fixture
def path(model: Tiny, tmp_path: Path) -> Path:
    saved.save(tmp_path / saved.FILE, model.statistics, model="m")
    return tmp_path / saved.FILE


def same(a: Range, b: Range) -> bool:
    return np.array_equal(a.histogram, b.histogram) and np.array_equal(a.channels, b.channels)


def equal(got: SiteStatistics, want: SiteStatistics) -> bool:
    return (
        same(got.input, want.input)
        and all(map(same, got.outputs, want.outputs))
        and all(map(np.array_equal, got.peaks, want.peaks))
        and got.tokens == want.tokens
        and got.effects == want.effects
        and got.output_scales == want.output_scales
        and all(np.array_equal(got.outliers[c], want.outliers[c]) for c in want.outliers)
    )


def test_what_was_saved_comes_back(model: Tiny, sites, path: Path) -> None:
    found = saved.load(path, sites, model="m")
    assert found is not None
    assert list(found) == list(model.statistics)
    assert all(equal(found[name], want) for name, want in model.statistics.items())
    assert [file.name for file in path.parent.iterdir()] == [saved.FILE]  # no partial file stays


def test_none_is_found_where_there_is_none(sites, tmp_path: Path) -> None:
    assert saved.load(tmp_path / saved.FILE, sites, model="m") is None


def test_that_of_another_model_or_version_is_not_taken(
    sites, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        assert saved.load(path, sites, model="other") is None
        assert "was made for another model or version; made anew" in caplog.text
        caplog.clear()
        monkeypatch.setattr(saved, "VERSION", "next")
        assert saved.load(path, sites, model="m") is None
        assert "was made for another model or version; made anew" in caplog.text


def refused(path: Path, sites, *, model: str = "m") -> str:
    with pytest.raises(FormatError) as error:
        saved.load(path, sites, model=model)
    told = str(error.value)
    assert told.startswith(f"{path}: found a file that cannot be read (")
    assert told.endswith("), wanted a calibration; remove it, and it is made again")
    return told


def test_truncated_files_are_refused(sites, path: Path) -> None:
    content = path.read_bytes()
    for n in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:n])
        refused(path, sites)
    path.write_bytes(content + b"\0")
    refused(path, sites)


def test_flipped_bytes_are_refused_or_of_no_model(sites, path: Path) -> None:
    """All of the header that are read, and some of the arrays: none changes what is loaded."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    random = np.random.default_rng(3)
    places = [*range(8), *range(8, header, 23), *random.integers(header, len(content), 150)]
    outcomes = {"refused": 0, "another": 0}
    for at in places:
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        try:
            assert saved.load(path, sites, model="m") is None, at
            outcomes["another"] += 1
        except FormatError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 150, outcomes


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("effects", np.full(4, np.nan), "effects has another shape, type or values"),
        ("effects", np.zeros(3), "effects has another shape, type or values"),
        ("effects", np.zeros(4, np.float32), "effects has another shape, type or values"),
        ("tokens", np.array([0]), "is of no tokens"),
        ("tokens", np.array([-5]), "tokens has another shape, type or values"),
        ("input.channels", np.full(64, -1, np.float32), "input.channels has another shape"),
        ("input.channels", np.full(64, np.inf, np.float32), "input.channels has another shape"),
        ("input.histogram", np.zeros(7, np.int64), "input.histogram has another shape"),
        ("outliers.0.99+shadow", np.zeros(63, np.int64), "outliers.0.99.shadow has another shape"),
        ("0.peaks", np.zeros((2, 2), np.float32), "0.peaks has another shape"),
        ("1.channels", np.zeros(1, np.float32), "1.channels has another shape"),
    ],
)
def test_arrays_of_other_kinds_are_refused(
    key: str, value: np.ndarray, says: str, sites, path: Path
) -> None:
    """With a checksum that is right: by another writer."""
    arrays = load_file(path)
    name = f"{sites[0].name}.{key}"
    assert name in arrays
    arrays[name] = value
    told = {"version": saved.VERSION, "model": "m", "effects": saved._EFFECTS}
    save_file(arrays, path, told | {"sha256": saved._digest(arrays)})
    assert says.replace(".shadow", "+shadow") in refused(path, sites)


def test_a_missing_array_is_refused(sites, path: Path) -> None:
    arrays = load_file(path)
    del arrays[f"{sites[1].name}.tokens"]
    told = {"version": saved.VERSION, "model": "m", "effects": saved._EFFECTS}
    save_file(arrays, path, told | {"sha256": saved._digest(arrays)})
    assert f"{sites[1].name}.tokens" in refused(path, sites)


def test_a_folder_that_cannot_be_written_is_a_warning(
    model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "none" / saved.FILE
    with caplog.at_level(logging.WARNING):
        saved.save(path, model.statistics, model="m")
    assert f"{path}: cannot be written (No such file or directory); the model is" in caplog.text
    folder = tmp_path / saved.FILE
    folder.mkdir()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        saved.save(folder, model.statistics, model="m")
    assert "cannot be written" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == [saved.FILE]


def test_a_second_save_replaces_the_first(model: Tiny, sites, path: Path) -> None:
    saved.save(path, model.statistics, model="other")
    assert saved.load(path, sites, model="other") is not None
    assert len(CHOICES) == 4
