"""The products of a forward that can be made elsewhere than in the executor."""

from __future__ import annotations

from dataclasses import dataclass

from elute.types import F32, I32


@dataclass(frozen=True, eq=False)
class Site:
    """One linear op of the executor: its registers, and what its products are made of.

    index    among the executor's linear ops, in the order in which a forward runs them
    input    the register [tokens, K] that it reads; outputs: [tokens, N] for each weight
    biases   f32 [N] for each weight, None without
    columns  i32 [K], channel columns[j] meets stored column j; None: as they are
    """

    index: int
    input: int
    outputs: tuple[int, ...]
    weights: tuple[str, ...]
    biases: tuple[F32 | None, ...]
    columns: I32 | None

    @property
    def name(self) -> str:
        return self.weights[0]
