"""Measurements of this machine, kept as JSON in the cache folder. Knows none of them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from elute.errors import NOTE

log = logging.getLogger(__name__)
Kept = TypeVar("Kept")


def read(file: Path, parse: Callable[[str], Kept], *, what: str) -> Kept | None:
    """None without a file, or with a line that says so where it does not hold `what`.

    parse  raises ValueError, KeyError, TypeError or AttributeError for another text
    """
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.info("%s: cannot be read (%s)", file, error.strerror)
        return None
    except UnicodeDecodeError as error:
        log.log(NOTE, "%s: not text (%s); measuring again", file, error)
        return None
    try:
        return parse(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.log(NOTE, "%s: not %s of this version (%r); measuring again", file, what, error)
        return None


def write(file: Path, told: Mapping[str, Any]) -> None:
    """Whole or not at all. Where it cannot be written a line says so: each start measures."""
    partial = file.with_name(f"{file.name}.partial-{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(told))
        os.replace(partial, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        log.info("%s: cannot be written (%s); each start measures again", file, error.strerror)
