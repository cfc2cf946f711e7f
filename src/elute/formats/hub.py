"""Fetches models from a Hugging Face hub into the cache that all hub programs share.

The client resumes a broken transfer while it runs, and keeps complete files when it is started
again; without a network it answers from the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elute.errors import EluteError, FormatError, UnsupportedError
from elute.formats.download import Progress, disk_error, first_line

# What a folder needs. Patterns match whole paths and * crosses slashes, so subfolders (onnx/,
# original/) and second copies of the weights are refused again.
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
HUB_LEFT_OUT = ("*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "consolidated*")


@dataclass(frozen=True)
class Fetched:
    """A file or folder in the hub cache, and the commit that it belongs to."""

    path: Path
    commit: str


def fetch_file(
    repo: str,
    file: str,
    *,
    model: str,
    revision: str | None,
    hub_cache: Path | None,
    endpoint: str | None,
    progress: Progress | None,
) -> Fetched:
    """One file of a repository; `model` is what messages call it. Raises as fetch_folder."""
    from huggingface_hub import hf_hub_download

    if ".." in file.split("/"):
        raise FormatError(
            f"{model}: found .. in the file name, wanted a file of the repository"
            "; name it without .."
        )
    with hub_errors(model, file):
        path = Path(
            hf_hub_download(
                repo,
                file,
                revision=revision,
                cache_dir=hub_cache,
                endpoint=endpoint,
                library_name="elute",
                tqdm_class=_bar_class(progress, f"download {repo}"),
            )
        )
    return Fetched(path=path, commit=path.parents[file.count("/")].name)


def fetch_folder(
    repo: str,
    *,
    model: str,
    revision: str | None,
    hub_cache: Path | None,
    endpoint: str | None,
    progress: Progress | None,
) -> Fetched:
    """The weights, config and tokenizer of a repository.

    Raises UnsupportedError when it holds no safetensors, BudgetError for a full disk, FormatError
    for a name that is none, EluteError for every other failure.
    """
    from huggingface_hub import HfApi, snapshot_download

    with hub_errors(model, None):
        path = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=hub_cache,
                endpoint=endpoint,
                library_name="elute",
                tqdm_class=_bar_class(progress, f"download {repo}"),
                allow_patterns=list(HUB_FILES),
                ignore_patterns=list(HUB_LEFT_OUT),
            )
        )
        if not any(path.glob("*.safetensors")):
            listed = HfApi(endpoint=endpoint).list_repo_files(repo, revision=revision)
            raise UnsupportedError(no_weights(model, listed))
    return Fetched(path=path, commit=path.name)


def cached(
    repo: str, file: str | None, *, revision: str | None, hub_cache: Path | None
) -> Fetched | None:
    """A file, or a folder with all its weights, in the hub cache; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    name = "config.json" if file is None else file
    found = try_to_load_from_cache(repo, name, cache_dir=hub_cache, revision=revision)
    if not isinstance(found, str):
        return None
    snapshot = Path(found).parents[name.count("/")]
    if file is None and not _has_weights(snapshot):
        return None
    return Fetched(path=snapshot if file is None else Path(found), commit=snapshot.name)


def _has_weights(folder: Path) -> bool:
    from elute.formats.hf_folder import INDEX_NAME, read_json_object

    index = folder / INDEX_NAME
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    named = read_json_object(index).get("weight_map")
    shards = set(named.values()) if isinstance(named, dict) else set()
    return bool(shards) and all((folder / str(shard)).is_file() for shard in shards)


def no_weights(model: str, listed: list[str]) -> str:
    ggufs = sorted(name for name in listed if name.endswith(".gguf"))
    if ggufs:
        shown = ", ".join(ggufs[:8]) + (", ..." if len(ggufs) > 8 else "")
        return (
            f"{model}: found {len(ggufs)} GGUF files and no safetensors; name one of them, as in "
            f"{model}:{ggufs[0]} (there are {shown})"
        )
    return f"{model}: found no safetensors among {len(listed)} files, wanted a model in safetensors"


def _bar_class(progress: Progress | None, stage: str) -> type[Any] | None:
    """A progress bar class that draws nothing and reports bytes.

    None, for the client's own bars, without `progress` on a terminal. (Elsewhere they must be
    silenced: huggingface_hub 2.4 draws the bar that counts files into any pipe.)

    The client makes several bars for one download (received, written, files). The ones of bytes
    count the same file set, so the furthest of them is reported.
    """
    if progress is None and sys.stderr.isatty():
        return None
    from huggingface_hub.utils.tqdm import tqdm

    seen: list[Any] = []

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            counts_bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
            if counts_bytes:
                seen.append(self)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0  # a disabled bar does not count by itself
            if progress is not None and self in seen:
                total = max(int(bar.total or 0) for bar in seen)
                progress(stage, max(int(bar.n) for bar in seen), total)

        def __eq__(self, other: object) -> bool:
            return self is other

        def __hash__(self) -> int:
            return id(self)

    return ReportingBar


@contextmanager
def hub_errors(model: str, file: str | None) -> Iterator[None]:
    """Every failure of the hub client as one sentence."""
    from huggingface_hub import errors
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The root of the HTTP library's errors, whichever library this version of the client uses.
    http_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        yield
    except GatedRepoError:
        raise EluteError(
            f"{model}: this repository is gated; accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise EluteError(
            f"{model}: the hub has no such repository, or it is private; check the name, or set "
            f"HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise EluteError(f"{model}: the repository has no such revision; check its name") from None
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error.__context__
        reason = f" ({first_line(cause)})" if cause is not None else ""
        raise EluteError(
            f"{model}: is not whole in the local cache, and the hub could not be reached{reason}; "
            f"connect to the network, or name a local path"
        ) from None
    except EntryNotFoundError:
        raise EluteError(f"{model}: the repository has no file {file}; check its name") from None
    except HfHubHTTPError as error:
        raise EluteError(
            f"{model}: the hub answered with status {error.response.status_code}; try again later, "
            f"or name a local path"
        ) from None
    except HFValidationError as error:
        raise FormatError(
            f"{model}: is no repository name ({first_line(error)}); check the name"
        ) from None
    except http_error as error:
        raise EluteError(
            f"{model}: the download broke off ({first_line(error)}); run the command again, files "
            f"that are complete are kept"
        ) from None
    except OSError as error:
        raise disk_error(error, model) from None
