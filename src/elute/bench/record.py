"""Keeps results: ratios of all machines in one JSON file, absolute figures in a CSV per machine.

    FOLDER/ratios.json          how many times as fast as a rival in the same run
    FOLDER/machines/NAME.csv    tokens/s and shares of ceilings, ours and the rival's

A new figure replaces the one with the same key; both files are replaced whole. Names in them are
those of models and machines, never paths.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elute.bench.end_to_end import Speed
from elute.bench.llama_cpp import LlamaCpp
from elute.bench.machine import elute_build, machine_slug
from elute.bench.rows import DIGITS, bandwidth_share, bytes_per_token, peak_share, samples
from elute.bench.subject import Subject
from elute.errors import FormatError
from elute.formats.atomic_directory import disk_errors

RATIOS = "ratios.json"
MACHINES = "machines"
RATIO_KEY = (
    "machine", "model", "weights", "isa", "versus", "versus_weights", "test", "threads",
)  # fmt: skip
FIGURE_KEY = ("engine", "model", "weights", "isa", "test", "threads")
FIGURE_COLUMNS = (
    *FIGURE_KEY, "median_ts", "stddev_ts", "repeats", "bits_per_weight", "bytes_per_token",
    "read_gb_s", "multiply_gops", "bandwidth_share", "peak_share", "build", "date",
)  # fmt: skip

Row = Mapping[str, Any]


def record(
    folder: Path, subject: Subject, speeds: Sequence[Speed], *, isa: str, rival: LlamaCpp | None
) -> tuple[Path, ...]:
    """Merges the results of a run into the files of `folder`. -> the files that were written

    Raises FormatError for a file there that this did not write, EluteError when one cannot be
    written.
    """
    machine, date = machine_slug(), time.strftime("%Y-%m-%d", time.gmtime())
    figures = [_figure(subject, speed, isa, date) for speed in speeds]
    written = [folder / MACHINES / f"{machine}.csv"]
    if rival is not None:
        figures += [_rival_figure(subject, speed, rival, date) for speed in speeds]
        ratios = [_ratio(subject, speed, isa, rival, date, machine) for speed in speeds]
        written.append(folder / RATIOS)
        _write(written[1], _ratio_lines(_merged(_read_ratios(written[1]), ratios, RATIO_KEY)))
    _write(written[0], _figure_lines(_merged(_read_figures(written[0]), figures, FIGURE_KEY)))
    return tuple(written)


def _ratio(
    subject: Subject, speed: Speed, isa: str, rival: LlamaCpp, date: str, machine: str
) -> Row:
    assert speed.ratio is not None
    return {
        "machine": machine,
        "model": subject.short_name,
        "weights": subject.stored,
        "isa": isa,
        "versus": rival.name,
        "versus_weights": rival.stored,
        "test": speed.test.name,
        "threads": speed.n_threads,
        "ratio": round(speed.ratio, 3),
        "repeats": len(speed.seconds),
        "elute": elute_build(),
        rival.name: rival.told("build_commit"),
        "date": date,
    }


def _figure(subject: Subject, speed: Speed, isa: str, date: str) -> Row:
    found = samples(speed.test, speed.seconds)
    row = {
        "engine": "elute",
        "model": subject.short_name,
        "weights": subject.stored,
        "isa": isa,
        "test": speed.test.name,
        "threads": speed.n_threads,
        "median_ts": found["median_ts"],
        "stddev_ts": found["stddev_ts"],
        "repeats": len(speed.seconds),
        "bits_per_weight": subject.traffic.bits_per_weight,
        "bytes_per_token": bytes_per_token(subject, speed),
        "read_gb_s": speed.ceilings and speed.ceilings.read_gb_s,
        "multiply_gops": speed.ceilings and speed.ceilings.multiply_gops,
        "bandwidth_share": bandwidth_share(subject, speed),
        "peak_share": peak_share(subject, speed),
        "build": elute_build(),
        "date": date,
    }
    return _text(row)


def _rival_figure(subject: Subject, speed: Speed, rival: LlamaCpp, date: str) -> Row:
    found = samples(speed.test, speed.rival_seconds)
    row = {
        "engine": rival.name,
        "model": subject.short_name,
        "weights": rival.stored,
        "test": speed.test.name,
        "threads": speed.n_threads,
        "median_ts": found["median_ts"],
        "stddev_ts": found["stddev_ts"],
        "repeats": len(speed.rival_seconds),
        "build": rival.told("build_commit"),
        "date": date,
    }
    return _text(row)


def _text(row: Row) -> Row:
    """Every column as the CSV file holds it, so that new rows and read ones are alike."""
    return {column: _cell(row.get(column)) for column in FIGURE_COLUMNS}


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{DIGITS}f}" if isinstance(value, float) else str(value)


def _merged(old: Iterable[Row], new: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """In the order of the keys, numbers in them as numbers."""
    by_key = {tuple(str(row[name]) for name in key): row for row in (*old, *new)}
    return [by_key[k] for k in sorted(by_key, key=_natural)]


def _natural(key: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in key)


def _read_ratios(path: Path) -> list[Row]:
    text = _text_of(path)
    if text is None:
        return []
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _foreign(path, f"text that is no JSON ({error})") from None
    whole = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not whole or not all(set(RATIO_KEY) <= set(row) for row in rows):
        raise _foreign(path, f"something else than a list of objects with {', '.join(RATIO_KEY)}")
    return list(rows)


def _read_figures(path: Path) -> list[Row]:
    text = _text_of(path)
    if text is None:
        return []
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != FIGURE_COLUMNS:
        raise _foreign(path, f"other columns than {', '.join(FIGURE_COLUMNS)}")
    return list(reader)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _foreign(path, f"a file that cannot be read ({error})") from None


def _foreign(path: Path, found: str) -> FormatError:
    return FormatError(
        f"{path}: found {found}; move it away, or choose another folder to record in"
    )


def _ratio_lines(rows: Iterable[Row]) -> str:
    """A row a line, so that changes can be read."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def _figure_lines(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, FIGURE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _write(path: Path, text: str) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.write_text(text)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
