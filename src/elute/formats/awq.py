"""Reads AWQ folders of the GEMM kind: 4-bit codes, interleaved within each word.

Layout (AutoAWQ, transformers): a module w[N, K] in G groups of K is stored as

    qweight  i32 [K, N/8]   codes of 8 outputs a word
    qzeros   i32 [G, N/8]   zeros, likewise; w = scale * (code - zero)
    scales   f16 [G, N]

Nibble i of a word, counted from the low end, belongs to output 8 * word + NIBBLE_OUTPUT[i].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elute.errors import FormatError, UnsupportedError
from elute.formats.gptq import (
    U32,
    PackedFolder,
    affine_matrix,
    affine_of,
    check_group_size,
    config_int,
    packed_modules,
)
from elute.formats.hf_folder import HfFolder
from elute.types import I32, U8, Affine, QuantizedMatrix, StoredCodes

AWQ_BITS = 4
NIBBLES = 8
NIBBLE_OUTPUT = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_nibbles(words: U32) -> U8:
    """words u32 [R, N/8] -> codes u8 [N, R]."""
    rows, columns = words.shape
    codes = np.empty((columns * NIBBLES, rows), np.uint8)
    for nibble, output in enumerate(NIBBLE_OUTPUT):
        codes[output::NIBBLES] = ((words >> np.uint32(AWQ_BITS * nibble)) & np.uint32(15)).T
    return codes


@dataclass(frozen=True, eq=False)
class AwqFolder(PackedFolder):
    """A Checkpoint of an AWQ folder."""

    @classmethod
    def open(cls, folder: HfFolder) -> AwqFolder:
        """Raises UnsupportedError for another version than gemm or other bits than 4."""
        quantization = folder.quantization
        version = quantization.get("version") or quantization.get("format") or "gemm"
        if quantization.get("backend") == "llm-awq":
            version = "llm-awq"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise UnsupportedError(
                f"{folder.source}: found AWQ version {version!r}, wanted gemm; export the model "
                f"with version gemm"
            )
        bits = config_int(folder, "bits", "w_bit")
        if bits != AWQ_BITS:
            raise UnsupportedError(
                f"{folder.source}: found AWQ of {bits} bits, wanted 4; use another checkpoint"
            )
        group_size = check_group_size(folder, config_int(folder, "group_size", "q_group_size"))
        return cls(folder=folder, bits=bits, group_size=group_size, modules=packed_modules(folder))

    def _packed_shape(self, module: str) -> tuple[int, int]:
        k, columns = self.folder.shape(f"{module}.qweight")
        return columns * NIBBLES, k

    def _stored_codes(self, module: str, headers_only: bool) -> StoredCodes:
        n, k = self._packed_shape(module)
        group_size = self._group_size(module, k)
        if headers_only:
            with_zeros = self.folder.quantization.get("zero_point") is not False
            affine, zero = (Affine.ZERO, 0) if with_zeros else (Affine.SYMMETRIC, 8)
        else:
            affine, zero = affine_of(self._zeros(module, k // group_size, n // NIBBLES))
        return StoredCodes(AWQ_BITS, group_size, affine, zero)

    def _matrix(self, module: str) -> QuantizedMatrix:
        words = self._words(f"{module}.qweight")
        k, columns = words.shape
        group_size = self._group_size(module, k)
        n_groups = k // group_size
        zeros = self._zeros(module, n_groups, columns)
        return affine_matrix(
            unpack_nibbles(words),
            self._scales(module, n_groups, columns * NIBBLES),
            zeros,
            bits=AWQ_BITS,
            group_size=group_size,
        )

    def _group_size(self, module: str, k: int) -> int:
        group_size = k if self.group_size == -1 else self.group_size
        if k % group_size:
            raise FormatError(
                f"{self._where(module)}: K={k} is not a multiple of group_size={group_size}"
                "; fetch the checkpoint again"
            )
        return group_size

    def _zeros(self, module: str, n_groups: int, columns: int) -> I32:
        """-> i32 [G, N] in code units."""
        words = self._words(f"{module}.qzeros")
        self._check_words(f"{module}.qzeros", words, (n_groups, columns))
        return unpack_nibbles(words).T.astype(np.int32)
