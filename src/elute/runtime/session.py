"""One conversation in one KV cache: what it holds, what is reused, when it is full. Tokens only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from elute.errors import BudgetError, ShapeError, UnsupportedError
from elute.runtime.sampler import F64, Choice, Sampler, log_softmax_at
from elute.types import F32, I32

# Tokens between two looks at `cancelled`: long enough for the GEMM, seconds on a 7B model.
PROMPT_CHUNK = 256
LOGITS_BYTES = 64 << 20  # most that one score step may ask for: 256 rows of a 64k vocabulary


class Executor(Protocol):
    """Runs a model; its KV cache is the only state. Native: runtime.executor, numpy: reference."""

    @property
    def context(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        """tokens i32 [M] -> logits f32 [1 or M, vocabulary]; the cache forgets what it held from
        `position` on."""


@runtime_checkable
class PromptExecutor(Protocol):
    """An Executor that computes prompts otherwise than what it generates: npu.prompts.

    prompt_tokens  of a prompt that it should get at a time
    """

    @property
    def prompt_tokens(self) -> int: ...

    def prompt(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32: ...


class Session:
    """Token history over an executor. One generation at a time: a second one ends the first."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._history: list[int] = []  # what the KV cache holds, position by position
        self._ticket = 0  # of the newest generation
        self._next = np.zeros(1, np.int32)  # a lone token: making an array costs 25 us each time
        self._prompt = executor.forward
        self._prompt_tokens = PROMPT_CHUNK
        if isinstance(executor, PromptExecutor):
            self._prompt, self._prompt_tokens = executor.prompt, executor.prompt_tokens
        self._lock = threading.Lock()  # a forward from two threads would corrupt the cache

    @property
    def history(self) -> tuple[int, ...]:
        """Tokens whose keys and values are in the cache."""
        return tuple(self._history)

    def reset(self) -> None:
        """Forgets everything, so that the next prompt is computed from its first token."""
        self._begin(())

    def reusable(self, prompt: Sequence[int]) -> int:
        """How many first tokens of `prompt` are cached; never the last: its logits are wanted."""
        shared = 0
        for held, token in zip(self._history, prompt[:-1], strict=False):
            if held != token:
                break
            shared += 1
        return shared

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises ShapeError for no or unknown tokens, BudgetError for more than the context."""
        context, vocabulary = self.executor.context, self.executor.vocabulary
        if not prompt:
            raise ShapeError("prompt: found 0 tokens, wanted at least 1; give it some text")
        if len(prompt) > context:
            raise BudgetError(
                f"prompt: found {len(prompt)} tokens, but the context is {context}; use a context "
                f"of {len(prompt) + 1} or more, or shorten the prompt by {len(prompt) - context} "
                "tokens: nothing was truncated"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocabulary:
            raise ShapeError(
                f"prompt: found token {low if low < 0 else high}, wanted 0 to {vocabulary - 1}; "
                "was it made by another model's tokenizer?"
            )

    def generate(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        on_prompt: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[Choice]:
        """What follows `prompt`, until max_tokens, the end of the context, or `cancelled()`.

        The caller decides which token ends the text and closes the generator; closing it,
        cancelling, or an exception leaves the session usable, with every token that was computed
        still reusable. on_prompt(done, total) tells how much of the prompt is in the cache, first
        call: what was reused. Raises as check_prompt does, before anything is computed.
        """
        self.check_prompt(prompt)
        return self._generate(list(prompt), sampler, max_tokens, on_prompt, cancelled)

    def _generate(
        self,
        prompt: list[int],
        sampler: Sampler,
        max_tokens: int | None,
        on_prompt: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Generator[Choice]:
        ticket, position = self._begin(prompt)
        pending = prompt[position:]
        if on_prompt is not None:
            on_prompt(position, len(prompt))
        made = 0
        while True:
            size = self._prompt_tokens
            for start in range(0, len(pending), size):
                if cancelled is not None and cancelled():
                    return
                part = pending[start : start + size]
                logits = self._extend(part, ticket, prompt=made == 0)
                if on_prompt is not None and made == 0:
                    on_prompt(len(self._history), len(prompt))
            if made == max_tokens or (cancelled is not None and cancelled()):
                return
            choice = sampler.sample(logits[0])
            made += 1
            yield choice
            # The last token may be chosen by the full context, but not be put into it.
            if made == max_tokens or len(self._history) >= self.executor.context:
                return
            pending = [choice.token]

    def _begin(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Ends any other generation and keeps what `prompt` shares with the cache.

        -> the ticket of the new one, the position where it begins
        """
        # A forward that runs in another thread must first write down what it computed.
        with self._lock:
            self._ticket += 1
            position = self.reusable(prompt)
            del self._history[position:]
            return self._ticket, position

    def _extend(
        self, tokens: list[int], ticket: int, *, prompt: bool, all_logits: bool = False
    ) -> F32:
        with self._lock:
            if ticket != self._ticket:
                raise UnsupportedError(
                    "session: another generation began before this one ended; finish or close one "
                    "before the next, or load the model twice"
                )
            if len(tokens) == 1:
                ids = self._next
                ids[0] = tokens[0]
            else:
                ids = np.asarray(tokens, np.int32)
            forward = self._prompt if prompt else self.executor.forward
            logits = forward(ids, len(self._history), all_logits=all_logits)
            # Not before: a forward that raises leaves a stale end, which the next one overwrites.
            self._history.extend(tokens)
            return logits

    def score(self, tokens: Sequence[int]) -> F64:
        """-> f64 [len(tokens) - 1], log p(tokens[i] | tokens[:i]) for i from 1; empties the cache.

        Raises as check_prompt does.
        """
        self.check_prompt(tokens)
        self.reset()
        parts = list(self._score(list(tokens)))
        return np.concatenate(parts) if parts else np.zeros(0, np.float64)

    def _score(self, tokens: list[int]) -> Iterable[F64]:
        for first, logits in self.logits(tokens, 0):
            targets = np.asarray(tokens[first + 1 : first + 1 + len(logits)], np.int64)
            yield log_softmax_at(logits, targets)

    def logits(self, tokens: Sequence[int], first: int) -> Iterator[tuple[int, F32]]:
        """(position, f32 [rows, vocabulary]): predictions at positions first .. len(tokens) - 2.

        The rows of a position are what the model expects next. Earlier positions run without
        logits, and no step asks for more than LOGITS_BYTES, or less where the executor says so: its
        logits_bytes. Continues from the longest shared
        prefix; call reset() for a window on its own.
        """
        inputs = list(tokens[:-1])
        ticket, position = self._begin(tokens[: first + 1])
        for start in range(position, first, self._prompt_tokens):
            part = inputs[start : min(start + self._prompt_tokens, first)]
            self._extend(part, ticket, prompt=True)
        most = min(LOGITS_BYTES, getattr(self.executor, "logits_bytes", LOGITS_BYTES))
        rows = max(1, min(PROMPT_CHUNK, most // (4 * self.executor.vocabulary)))
        for start in range(first, len(inputs), rows):
            part = inputs[start : start + rows]
            yield start, self._extend(part, ticket, prompt=True, all_logits=True)
