"""Text out of a session: whole characters, stop strings, the end of an answer, its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, Protocol

from elute.errors import ShapeError
from elute.runtime.sampler import Sampler, Sampling, TokenLogprob
from elute.runtime.session import Executor, Session
from elute.runtime.stops import StopFilter

FinishReason = Literal["stop", "length", "cancelled"]


class TextStream(Protocol):
    """Tokens to text as they come, holding back the bytes of unfinished characters."""

    def feed(self, token: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class Figures:
    """What a generation cost. Seconds are of the wall clock; first_token_s counts from the call.

    Without a first token, its time is that of the end.
    """

    prompt_tokens: int  # less than the prompt has when it was cancelled on the way
    reused_tokens: int  # of the prompt, already in the cache
    generated_tokens: int
    prompt_s: float
    generation_s: float  # after the first token
    first_token_s: float

    @property
    def prompt_rate_tok_s(self) -> float:
        """Of the tokens that were computed; 0 when none was."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prompt_s)

    @property
    def generated_rate_tok_s(self) -> float:
        """Of the tokens after the first, which comes with the prompt; 0 when there is none."""
        return _rate(self.generated_tokens - 1, self.generation_s)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. `tokens` were chosen since the last chunk; their text may come later.

    The last chunk alone has finish_reason: "stop" (end token or stop string), "length" (max_tokens
    or the end of the context) or "cancelled"; and with it `figures` and `seed`.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | None = None  # the stop string that was met
    figures: Figures | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `logprobs` is empty unless Sampling.logprobs was set; `seed` repeats it."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    figures: Figures
    seed: int
    logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | None = None


@dataclass
class _Clock:
    """When the parts of a generation happened."""

    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    reused: int = 0

    def figures(self, prompt_tokens: int, generated_tokens: int) -> Figures:
        now = time.perf_counter()
        first = self.first_token or now
        return Figures(
            prompt_tokens=prompt_tokens,
            reused_tokens=self.reused,
            generated_tokens=generated_tokens,
            prompt_s=first - self.started,
            generation_s=now - first,
            first_token_s=first - self.started,
        )


class Engine:
    """Answers token prompts with text, over one session.

    end_tokens   tokens that end an answer and are not shown
    text_stream  makes a fresh TextStream
    """

    def __init__(
        self,
        executor: Executor,
        *,
        text_stream: Callable[[], TextStream],
        end_tokens: Collection[int],
    ) -> None:
        self.session = Session(executor)
        self._text_stream = text_stream
        self._end_tokens = frozenset(end_tokens)

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        on_prompt: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[Chunk]:
        """The answer in chunks. What can be refused is refused here, before the first chunk.

        Raises as Session.check_prompt, StopFilter and Sampler do.
        """
        if max_tokens is not None and max_tokens < 0:
            raise ShapeError(
                f"max_tokens: found {max_tokens}, wanted 0 or more; use None for no limit"
            )
        self.session.check_prompt(prompt)
        sampler = Sampler(sampling, vocabulary=self.session.executor.vocabulary, prompt=prompt)
        stops = StopFilter(stop)
        end_tokens = frozenset() if ignore_end else self._end_tokens
        return self._stream(
            list(prompt), sampler, stops, end_tokens, max_tokens, on_prompt, cancelled
        )

    def _stream(
        self,
        prompt: list[int],
        sampler: Sampler,
        stops: StopFilter,
        end_tokens: frozenset[int],
        max_tokens: int | None,
        on_prompt: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Generator[Chunk]:
        clock = _Clock(reused=self.session.reusable(prompt))
        text = self._text_stream()
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        n_generated = 0
        reason: FinishReason | None = None
        choices = self.session.generate(
            prompt, sampler, max_tokens=max_tokens, on_prompt=on_prompt, cancelled=cancelled
        )
        with closing(choices):
            for choice in choices:
                clock.first_token = clock.first_token or time.perf_counter()
                n_generated += 1
                tokens.append(choice.token)
                if choice.logprob is not None:
                    logprobs.append(choice.logprob)
                if choice.token in end_tokens:
                    reason = "stop"
                    break
                shown = stops.feed(text.feed(choice.token))
                if stops.stopped is not None:
                    reason = "stop"
                    break
                if shown:
                    yield Chunk(shown, tuple(tokens), tuple(logprobs))
                    tokens, logprobs, shown = [], [], ""
            else:
                shown = ""
                reason = "cancelled" if cancelled is not None and cancelled() else "length"
        if stops.stopped is None:
            shown = stops.feed(text.flush())
            # The last characters may complete a stop string as well.
            if stops.stopped is None:
                shown += stops.flush()
        yield Chunk(
            shown,
            tuple(tokens),
            tuple(logprobs),
            finish_reason=reason,
            stop=stops.stopped,
            figures=clock.figures(min(len(prompt), len(self.session.history)), n_generated),
            seed=sampler.seed,
        )


def join(chunks: Iterable[Chunk]) -> Completion:
    """All chunks of one answer -> the answer."""
    parts = list(chunks)
    last = parts[-1]
    assert last.finish_reason is not None
    assert last.figures is not None
    assert last.seed is not None
    return Completion(
        text="".join(part.text for part in parts),
        tokens=tuple(token for part in parts for token in part.tokens),
        finish_reason=last.finish_reason,
        figures=last.figures,
        seed=last.seed,
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        stop=last.stop,
    )
