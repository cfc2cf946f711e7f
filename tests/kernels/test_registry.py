"""The choice between lookup and multiply: the fit, the file that keeps it, and what breaks it."""

import json
import logging

import pytest

from elute import _native
from elute.errors import DeviceError, NoHomeError
from elute.kernels import registry
from elute.kernels.registry import RACE_ROWS, Kernel, choose, winning_rows

ISA = _native.best_isa()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The cache file of a machine that has measured nothing yet."""
    registry._race.cache_clear()
    monkeypatch.setattr(registry, "cache_dir", lambda: tmp_path / "home")
    return tmp_path / "home" / "kernels.json"


@pytest.fixture
def races(monkeypatch):
    """The bit widths that raced, in order; the races are quick ones."""
    ran = []

    def race(isa, bits, rows, budget_s):
        ran.append(bits)
        return original(isa, bits, rows, 0.0)

    original = _native.race_seconds
    monkeypatch.setattr(_native, "race_seconds", race)
    return ran


def curve(*ratios):
    return ratios + (2.0,) * (len(RACE_ROWS) - len(ratios))


@pytest.mark.parametrize(
    ("ratios", "rows"),
    [
        (curve(0.4, 0.7, 0.9, 1.1), 3),
        (curve(1.1), 0),
        ((0.9,) * len(RACE_ROWS), 16),
        (curve(0.4, 0.7, 1.04, 0.9, 1.3), 4),  # 3 and 4 are averaged to 0.97
        (curve(0.4, 0.7, 1.3, 0.9, 1.4), 2),  # to 1.08
        (curve(0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 0.95, 1.2), 10),
        (curve(1.0), 0),  # a tie goes to multiply, which wants no tables
    ],
)
def test_rows_are_where_the_rising_curve_crosses_one(ratios, rows):
    assert winning_rows(ratios) == rows


def test_a_race_times_both_kernels_at_every_row_count():
    seconds = _native.race_seconds(ISA, 4, [1, 3], 0.0)
    assert seconds.shape == (5, 2, 2)
    assert (seconds > 0).all()
    assert len(_native.race_seconds(ISA, 4, [1], 0.2)) > 5
    for bits, rows in ((0, [1]), (9, [1]), (4, []), (4, [0]), (4, [1025])):
        with pytest.raises(ValueError, match="wanted bits of 1 to 8, rows of 1 to 1024"):
            _native.race_seconds(ISA, bits, rows, 0.0)


def test_a_width_races_once_and_is_read_after(file, races):
    first = choose(ISA, [4, 2])
    assert races == [2, 4]
    registry._race.cache_clear()
    assert choose(ISA, [2, 4]) == first
    assert choose(ISA, [4, 8])[4] == first[4]
    assert races == [2, 4, 8]
    registry._race.cache_clear()
    assert choose(ISA, [2, 4, 8]).keys() == {2, 4, 8}
    assert races == [2, 4, 8]
    assert first[4].lookup_rows == winning_rows(first[4].ratios)
    assert first[4].reason.startswith("measured: ")
    assert [entry.name for entry in file.parent.iterdir()] == ["kernels.json"]


def test_a_forced_kernel_measures_nothing(file, races):
    looked_up, multiplied = choose(ISA, [3], "lookup")[3], choose(ISA, [3], Kernel.MULTIPLY)[3]
    assert (looked_up.one_row, looked_up.most_lookup_rows) == (Kernel.LOOKUP, None)
    assert (multiplied.one_row, multiplied.most_lookup_rows) == (Kernel.MULTIPLY, 0)
    assert looked_up.reason == multiplied.reason == "forced"
    assert races == []
    assert not file.parent.exists()
    with pytest.raises(DeviceError, match="kernel: found 'gemm', wanted one of auto, lookup, mul"):
        choose(ISA, [3], "gemm")


def test_emulated_instructions_are_not_timed(file, races):
    if not _native.emulates_avx512:
        pytest.skip("this build does not emulate AVX-512")
    choice = choose("avx512", [4])[4]
    assert (choice.lookup_rows, choice.reason) == (3, "not measured: emulated instructions")
    assert races == []


BROKEN = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no text": lambda text: "\udcff",
    "a list": lambda text: "[1, 2]",
    "another version": lambda text: text.replace('"version": 1', '"version": 2'),
    "another format": lambda text: text.replace("elute-kernel-race", "kernels"),
    "other rows": lambda text: text.replace('"rows": [1, ', '"rows": [2, '),
    "a ratio too few": lambda text: changed(text, lambda of: of.pop()),
    "a ratio of 0": lambda text: changed(text, lambda of: of.__setitem__(0, 0)),
    "a ratio that is none": lambda text: changed(text, lambda of: of.__setitem__(0, "fast")),
    "an unknown key": lambda text: text.replace('"layout"', '"luck"'),
}


def changed(text, change):
    told = json.loads(text)
    change(told["machines"][0]["ratios"]["4"])
    return json.dumps(told)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_told_of_and_replaced(file, races, caplog, broken):
    choose(ISA, [4])
    whole = json.loads(file.read_text())
    text = BROKEN[broken](file.read_text())
    file.write_bytes(text.encode(errors="surrogateescape"))
    registry._race.cache_clear()
    with caplog.at_level(logging.INFO, "elute"):
        choose(ISA, [4])
    lines = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
    assert len(lines) == 1
    assert ("not text" if broken == "no text" else "not kernel races of this") in lines[0]
    assert races == [4, 4]
    again = json.loads(file.read_text())
    assert again["machines"][0].keys() == whole["machines"][0].keys()


def test_what_another_machine_or_build_found_is_not_taken(file, races):
    choose(ISA, [4])
    told = json.loads(file.read_text())
    entry = told["machines"][0]
    told["machines"] = [entry | {"cpu": "another"}, entry | {"build": "older"}]
    file.write_text(json.dumps(told))
    registry._race.cache_clear()
    choose(ISA, [4])
    assert races == [4, 4]
    machines = json.loads(file.read_text())["machines"]
    assert [m["cpu"] for m in machines] == ["another", entry["cpu"]]
    assert machines[1]["build"] == entry["build"]


@pytest.mark.parametrize("fault", ["a file in the way", "no home"])
def test_where_nothing_can_be_kept_a_process_measures_once(file, races, caplog, monkeypatch, fault):
    def nowhere():
        raise NoHomeError("cache: found no home folder")

    if fault == "no home":
        monkeypatch.setattr(registry, "cache_dir", nowhere)
        assert registry.cache_file() is None
    else:
        file.parent.write_text("")
    with caplog.at_level(logging.INFO, "elute"):
        first = choose(ISA, [4])
        assert choose(ISA, [4]) == first
    assert races == [4]
    lines = [r for r in caplog.records if r.getMessage().endswith("each start measures again")]
    assert lines
    told = [r.levelno for r in caplog.records if not r.getMessage().startswith("measuring")]
    assert set(told) == {logging.INFO}
    if fault == "a file in the way":
        assert file.parent.read_text() == ""
