"""Compiled graphs on disk: found again only when they are whole and of the same maker.

One directory a graph, named by what was compiled and for what; in it the maker's files and
about.json, which says who made them and the sha256 of each. Knows no maker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elute.errors import NOTE
from elute.formats.atomic_directory import atomic_directory
from elute.npu import checks
from elute.npu.device import Device, Graph, Progress
from elute.npu.qdq import FORM

log = logging.getLogger(__name__)

FORMAT, VERSION = "elute-npu-graph", 1
ABOUT = "about.json"


class Artefacts:
    """The compiled graphs in a folder.

    target  provider, and chip where one is named: those of another target lie beside these
    maker   versions of what compiles: those of another maker are replaced
    """

    def __init__(self, folder: Path, *, target: str, maker: Mapping[str, str]) -> None:
        self._folder, self._target = folder, target
        self.maker = {**maker, "form": str(FORM)}
        self._stale: Counter[str] = Counter()

    def find(self, graph: Graph) -> Path | None:
        """The directory of a graph whose files are as they were written; None without, or with a
        reason that `say_stale` tells."""
        place = self._place(graph)
        try:
            told = json.loads((place / ABOUT).read_text())
        except (FileNotFoundError, NotADirectoryError):
            if place.exists():
                self._stale[f"found no {ABOUT}"] += 1
            return None
        except (OSError, ValueError) as error:
            self._stale[f"cannot be read ({error})"] += 1
            return None
        try:
            wrong = self._wrong(told, place, graph)
        except (KeyError, TypeError, AttributeError, OSError) as error:
            wrong = f"cannot be read ({error!r})"
        if wrong is None:
            return place
        self._stale[wrong] += 1
        return None

    def _wrong(self, told: Any, place: Path, graph: Graph) -> str | None:
        if (told["format"], told["version"]) != (FORMAT, VERSION):
            return f"found {told['format']} {told['version']}, wanted {FORMAT} {VERSION}"
        if told["graph"] != checks.digest(graph) or told["target"] != self._target:
            return "found the name of another graph"
        if told["maker"] != self.maker:
            return f"found those of {_words(told['maker'])}, wanted {_words(self.maker)}"
        files: dict[str, str] = told["files"]
        for name, digest in files.items():
            if Path(name).name != name:
                return f"found the file name {name}"
            try:
                found = file_digest(place / name)
            except FileNotFoundError:
                return "found files missing"
            if found != digest:
                return "found files changed since they were written"
        return None if files else "found no files"

    def say_stale(self) -> None:
        """Once for all that was looked for since the last time."""
        if self._stale:
            reason, _ = self._stale.most_common(1)[0]
            log.log(
                NOTE,
                "%s: %d compiled graphs are not used (%s); compiling again",
                self._folder,
                self._stale.total(),
                reason,
            )
        self._stale.clear()

    def make(self, graph: Graph, write: Callable[[Path], None]) -> Path:
        """-> the directory of the graph, made by `write` from an empty one, whole or not at all.

        Raises BudgetError on a full disk, EluteError where it cannot be written.
        """
        place = self._place(graph)
        with atomic_directory(place, replace=True) as partial:
            write(partial)
            files = {file.name: file_digest(file) for file in sorted(partial.iterdir())}
            about = {
                "format": FORMAT,
                "version": VERSION,
                "name": graph.name,
                "graph": checks.digest(graph),
                "target": self._target,
                "maker": self.maker,
                "files": files,
            }
            (partial / ABOUT).write_text(json.dumps(about, indent=1))
            for file in partial.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        return place

    def _place(self, graph: Graph) -> Path:
        return self._folder / self._target / checks.digest(graph)[:32]


def file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _words(maker: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in maker.items())


def load_graphs(
    device: Device,
    graphs: Sequence[Graph],
    *,
    loaded: dict[str, Graph],
    artefacts: Artefacts | None,
    compile_one: Callable[[Graph, Path | None], None],
    progress: Progress | None,
) -> None:
    """Device.load of one that compiles graph by graph: adds to `loaded`, tests one of each kind.

    compile_one  of a graph, or what was kept of it in a folder
    """
    checks.accept(graphs, device.profile, loaded=loaded)
    found = [None if artefacts is None else artefacts.find(graph) for graph in graphs]
    if artefacts is not None:
        artefacts.say_stale()
    try:
        for done, (graph, place) in enumerate(zip(graphs, found, strict=True), 1):
            compile_one(graph, place)
            loaded[graph.name] = graph
            if progress is not None:
                progress("npu: compile", done, len(graphs))
        checks.self_test(device, graphs)
    except BaseException:
        device.close()  # nothing runs on a device that failed
        raise
