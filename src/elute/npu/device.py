"""What an NPU is to elute: int8 matrix products of static shapes. The protocol of all devices.

A device knows no model and no outlier: it multiplies what it is given, and refuses what an NPU
refuses. Source: llm.npu (arXiv 2407.05858), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from elute.types import F32, I8

Q_MAX = 127  # of weights; activations also take -128

Progress = Callable[[str, int, int], None]  # stage, done, total


class Outputs(StrEnum):
    """What comes out of a product, acc the i32 sums of i8 x i8."""

    INT8 = "int8"  # clip(round(acc * input_scale * weight_scale / output_scale)): static scales
    INT32 = "int32"  # acc
    FLOAT = "float"  # acc * (input_scale * weight_scale), f32


@dataclass(frozen=True)
class Profile:
    """What a device can do.

    per_channel  weights may have a scale for each output instead of one for all
    """

    name: str
    per_channel: bool
    outputs: Outputs


@dataclass(frozen=True, eq=False)
class Product:
    """y = x @ w.T with x i8 [rows, K], w i8 [N, K].

    weights        makes w when it is asked; nobody keeps more of it than the device needs
    weight_scales  f32 [1], of the matrix, or [N], of each output
    output_scale   of Outputs.INT8; else None
    digest         of all that the product depends on: equal ones are the same product
    """

    name: str
    shape: tuple[int, int]
    weights: Callable[[], I8]
    weight_scales: F32
    input_scale: float
    output_scale: float | None
    digest: str


@dataclass(frozen=True)
class Graph:
    """Products that read one input, which a device compiles as one subgraph."""

    rows: int
    products: tuple[Product, ...]

    @property
    def name(self) -> str:
        return self.products[0].name


class Device(Protocol):
    """Not for two threads at once. Results depend on the input alone."""

    @property
    def profile(self) -> Profile: ...

    def load(self, graphs: Sequence[Graph], *, progress: Progress | None = None) -> None:
        """Compiles them, or takes compiled ones from where the device keeps them.

        Raises UnsupportedError for what the device refuses, DeviceError where it fails.
        """

    def run(self, graph: str, x: I8) -> list[npt.NDArray[Any]]:
        """x i8 [rows, K] -> for each product [rows, N] of the profile's type of outputs.

        Raises ShapeError for an input of another shape or type, DeviceError where it fails.
        """

    def close(self) -> None: ...


def requantized(acc: npt.NDArray[np.int32], product: Product) -> I8:
    """acc i32 [M, N] -> i8 [M, N] as Outputs.INT8 has it; ties go to the even one."""
    assert product.output_scale is not None
    factors = (product.weight_scales * np.float32(product.input_scale)).astype(np.float32)
    factors = factors / np.float32(product.output_scale)
    scaled: npt.NDArray[np.float32] = np.rint(acc.astype(np.float32) * factors)
    return np.clip(scaled, -128, 127).astype(np.int8)
