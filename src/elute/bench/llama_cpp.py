"""llama.cpp as the rival of a benchmark: its llama-bench, or else the llama-cpp-python library.

Each run is a process of its own, so that no thread, buffer or crash of the rival is in ours. What
it prints is checked against what was asked for. Loading is not in the time that llama-bench tells.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elute.bench.end_to_end import SpeedTest
from elute.errors import EluteError, FormatError, UnsupportedError

PROGRAM = "llama-bench"
PYTHON_PACKAGE = "llama_cpp"
STAND_IN = (sys.executable, "-m", "elute.bench.llama_cpp_python")  # prints rows as llama-bench
SHOWN_CHARACTERS = 200
CPU_BACKENDS = {"CPU", "BLAS"}
NS = 1e9


def find_llama_bench(given: Path | None = None) -> tuple[str, ...]:
    """-> the start of a command line: the program given, that on PATH, or llama-cpp-python's.

    Raises UnsupportedError when there is none.
    """
    if given is not None:
        found = shutil.which(given if given.parent != Path() else Path() / given)
        if found is None:
            raise UnsupportedError(
                f"{given}: is no program that can be run; give the path of {PROGRAM}"
            )
        return (str(Path(found).absolute()),)
    on_path = shutil.which(PROGRAM)
    if on_path is not None:
        return (on_path,)
    if importlib.util.find_spec(PYTHON_PACKAGE) is not None:
        return STAND_IN
    raise UnsupportedError(
        f"versus: found neither {PROGRAM} on PATH nor llama-cpp-python, wanted one of them; "
        "install llama.cpp, give --llama-bench FILE, or pip install llama-cpp-python"
    )


class LlamaCpp:
    """Runs one test of a GGUF file a call; remembers the row of each test's first run.

    command    what find_llama_bench found
    timeout_s  for one run, loading and llama-bench's own warm-up included
    warm_up    whether llama-bench runs a test once before it is timed
    """

    name = "llama.cpp"

    def __init__(
        self,
        command: Sequence[str],
        gguf: Path,
        *,
        timeout_s: float,
        warm_up: bool = True,
    ) -> None:
        self._command = tuple(command)
        self._gguf = gguf
        self.model_bytes = gguf.stat().st_size
        self._timeout_s = timeout_s
        self._warm_up = warm_up
        self.rows: dict[tuple[SpeedTest, int], Mapping[str, Any]] = {}

    def __call__(self, test: SpeedTest, n_threads: int) -> float:
        """-> seconds of one run.

        Raises EluteError when the program fails or takes longer than timeout_s, FormatError when it
        answers something else than one row of this test.
        """
        row = self._checked(self._answer(test, n_threads), test, n_threads)
        self.rows.setdefault((test, n_threads), row)
        return float(row["samples_ns"][0]) / NS

    def told(self, key: str) -> str:
        """What the rows say of the program or the model: build_commit, backends, model_type."""
        return str(next(iter(self.rows.values())).get(key, "unknown"))

    @property
    def on_cpu(self) -> bool:
        """Whether the program has no other device that it could have used."""
        return set(self.told("backends").split(",")) <= CPU_BACKENDS

    @property
    def stored(self) -> str:
        """The file type, such as Q4_0: what follows family and size in "llama 256M Q4_0"."""
        model_type = self.told("model_type")
        return model_type.split(maxsplit=2)[-1].partition(" - ")[0]

    def _answer(self, test: SpeedTest, n_threads: int) -> str:
        arguments = [
            *("-m", str(self._gguf)),
            *("-p", str(test.n_prompt)),
            *("-n", str(test.n_gen)),
            *(("-d", str(test.n_depth)) if test.n_depth else ()),  # older ones have no -d
            *("-t", str(n_threads)),
            *("-r", "1"),
            *("-ngl", "0"),  # a build for graphics cards would move the layers there
            *("-o", "json"),
            *(() if self._warm_up else ("--no-warmup",)),
        ]
        program = self._command[0]
        try:
            done = subprocess.run(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise EluteError(
                f"{program}: {test.name} with {n_threads} threads did not end within "
                f"{self._timeout_s:g} s; use a longer --timeout or a smaller test"
            ) from None
        except OSError as error:
            raise EluteError(
                f"{program}: cannot be run ({error.strerror}); give another --llama-bench"
            ) from None
        if done.returncode:
            raise EluteError(
                f"{program}: ended with exit code {done.returncode} at {test.name} of {self._gguf} "
                f"({_last_line(done.stderr)}); run it by hand to see more, or give another "
                "--llama-bench"
            )
        return done.stdout

    def _checked(self, answer: str, test: SpeedTest, n_threads: int) -> Mapping[str, Any]:
        try:
            rows = json.loads(answer)
        except (ValueError, RecursionError):
            raise self._unexpected(_last_line(answer), "JSON") from None
        if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
            raise self._unexpected(_last_line(answer), "a list of one object")
        row = rows[0]
        for key, wanted in (
            ("n_prompt", test.n_prompt),
            ("n_gen", test.n_gen),
            ("n_depth", test.n_depth),
            ("n_threads", n_threads),
        ):
            if row.get(key, 0) != wanted:  # n_depth is missing in older ones
                raise self._unexpected(f"{key} {row.get(key)!r}", str(wanted))
        samples = row.get("samples_ns")
        if not _is_one_time(samples):
            raise self._unexpected(f"samples_ns {samples!r}", "a list of one time above 0")
        return row

    def _unexpected(self, found: str, wanted: str) -> FormatError:
        return FormatError(
            f"{self._command[0]}: answered {found[:SHOWN_CHARACTERS]}, wanted {wanted} as "
            f"`{PROGRAM} -o json` prints; give a llama-bench of llama.cpp"
        )


def _is_one_time(samples: object) -> bool:
    return (
        isinstance(samples, list)
        and len(samples) == 1
        and isinstance(samples[0], int | float)
        and not isinstance(samples[0], bool)
        and 0 < samples[0] < float("inf")
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-SHOWN_CHARACTERS:] if lines else "nothing"
