"""Compiled graphs of a model for a chip that is elsewhere, and the list of what to copy there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elute.errors import BudgetError, DeviceError
from elute.npu import artefacts, checks, ort
from elute.npu.device import Graph, Progress
from elute.npu.soc import Soc

FORMAT, VERSION = "elute-npu-manifest", 1


@dataclass(frozen=True)
class Compiled:
    """folder has a directory for each graph, and the manifest; made: how many were not there."""

    soc: Soc
    folder: Path
    manifest: Path
    n_graphs: int
    made: int
    n_bytes: int
    maker: Mapping[str, str]


def compile_for(
    graphs: Sequence[Graph],
    soc: Soc,
    folder: Path,
    *,
    told: Mapping[str, Any],
    progress: Progress | None = None,
) -> Compiled:
    """Graphs that are there, whole and of these versions, are kept: so an interrupted one goes on.

    folder  of all chips; what `npu.find.choose` takes
    told    what else the manifest says: of the model, and how it was cut

    Raises as ort.compile_offline; BudgetError where the manifest cannot be written.
    """
    made = ort.compile_offline(graphs, soc, folder, progress=progress)
    kept = ort.artefacts(folder, soc)
    places = [kept.find(graph) for graph in graphs]
    entries = []
    for graph, place in zip(graphs, places, strict=True):
        if place is None:
            raise DeviceError(
                f"{folder}: {graph.name} changed after it was written; run the command again"
            )
        entries.append(_entry(graph, place))
    assert places[0] is not None
    target = places[0].parent
    n_bytes = sum(size for entry in entries for size in entry["bytes"].values())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **told,
        "soc": {"name": soc.name, "part": soc.part, "model": soc.model, "htp": soc.arch},
        "maker": dict(kept.maker),
        "graphs": entries,
    }
    file = target / f"manifest-{_identity(graphs)}.json"
    _write(file, json.dumps(manifest, indent=1))
    return Compiled(soc, target, file, len(graphs), made, n_bytes, kept.maker)


def _entry(graph: Graph, place: Path) -> dict[str, Any]:
    about = json.loads((place / artefacts.ABOUT).read_text())
    return {
        "name": graph.name,
        "folder": place.name,
        "bytes": {name: (place / name).stat().st_size for name in about["files"]},
        "sha256": about["files"],
    }


def _identity(graphs: Sequence[Graph]) -> str:
    """Of one model cut in one way: others lie in the same folder."""
    told = "\n".join(checks.digest(graph) for graph in graphs)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    partial = file.with_name(f"{file.name}.partial-{secrets.token_hex(4)}")
    try:
        try:
            partial.write_text(text)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise BudgetError(
            f"{file}: cannot be written ({error.strerror}); use another --out"
        ) from None
