"""Compiled graphs on disk, with a maker that compiles nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from products import graph

from elute.npu.artefacts import Artefacts

OF = graph(4, 64, 8)


def kept(folder: Path, *, target: str = "chip", version: str = "1.0") -> Artefacts:
    return Artefacts(folder, target=target, maker={"compiler": version})


def write(place: Path) -> None:
    (place / "a.bin").write_bytes(bytes(range(256)))
    (place / "b.bin").write_bytes(b"b")


def test_what_was_made_is_found_for_the_same_graph_target_and_maker(tmp_path: Path) -> None:
    place = kept(tmp_path).make(OF, write)
    assert kept(tmp_path).find(OF) == place
    assert json.loads((place / "about.json").read_text())["name"] == OF.name
    assert kept(tmp_path).find(graph(5, 64, 8)) is None  # other rows
    assert kept(tmp_path).find(graph(4, 64, 8, seed=1)) is None  # other weights
    assert kept(tmp_path, target="other").find(OF) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chip"]


def about(place: Path, **changes: object) -> None:
    file = place / "about.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def flip(place: Path) -> None:
    data = bytearray((place / "a.bin").read_bytes())
    data[100] ^= 1
    (place / "a.bin").write_bytes(data)


CHANGED = "found files changed since they were written"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, CHANGED),
        (lambda place: (place / "a.bin").write_bytes(b""), CHANGED),
        (lambda place: (place / "b.bin").write_bytes(b"bb"), CHANGED),
        (lambda place: (place / "a.bin").unlink(), "found files missing"),
        (lambda place: (place / "about.json").unlink(), "found no about.json"),
        (lambda place: (place / "about.json").write_text("{"), "cannot be read (Expecting"),
        (lambda place: (place / "about.json").write_text("[]"), "cannot be read (TypeError"),
        (lambda place: (place / "about.json").write_bytes(b"\xff"), "cannot be read ('utf-8'"),
        (lambda place: about(place, files={}), "found no files"),
        (lambda place: about(place, files={"../x": ""}), "found the file name ../x"),
        (lambda place: about(place, version=2), "found elute-npu-graph 2, wanted elute-npu-graph"),
        (lambda place: about(place, graph="0"), "found the name of another graph"),
        (
            lambda place: about(place, maker={"compiler": "0.9"}),
            "found those of compiler 0.9, wanted compiler 1.0, form 1",
        ),
    ],
)
def test_what_is_damaged_foreign_or_old_is_not_used_and_said_once(
    tmp_path: Path, caplog, damage, reason: str
) -> None:
    caplog.set_level(logging.INFO)
    other = graph(4, 64, 16)
    for each in (OF, other):
        damage(kept(tmp_path).make(each, write))
    again = kept(tmp_path)
    assert again.find(OF) is again.find(other) is None
    again.say_stale()
    again.say_stale()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path}: 2 compiled graphs are not used ({reason}")
    assert said.endswith("); compiling again")
    place = again.make(OF, write)
    assert kept(tmp_path).find(OF) == place
    assert len(list(place.parent.iterdir())) == 2  # nothing is left beside


def test_a_maker_of_another_version_is_said_and_its_graphs_replaced(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    place = kept(tmp_path).make(OF, write)
    newer = kept(tmp_path, version="1.1")
    assert newer.find(OF) is None
    newer.say_stale()
    assert "found those of compiler 1.0, form 1, wanted compiler 1.1, form 1" in caplog.text
    assert newer.make(OF, write) == place
    assert kept(tmp_path).find(OF) is None


def test_a_maker_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    kept(tmp_path).make(OF, write)

    def fail(place: Path) -> None:
        write(place)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        kept(tmp_path).make(OF, fail)
    assert kept(tmp_path).find(OF) is not None
    assert len(list((tmp_path / "chip").iterdir())) == 1
