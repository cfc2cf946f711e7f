"""What the rooms hand to each other. Knows no file format and no kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# activations per table; a nibble indexes 2**LUT_WIDTH = 16 entries = one 128-bit shuffle register
LUT_WIDTH = 4
ACT_BLOCK = 64  # activations that share one int8 scale
PANEL = 32  # outputs packed side by side: 16 low nibbles + 16 high nibbles of a 16-byte lane

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


class Affine(StrEnum):
    """How a code becomes a weight."""

    SYMMETRIC = "symmetric"  # w = scale * (code - zero), one integer zero for the whole matrix
    ZERO = "zero"  # w = scale * (code - offset), offset in code units per group (GPTQ, AWQ)
    MIN = "min"  # w = scale * code + offset, offset in weight units per group (GGUF)


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """The codes of a matrix w[N, K] and the affine map that turns them into weights.

    codes    u8  [N, K]               in [0, 2**bits)
    scales   f16 [K/group_size, N]    weight units per code step
    offsets  f16 [K/group_size, N]    None when SYMMETRIC
    columns  i32 [K] or None          stored column j multiplies channel columns[j] (act-order)
    """

    codes: U8
    scales: F16
    offsets: F16 | None
    affine: Affine
    zero: int
    bits: int
    group_size: int
    columns: I32 | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def dequantize(self) -> F32:
        """-> f32 [N, K], columns in input-channel order."""
        scales = np.repeat(self.scales.astype(np.float32).T, self.group_size, axis=1)
        codes = self.codes.astype(np.float32)
        if self.affine is Affine.SYMMETRIC:
            w = scales * (codes - np.float32(self.zero))
        else:
            assert self.offsets is not None
            offsets = np.repeat(self.offsets.astype(np.float32).T, self.group_size, axis=1)
            w = (
                scales * (codes - offsets)
                if self.affine is Affine.ZERO
                else scales * codes + offsets
            )
        if self.columns is None:
            return w
        in_order = np.empty_like(w)
        in_order[:, self.columns] = w
        return in_order


@dataclass(frozen=True)
class StoredCodes:
    """What a QuantizedMatrix is beside its arrays.

    order  tells column orders apart: equal ones are equal bytes; None: channels are in order
    """

    bits: int
    group_size: int
    affine: Affine
    zero: int
    order: bytes | None = None


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A QuantizedMatrix as quads; see docs/packed-format.md for the bytes.

    planes   u8  [n_panels * K/4 * 16 * bits]    panel-major bit planes
    scales   f16 [n_panels, K/group_size, PANEL] zero in the outputs that pad N to whole panels
    offsets  f16 like scales, None when SYMMETRIC
    """

    shape: tuple[int, int]
    planes: U8
    scales: F16
    offsets: F16 | None
    affine: Affine
    zero: int
    bits: int
    group_size: int
    columns: I32 | None = None

    @property
    def n_panels(self) -> int:
        return -(-self.shape[0] // PANEL)


@dataclass(frozen=True, eq=False)
class InBank:
    """A matrix whose codes lie in channel order in the rows of a bank; see docs/packed-format.md.

    scales, offsets  as in PackedMatrix
    offset           of the matrix within each row, bytes
    """

    shape: tuple[int, int]
    scales: F16
    offsets: F16 | None
    affine: Affine
    zero: int
    bits: int
    group_size: int
    bank: str
    offset: int


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as Hugging Face folders hold it."""

    tokenizer_json: str
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)


class Checkpoint(Protocol):
    """A model on disk, whatever its format: Hugging Face config keys and Hugging Face tensor names.

    Rotary projections are in half-split order (channel i pairs with i + head_width/2), as Hugging
    Face stores them.
    """

    @property
    def source(self) -> str:
        """Path or id, for messages."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The keys of config.json."""

    def tokenizer_files(self) -> TokenizerFiles: ...

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def codes(self, name: str, *, headers_only: bool = False) -> StoredCodes | None:
        """How `read` would give a matrix, without reading its codes; None: as floats.

        headers_only  no tensor's bytes may be read: what they would tell follows from the config
        """

    def read(self, name: str) -> npt.NDArray[Any] | QuantizedMatrix:
        """Float tensors as stored (f32, f16 or bf16); quantized ones as codes."""


OVER_READ = (
    64  # bytes that kernels may read past the planes: one AVX-512 register beyond the last quad
)


class WeightSource(Protocol):
    """Who holds a model's weights: a mapped file, or memory."""

    def matrix(self, name: str) -> PackedMatrix:
        """At least OVER_READ readable bytes follow the planes."""

    def vector(self, name: str) -> F32:
        """[L], or [N, K] of a matrix that is kept as floats."""
