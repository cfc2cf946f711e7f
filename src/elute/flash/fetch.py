"""Reads pieces of a model's files on demand, through buffers of a fixed size, beside other work.

Knows files and bytes, no matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elute import _native
from elute.errors import DeviceError
from elute.flash.weights import pages
from elute.formats.packed import PackedModel
from elute.formats.page_sums import PageSums
from elute.types import U8

DEPTH = 16  # requests in flight
REQUEST_BYTES = 256 << 10
HALF_BYTES = 1 << 20  # half of a buffer


@dataclass(frozen=True)
class Run:
    """Pages of a file that are wanted, and where in the half of a buffer they go."""

    file: str
    offset: int
    n_bytes: int
    at: int


class Fetcher:
    """Of one model. For several threads.

    half_bytes  of a buffer: all runs of a step must fit

    Raises DeviceError for files that are gone or a reader that the system refuses.
    """

    def __init__(
        self,
        packed: PackedModel,
        *,
        reader: str = "auto",
        depth: int = DEPTH,
        request_bytes: int = REQUEST_BYTES,
        gap_bytes: int = 0,
        direct: bool = True,
        half_bytes: int = HALF_BYTES,
        sums: PageSums | None = None,
    ) -> None:
        self.packed = packed
        self.half_bytes, self.gap_bytes = half_bytes, gap_bytes
        files = list(packed.shards)
        self._index = {file: i for i, file in enumerate(files)}
        self._buffers: list[U8] = []  # that nobody has
        self._lock = threading.Lock()
        try:
            self._native = _native.Fetcher(
                [str(packed.path / file) for file in files],
                reader,
                depth,
                request_bytes,
                direct,
                None if sums is None else sums.values,
                [] if sums is None else [sums.first[file] for file in files],
            )
        except RuntimeError as error:  # std::system_error: a file that is gone, a reader refused
            raise DeviceError(f"flash: {error}; check the model's files, or the reader") from None

    @property
    def reader(self) -> str:
        return self._native.reader

    @property
    def direct(self) -> bool:
        return self._native.direct

    def figures(self) -> tuple[int, int]:
        """(bytes, requests) asked for so far."""
        return self._native.figures()

    def begin(self, steps: Sequence[Sequence[Run]]) -> Reading:
        """Does not wait. Each step is what one half of a buffer takes at a time."""
        return Reading(self, steps)

    def fetch(self, runs: Sequence[Run], half: U8) -> _native.Fetch:
        pieces = [(self._index[run.file], run.offset, run.n_bytes, run.at) for run in runs]
        try:
            return self._native.begin(pieces, half)
        except RuntimeError as error:
            raise DeviceError(str(error)) from None

    def take(self) -> U8:
        with self._lock:
            if self._buffers:
                return self._buffers.pop()
        return pages(2 * self.half_bytes)

    def give_back(self, buffer: U8) -> None:
        with self._lock:
            self._buffers.append(buffer)


class Reading:
    """Steps on their way: two of them at a time, so that one is used while the next is read.

    read_bytes  of all of them
    """

    def __init__(self, fetcher: Fetcher, steps: Sequence[Sequence[Run]]) -> None:
        self.read_bytes = sum(run.n_bytes for step in steps for run in step)
        self._fetcher, self._steps = fetcher, steps
        self._fetches: list[_native.Fetch | None] = [None, None]
        self._buffer: U8 | None = fetcher.take()
        for i in range(min(2, len(steps))):
            self._begin(i)

    def halves(self) -> Iterator[U8]:
        """Once: the half of the buffer where each step lies, until the next one is asked for.

        Raises DeviceError when it cannot be read.
        """
        for i in range(len(self._steps)):
            fetch = self._fetches[i % 2]
            assert fetch is not None
            try:
                fetch.wait()
            except RuntimeError as error:
                raise DeviceError(str(error)) from None
            yield self._half(i)
            if i + 2 < len(self._steps):
                self._begin(i + 2)
        self.close()

    def close(self) -> None:
        """Waits for what is on its way. Twice is fine."""
        self._fetches = [None, None]  # when they are gone nothing writes to the buffer
        if self._buffer is not None:
            self._fetcher.give_back(self._buffer)
            self._buffer = None

    def __del__(self) -> None:
        if hasattr(self, "_buffer"):
            self.close()

    def _half(self, i: int) -> U8:
        assert self._buffer is not None
        size = self._fetcher.half_bytes
        return self._buffer[:size] if i % 2 == 0 else self._buffer[size : 2 * size]

    def _begin(self, i: int) -> None:
        self._fetches[i % 2] = self._fetcher.fetch(self._steps[i], self._half(i))
