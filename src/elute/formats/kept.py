"""Measurements, kept in small files: of this machine, as JSON in the cache folder. Knows none."""

from __future__ import annotations

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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, json.dumps(told).encode())
    except OSError as error:
        log.info("%s: cannot be written (%s); each start measures again", file, error.strerror)


def replace(file: Path, content: bytes) -> None:
    """Whole or not at all, also where the system stops. Raises OSError."""
    partial = file.with_name(f"{file.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as opened:
            opened.write(content)
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
