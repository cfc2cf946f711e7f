"""Checks every byte of a packed folder against what the manifest and the page sums say of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from elute.errors import EluteError
from elute.formats import packed_layout as layout
from elute.formats.packed import FileRecord, Manifest, PackedModel, read_page_sums
from elute.formats.page_sums import BadPage
from elute.formats.safetensors import SafetensorsFile

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Verdict:
    """What was found.

    faults    a sentence each, for people
    n_bytes   that were read
    by_page   whether the weights were checked page by page; else file by file
    """

    faults: tuple[str, ...]
    n_bytes: int
    by_page: bool


def verify(
    path: Path, *, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Verdict:
    """Reads all files, in a few MiB of memory and past the page cache.

    Raises FormatError where the manifest itself, or a file's size, is not as it must be.
    """
    manifest = Manifest.read(path)
    files, shards = manifest.files, {record.file for record in manifest.records.values()}
    by_page = layout.PAGE_SUMS in files
    total = sum(record.size for record in files.values())
    done = 0

    def read(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(done, total)

    faults: list[str] = []
    damaged: set[str] = set()
    for name, record in files.items():
        if by_page and name in shards:
            continue
        fault = _wrong_digest(path / name, record, read)
        if fault is not None:
            faults.append(fault)
            damaged.add(name)
    if by_page and layout.PAGE_SUMS not in damaged:
        sums = read_page_sums(path, files, shards)
        for name in sorted(shards):
            bad = sums.bad_pages(path, name, done=read)
            if bad:
                faults += _sentences(path, bad)
    if not faults:
        PackedModel.open(path)  # headers against the manifest
    return Verdict(tuple(faults), done, by_page)


def _wrong_digest(file: Path, record: FileRecord, read: Callable[[int], None]) -> str | None:
    digest = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(CHUNK_BYTES):
                digest.update(chunk)
                read(len(chunk))
                if record.size > CHUNK_BYTES and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror})"
    if digest.hexdigest() == record.sha256:
        return None
    return f"{file}: sha256 is {digest.hexdigest()}, wanted {record.sha256}"


def _sentences(path: Path, bad: list[BadPage]) -> list[str]:
    """A sentence for each tensor that has bad pages, about the first of them."""
    file = bad[0].file
    tensors = _tensors(path / file)
    first: dict[str, BadPage] = {}
    count: dict[str, int] = {}
    for page in bad:
        name = next(
            (name for name, (begin, end) in tensors.items() if begin <= page.offset < end),
            "the header" if tensors else "an unknown tensor",
        )
        first.setdefault(name, page)
        count[name] = count.get(name, 0) + 1
    return [
        f"{path / file}: page {page.page} at byte {page.offset}, of {name}: {page}"
        + (f"; {count[name]} of its pages are wrong" if count[name] > 1 else "")
        for name, page in first.items()
    ]


def _tensors(file: Path) -> Mapping[str, tuple[int, int]]:
    """First byte of each and the one behind its last; none where the header cannot be read."""
    try:
        entries = SafetensorsFile.open(file).entries
    except EluteError:
        return {}
    return {name: (entry.offset, entry.offset + entry.n_bytes) for name, entry in entries.items()}
