"""What the two kinds of download share: how they report progress and how they fail."""

from __future__ import annotations

import errno
from collections.abc import Callable

from elute.errors import BudgetError, EluteError

# (stage, bytes done, bytes in all); 0 in all while the size is not known
Progress = Callable[[str, int, int], None]


def first_line(error: BaseException) -> str:
    """The client's own words, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def disk_error(error: OSError, where: str) -> EluteError:
    """BudgetError for a full disk, EluteError for any other failure of the system."""
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) or error.errno in (
        errno.EROFS,
        errno.ENOENT,
    ):
        return EluteError(
            f"{where}: {error.filename} cannot be written ({error.strerror}); set ELUTE_HOME and "
            "HF_HOME to folders that can"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BudgetError(
            f"{where}: the disk is full ({error.filename or 'while writing'}); free some space, or "
            f"set ELUTE_HOME and HF_HOME to folders on another disk"
        )
    return EluteError(f"{where}: the download failed ({first_line(error)}); run the command again")
