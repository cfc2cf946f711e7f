"""A checksum of every page of the weight files: made while they are written, compared when read.

docs/packed-format.md is the specification. Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import strerror
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elute import _native
from elute.errors import DeviceError, FormatError
from elute.types import U8, U32

PAGE = 4096
PORTION_PAGES = 1 << 16  # 256 MiB: what is checked between two looks at Ctrl-C and the progress


class PageSummer:
    """Sums of what is written, page by page, whatever pieces it is written in."""

    def __init__(self) -> None:
        self._sums: list[U32] = []
        self._rest = np.zeros(0, np.uint8)  # of a page that is not complete

    def add(self, values: npt.NDArray[Any]) -> None:
        """Appends the bytes of a C-contiguous array."""
        data: U8 = values.reshape(-1).view(np.uint8)
        if self._rest.size:
            head = min(PAGE - self._rest.size, data.size)
            self._rest, data = np.concatenate([self._rest, data[:head]]), data[head:]
            if self._rest.size < PAGE:
                return
            self._sums.append(_native.crc32c_pages(self._rest))
        whole = data.size // PAGE * PAGE
        self._sums.append(_native.crc32c_pages(data[:whole]))
        self._rest = data[whole:].copy()

    def sums(self) -> U32:
        """u32, one a page; what was added must be whole pages."""
        assert not self._rest.size, "the last page is not complete"
        return np.concatenate([np.zeros(0, np.uint32), *self._sums])


@dataclass(frozen=True)
class BadPage:
    """A page of a file that cannot be read (`error`, an errno, or -1 beyond the file's end) or that
    sums to `found` instead of `wanted`."""

    file: str
    page: int
    error: int
    found: int
    wanted: int

    @property
    def offset(self) -> int:
        return self.page * PAGE

    def __str__(self) -> str:
        if self.error:
            why = "the file ends before it" if self.error < 0 else strerror(self.error)
            return f"cannot be read ({why})"
        return f"CRC-32C is {self.found:08x}, wanted {self.wanted:08x}"


@dataclass(frozen=True, eq=False)
class PageSums:
    """What the pages of the weight files of a folder must sum to.

    values  u32, the files' pages one behind the other, files by name
    first   where in values each file begins
    """

    values: U32
    first: Mapping[str, int]
    n_pages: Mapping[str, int]

    @classmethod
    def parse(cls, data: bytes, sizes: Mapping[str, int], *, where: str) -> PageSums:
        """data: the file; sizes: bytes of the weight files.

        Raises FormatError unless those are whole pages and there is a sum of each.
        """
        first: dict[str, int] = {}
        total = 0
        for name in sorted(sizes):
            if sizes[name] % PAGE:
                raise FormatError(
                    f"{where}: {name} has {sizes[name]} bytes, wanted whole pages of {PAGE}; "
                    "convert the model again"
                )
            first[name] = total
            total += sizes[name] // PAGE
        if len(data) != 4 * total:
            raise FormatError(
                f"{where}: found {len(data)} bytes, wanted 4 for each of {total} pages; "
                "convert the model again"
            )
        n_pages = {name: size // PAGE for name, size in sizes.items()}
        return cls(np.frombuffer(data, "<u4").astype(np.uint32, copy=False), first, n_pages)

    def of(self, file: str) -> U32:
        begin = self.first[file]
        return self.values[begin : begin + self.n_pages[file]]

    def check(self, folder: Path, *, progress: Callable[[int, int], None]) -> None:
        """Reads all files through the page cache, where those who map them find what was checked.

        progress  called with (bytes done, bytes in all)

        Raises DeviceError for a page that cannot be read or is not what it was.
        """
        done, total = 0, self.values.size * PAGE

        def read(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            progress(done, total)

        for file in self.first:
            bad = self.bad_pages(folder, file, direct=False, done=read)
            if bad:
                raise DeviceError(
                    f"{folder / file}: page {bad[0].page} at byte {bad[0].offset}: {bad[0]}; run "
                    f"elute verify {folder} to see what is damaged, check the disk, or convert "
                    "the model again"
                )

    def bad_pages(
        self,
        folder: Path,
        file: str,
        *,
        direct: bool = True,
        done: Callable[[int], None] = lambda _n_bytes: None,
    ) -> list[BadPage]:
        """Reads the whole file, in a few MiB of memory, and returns what is wrong with it.

        direct  past the page cache; else through it, and what was read stays there
        done    called with the bytes read since its last call

        Raises DeviceError when the file cannot be opened.
        """
        bad: list[BadPage] = []
        wanted = self.of(file)
        for begin in range(0, wanted.size, PORTION_PAGES):
            part = wanted[begin : begin + PORTION_PAGES]
            try:
                found = _native.bad_pages(str(folder / file), begin, part, direct=direct)
            except RuntimeError as error:  # std::system_error
                raise DeviceError(f"{error}; check the model's files") from None
            bad += [
                BadPage(file, page, error, value, int(wanted[page])) for page, error, value in found
            ]
            done(part.size * PAGE)
        return bad
