"""How much of some files the system keeps in memory for itself: the page cache, by mincore(2)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SPAN = 1 << 30  # mapped at a time; mapping reads nothing


def cached_bytes(paths: Iterable[Path]) -> int | None:
    """Of all files together. None where the system does not say: it is not Linux, or a file is
    neither ours nor writable, for which it would answer that all is there.
    """
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError, TypeError):
        return None
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    found = 0
    for path in paths:
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                if about.st_uid != os.geteuid() and not os.access(path, os.W_OK):
                    return None
                for first in range(0, about.st_size, SPAN):
                    span = min(SPAN, about.st_size - first)
                    pages = _pages(mincore, file.fileno(), first, span)
                    if pages is None:
                        return None
                    found += pages * mmap.PAGESIZE
        except OSError:
            return None
    return found


def forget(paths: Iterable[Path]) -> None:
    """Gives back what the page cache keeps of the files, from packing them for instance; what other
    processes have mapped stays. Where the system knows no such advice, nothing happens."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _pages(mincore: ctypes._NamedFuncPointer, descriptor: int, first: int, span: int) -> int | None:
    mapped = mmap.mmap(descriptor, span, access=mmap.ACCESS_READ, offset=first)
    view = np.frombuffer(mapped, np.uint8)
    told = np.zeros(-(-span // mmap.PAGESIZE), np.uint8)
    refused = mincore(view.ctypes.data, span, told.ctypes.data)
    del view
    mapped.close()
    return None if refused else int((told & 1).sum())
