"""What a run under a budget of memory was foretold and what it took, side by side."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elute.api import Model
    from elute.bench.budget import Prediction
    from elute.runtime.engine import Chunk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mark:
    """What there was at one moment."""

    tokens: int
    at_s: float
    read_bytes: int
    waited_s: float


@dataclass(frozen=True)
class Measured:
    """Of the tokens of all answers after each one's first piece; None where there were none.

    page_cache_bytes  that the system keeps of the model's files; None where it does not say
    """

    tok_s: float | None
    read_bytes_per_token: float | None
    waited_s_per_token: float | None
    resident_bytes: int
    page_cache_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        def rounded(value: float | None, digits: int) -> float | None:
            return None if value is None else round(value, digits)

        return {
            "tok_s": rounded(self.tok_s, 3),
            "read_bytes_per_token": rounded(self.read_bytes_per_token, 0),
            "waited_s_per_token": rounded(self.waited_s_per_token, 5),
            "resident_bytes": self.resident_bytes,
            "page_cache_bytes": self.page_cache_bytes,
        }


class MemoryReport:
    """Follows the answers of a model that was loaded with a budget."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._first: Mark | None = None  # of the answer that runs
        self._last: Mark | None = None
        self._spans: list[tuple[Mark, Mark]] = []
        self._tokens = 0

    def begin(self) -> None:
        """An answer begins."""
        self._end_answer()

    def chunk(self, chunk: Chunk) -> None:
        """A piece of it came; its tokens but the last are computed, which all marks have alike."""
        assert self._model.flash is not None
        self._tokens += len(chunk.tokens)
        mark = Mark(self._tokens, time.perf_counter(), *self._model.flash.figures())
        self._first = self._first or mark
        self._last = mark

    def _end_answer(self) -> None:
        if self._first is not None and self._last is not None:
            self._spans.append((self._first, self._last))
        self._first = self._last = None

    def close(self) -> tuple[Prediction | None, Measured]:
        """Closes the model, whose memory the prediction needs for what it measures. None where no
        answer was long enough to compare with, or, with a line that says why, where it fails."""
        from elute.bench.budget import predict_run
        from elute.bench.pace import Compute
        from elute.errors import EluteError
        from elute.formats.packed import PackedModel
        from elute.runtime.executor import Executor

        model = self._model
        assert model.flash is not None
        executor = model.executor if model.prompts is None else model.prompts.host
        assert isinstance(executor, Executor)
        plan, path = model.flash.plan, model.path
        compute = Compute(executor.n_threads, executor.cache_type, executor.isa, executor.kernels)
        cache_aware = executor.cache_aware
        measured = self._measured(executor.n_threads)
        del executor
        model.close()
        if measured.tok_s is None:
            return None, measured
        try:
            prediction = predict_run(
                PackedModel.open(path),
                plan,
                compute,
                sparsity=model.sparsity,
                cache_aware=cache_aware,
            )
        except (EluteError, MemoryError, OSError) as error:  # the answer is there all the same
            log.warning("what was to be expected cannot be told: %s", error)
            return None, measured
        return prediction, measured

    def _measured(self, n_threads: int) -> Measured:
        from elute.bench.machine import peak_memory_bytes
        from elute.flash.page_cache import cached_bytes

        self._end_answer()
        tokens = sum(last.tokens - first.tokens for first, last in self._spans)
        seconds = sum(last.at_s - first.at_s for first, last in self._spans)
        read = sum(last.read_bytes - first.read_bytes for first, last in self._spans)
        waited = sum(last.waited_s - first.waited_s for first, last in self._spans)
        return Measured(
            tokens / seconds if tokens and seconds else None,
            read / tokens if tokens else None,
            waited / tokens / n_threads if tokens else None,
            peak_memory_bytes(),
            cached_bytes(sorted(self._model.path.glob("*.safetensors"))),
        )


def report_lines(prediction: Prediction | None, measured: Measured) -> list[str]:
    """Two lines, one under the other; the second alone where nothing was predicted."""
    told = _line(
        "measured ",
        measured.tok_s,
        measured.read_bytes_per_token,
        measured.waited_s_per_token,
        measured.resident_bytes,
        measured.page_cache_bytes,
    )
    if prediction is None:
        return [told]
    foretold = _line(
        "predicted",
        prediction.tok_s,
        prediction.read_bytes,
        prediction.waited_s,
        prediction.resident_bytes,
        0,
    )
    return [foretold, told]


def _line(
    name: str,
    tok_s: float | None,
    read: float | None,
    waited_s: float | None,
    resident: int,
    cached: int | None,
) -> str:
    def shown(value: float | None, form: str, scale: float = 1.0) -> str:
        return "–" if value is None else format(value * scale, form)

    return " · ".join(
        [
            f"{name} {shown(tok_s, '.2f')} tok/s",
            f"{shown(read, '.1f', 1e-6)} MB of flash a token",
            f"{shown(waited_s, '.1f', 1e3)} ms wait a token",
            f"resident {shown(resident, '.0f', 1e-6)} MB",
            f"page cache {shown(cached, '.1f', 1e-6)} MB",
        ]
    )
