"""A directory that appears whole or not at all. Knows nothing of what is written into it.

Work happens in a sibling "<name>.partial-<random>", locked while its writer lives; a rename
publishes it. A killed writer leaves its partial directory behind, unlocked, and the next writer
removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elute.errors import BudgetError, EluteError

log = logging.getLogger(__name__)

_FULL = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """OSErrors as one sentence: BudgetError when the disk is full, else EluteError."""
    try:
        yield
    except OSError as error:
        what = f"{out}: cannot be written ({error.strerror or error})"
        if error.errno in _FULL:
            raise BudgetError(f"{what}; free space or choose another directory") from error
        raise EluteError(f"{what}; choose another directory") from error


@contextmanager
def atomic_directory(out: Path, *, replace: bool) -> Iterator[Path]:
    """Yields an empty directory that becomes `out` when the block ends without an exception.

    The caller syncs its files; this syncs the directories. With `replace`, a directory at `out` is
    swapped for the new one in one step and then removed; without, only an empty one may be there.
    Whatever goes wrong, `out` is as it was and the partial directory is removed.

    Raises BudgetError when the disk is full, EluteError when another writer is at work on `out` or
    the file system refuses.
    """
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = _claim(out)
    try:
        yield partial
        with disk_errors(out):
            _sync_directory(partial)
            _publish(partial, out, replace=replace)
            _sync_directory(out.parent)
    finally:
        # the unfinished directory, or the one that was replaced
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _claim(out: Path) -> tuple[Path, int]:
    """-> a fresh partial directory and the descriptor that holds its lock."""
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        # Serializes claims, so that no writer sees another's directory before it is locked.
        fcntl.flock(parent, fcntl.LOCK_EX)
        for path in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
            _remove_stale(path, out)
        partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return partial, lock
    finally:
        os.close(parent)


def _remove_stale(path: Path, out: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # its writer has just published or removed it
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EluteError(
            f"{out}: another conversion is writing {path.name}; wait for it or choose another "
            f"directory"
        ) from None
    else:
        log.warning("removing %s, left by a conversion that was killed", path)
        shutil.rmtree(path)
    finally:
        os.close(descriptor)


def _publish(partial: Path, out: Path, *, replace: bool) -> None:
    try:
        os.rename(partial, out)  # POSIX: also onto an empty directory
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not replace:
            raise EluteError(
                f"{out}: another conversion finished first; use its result or force a new one"
            ) from None
        _exchange(partial, out)


def _exchange(partial: Path, out: Path) -> None:
    """Swaps the two names; in one step where the system can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(partial), os.fsencode(out)
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(out))
    log.warning("%s: this file system cannot swap directories; replacing it in two steps", out)
    old = out.with_name(f"{partial.name}-old")
    os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
