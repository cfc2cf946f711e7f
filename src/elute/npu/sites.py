"""The products of a forward that can be made elsewhere than in the executor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from elute.types import F32, I32


@dataclass(frozen=True, eq=False)
class Site:
    """One linear op of the executor: its registers, and what its products are made of.

    index    among the executor's linear ops, in the order in which a forward runs them
    input    the register [tokens, K] that it reads; outputs: [tokens, N] for each weight
    biases   f32 [N] for each weight, None without
    columns  i32 [K], channel columns[j] meets stored column j; None: as they are
    attention  whether the forward has attention between the site before this one and this one
    """

    index: int
    input: int
    outputs: tuple[int, ...]
    weights: tuple[str, ...]
    biases: tuple[F32 | None, ...]
    columns: I32 | None
    attention: bool = False

    @property
    def name(self) -> str:
        return self.weights[0]


class Segments(Protocol):
    """As of runtime.executor."""

    n: int

    def run(
        self,
        segment: int,
        tokens: I32,
        position: int,
        *,
        chunk: int = 0,
        whole: bool = False,
        all_logits: bool = False,
        want_logits: bool = False,
    ) -> F32 | None: ...

    def register(self, index: int, *, chunk: int = 0) -> F32: ...

    def cached(self, positions: int) -> None: ...


class Host(Protocol):
    """The part of runtime.executor.Executor that computes what is not an int8 product."""

    context: int
    vocabulary: int
    n_registers: int
    logits_bytes: int
    sites: Sequence[Site]

    def cut(self, sites: Sequence[Site], n_chunks: int = 1) -> AbstractContextManager[Segments]: ...

    def checked(self, tokens: I32, position: int) -> I32: ...

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32: ...
