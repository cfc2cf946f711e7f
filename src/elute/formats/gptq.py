"""Reads GPTQ folders: codes stay as they are, zeros become integers, act-order becomes `columns`.

Layout (GPTQModel, AutoGPTQ, transformers): a module w[N, K] of b bits in groups of K is stored as

    qweight  i32 [K*b/32, N]   codes of 32/b input channels a word, lowest bits first
    qzeros   i32 [G, N*b/32]   zeros of 32/b outputs a word
    scales   f16 [G, N]        w = scale * (code - zero)
    g_idx    i32 [K]           group of each input channel; out of order after act-order

3 bits do not divide 32: 32 codes fill 3 words, and codes 10 and 21 straddle two of them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import FormatError, UnsupportedError
from elute.formats.hf_folder import HfFolder, is_float
from elute.types import F16, I32, U8, Affine, QuantizedMatrix, StoredCodes, TokenizerFiles

logger = logging.getLogger(__name__)

WORD_BITS = 32
GPTQ_BITS = (2, 3, 4, 8)
PACKED_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
# Formats that store zeros minus one, so that a zero of 2**bits fits and a zero of 0 wraps.
FORMATS_MINUS_ONE: Mapping[str, bool] = {"gptq": True, "gptq_v2": False}

U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class PackedFolder(ABC):
    """What GPTQ and AWQ folders share: modules of packed words among float tensors."""

    folder: HfFolder
    bits: int
    group_size: int  # -1: the whole row
    modules: frozenset[str]  # names without ".weight"

    @property
    def source(self) -> str:
        return self.folder.source

    @property
    def config(self) -> Mapping[str, Any]:
        return self.folder.config

    def tokenizer_files(self) -> TokenizerFiles:
        return self.folder.tokenizer_files()

    def names(self) -> Sequence[str]:
        kept = [
            name
            for name in self.folder.names()
            if not (name.endswith(PACKED_SUFFIXES) and name.rpartition(".")[0] in self.modules)
        ]
        return (*kept, *(f"{module}.weight" for module in sorted(self.modules)))

    def shape(self, name: str) -> tuple[int, ...]:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.modules:
            return self._packed_shape(module)
        return self.folder.shape(name)

    def codes(self, name: str, *, headers_only: bool = False) -> StoredCodes | None:
        """Reads zeros and orders, not codes. Raises as `read`."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.modules:
            return self._stored_codes(module, headers_only)
        return self.folder.codes(name)

    def read(self, name: str) -> npt.NDArray[Any] | QuantizedMatrix:
        """Raises FormatError when the tensors of a module do not fit together."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.modules:
            return self._matrix(module)
        return self.folder.read(name)

    @abstractmethod
    def _packed_shape(self, module: str) -> tuple[int, int]:
        """-> N, K of the module's weight, from headers alone."""

    @abstractmethod
    def _stored_codes(self, module: str, headers_only: bool) -> StoredCodes:
        """All of `_matrix` but its arrays."""

    @abstractmethod
    def _matrix(self, module: str) -> QuantizedMatrix:
        """The module's weight with its codes kept."""

    def _where(self, module: str) -> str:
        return f"{self.folder.source}: {module}"

    def _words(self, name: str) -> U32:
        """An i32 tensor [rows, columns] as the unsigned words that it packs."""
        words = self.folder.tensor(name)
        if words.dtype.kind not in "iu" or words.dtype.itemsize != 4 or words.ndim != 2:
            raise FormatError(
                f"{self.folder.source}: {name} is {words.dtype} {list(words.shape)}, wanted i32 "
                f"words in two dimensions; fetch the checkpoint again"
            )
        return words.view(np.uint32)

    def _scales(self, module: str, n_groups: int, n_outputs: int) -> F16:
        scales = self.folder.tensor(f"{module}.scales")
        if not is_float(scales.dtype) or scales.shape != (n_groups, n_outputs):
            raise FormatError(
                f"{self._where(module)}: scales are {scales.dtype} {list(scales.shape)}, wanted "
                f"floats [{n_groups}, {n_outputs}]; fetch the checkpoint again"
            )
        return finite_f16(scales, where=f"{self._where(module)}.scales")

    def _check_words(self, name: str, words: U32, shape: tuple[int, int]) -> None:
        if words.shape != shape:
            raise FormatError(
                f"{self.folder.source}: {name} has shape {list(words.shape)}, wanted {list(shape)}"
                "; fetch the checkpoint again"
            )


def packed_modules(folder: HfFolder) -> frozenset[str]:
    """Modules that have a qweight. Raises FormatError unless each has its qzeros and scales."""
    names = set(folder.names())
    modules = frozenset(n.removesuffix(".qweight") for n in names if n.endswith(".qweight"))
    if not modules:
        raise FormatError(
            f"{folder.source}: quantization_config says {folder.quantization.get('quant_method')}, "
            f"and no tensor ends in .qweight; correct config.json"
        )
    for module in sorted(modules):
        for suffix in (".qzeros", ".scales"):
            if module + suffix not in names:
                raise FormatError(
                    f"{folder.source}: {module} has a qweight and no {suffix[1:]}"
                    "; fetch the checkpoint again"
                )
        shape = folder.shape(f"{module}.qweight")
        if len(shape) != 2 or 0 in shape:
            raise FormatError(
                f"{folder.source}: {module}.qweight has shape {list(shape)}, wanted two sizes"
                "; fetch the checkpoint again"
            )
    return modules


def config_int(folder: HfFolder, *keys: str) -> int:
    """The first of `keys` in quantization_config. Raises FormatError when none is an integer."""
    for key in keys:
        value = folder.quantization.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    found = folder.quantization.get(keys[0])
    raise FormatError(
        f"{folder.source}: quantization_config has {keys[0]} {found!r}, wanted an integer"
        "; correct config.json"
    )


def check_group_size(folder: HfFolder, group_size: int) -> int:
    if group_size != -1 and group_size < 1:
        raise FormatError(
            f"{folder.source}: quantization_config has group_size {group_size}, wanted -1 (the "
            f"whole row) or a positive size; correct config.json"
        )
    return group_size


def finite_f16(values: npt.NDArray[Any], *, where: str) -> F16:
    """Rounded to f16. Raises FormatError when one is not finite, before or after rounding."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        at = np.argwhere(~np.isfinite(rounded))[0].tolist()
        raise FormatError(
            f"{where}: found {float(values[tuple(at)])} at {at}, wanted finite values below 65504"
            "; fetch the checkpoint again"
        )
    return rounded


def unpack_words(words: U32, bits: int) -> U8:
    """The codes of little-endian bit streams that run down the columns.

    words  u32 [R, N]           R a multiple of 3 when bits is 3
    -> u8  [N, R * 32 / bits]
    """
    run = 1 if WORD_BITS % bits == 0 else bits  # words after which the pattern repeats
    values = run * WORD_BITS // bits
    rows, n = words.shape
    runs = words.reshape(rows // run, run, n)
    codes = np.empty((n, rows // run * values), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for value in range(values):
        word, shift = divmod(value * bits, WORD_BITS)
        code = runs[:, word] >> np.uint32(shift)
        if shift + bits > WORD_BITS:
            code |= runs[:, word + 1] << np.uint32(WORD_BITS - shift)
        codes[:, value::values] = (code & mask).T
    return codes


def affine_of(zeros: I32) -> tuple[Affine, int]:
    """SYMMETRIC with its zero when all of them are equal, else ZERO."""
    zero = int(zeros.flat[0])
    return (Affine.SYMMETRIC, zero) if bool((zeros == zero).all()) else (Affine.ZERO, 0)


def affine_matrix(
    codes: U8, scales: F16, zeros: I32, *, bits: int, group_size: int, columns: I32 | None = None
) -> QuantizedMatrix:
    """SYMMETRIC when all zeros are equal, else ZERO.

    codes  u8  [N, K], scales f16 [G, N], zeros i32 [G, N] in code units
    """
    affine, zero = affine_of(zeros)
    return QuantizedMatrix(
        codes=codes,
        scales=scales,
        offsets=None if affine is Affine.SYMMETRIC else zeros.astype(np.float16),
        affine=affine,
        zero=zero,
        bits=bits,
        group_size=group_size,
        columns=columns,
    )


@dataclass(frozen=True, eq=False)
class GptqFolder(PackedFolder):
    """A Checkpoint of a GPTQ folder."""

    minus_one: bool
    symmetric: bool
    act_order: bool
    overrides: bool  # GPTQModel's `dynamic`: some modules have other bits and groups

    @classmethod
    def open(cls, folder: HfFolder) -> GptqFolder:
        """Raises UnsupportedError for bits or a checkpoint_format that elute does not read."""
        quantization = folder.quantization
        bits = config_int(folder, "bits")
        if bits not in GPTQ_BITS:
            raise UnsupportedError(
                f"{folder.source}: found GPTQ of {bits} bits, wanted one of "
                f"{', '.join(map(str, GPTQ_BITS))}; use another checkpoint"
            )
        checkpoint_format = quantization.get("checkpoint_format") or quantization.get("format")
        if quantization.get("is_marlin_format"):
            checkpoint_format = "marlin"
        checkpoint_format = checkpoint_format or "gptq"
        if checkpoint_format not in FORMATS_MINUS_ONE:
            raise UnsupportedError(
                f"{folder.source}: found the GPTQ checkpoint_format {checkpoint_format!r}, wanted "
                f"one of {', '.join(FORMATS_MINUS_ONE)}; use another checkpoint"
            )
        return cls(
            folder=folder,
            bits=bits,
            group_size=check_group_size(folder, config_int(folder, "group_size")),
            modules=packed_modules(folder),
            minus_one=FORMATS_MINUS_ONE[checkpoint_format],
            symmetric=quantization.get("sym") is True,
            act_order=quantization.get("desc_act") is True,
            overrides=bool(quantization.get("dynamic")),
        )

    def _packed_shape(self, module: str) -> tuple[int, int]:
        rows, n = self.folder.shape(f"{module}.qweight")
        return n, rows * WORD_BITS // self._module_bits(module, rows)

    def _module_bits(self, module: str, rows: int) -> int:
        """The bits of one module. g_idx has K entries, so it tells what `dynamic` overrode."""
        g_idx = f"{module}.g_idx"
        if g_idx not in self.folder.tensors:
            if self.overrides:
                raise UnsupportedError(
                    f"{self._where(module)}: quantization_config overrides the bits of some "
                    f"modules, and this one has no g_idx to tell which; use another checkpoint"
                )
            return self.bits
        k = int(np.prod(self.folder.shape(g_idx)))
        bits = rows * WORD_BITS // k if k else 0
        allowed = GPTQ_BITS if self.overrides else (self.bits,)
        if bits not in allowed or bits * k != rows * WORD_BITS:
            raise FormatError(
                f"{self._where(module)}: qweight has {rows} rows for the {k} channels of g_idx, "
                f"wanted {k * self.bits // WORD_BITS} at {self.bits} bits"
                "; fetch the checkpoint again"
            )
        return bits

    def _sizes(self, module: str) -> tuple[int, int, int, int]:
        """-> N, K, bits, group_size, from headers alone; checked against each other."""
        where = self._where(module)
        rows, n = self.folder.shape(f"{module}.qweight")
        bits = self._module_bits(module, rows)
        k = rows * WORD_BITS // bits
        zeros_shape = self.folder.shape(f"{module}.qzeros")
        n_groups = zeros_shape[0] if zeros_shape else 0
        group_size = k // n_groups if n_groups else 0
        wanted = k if self.group_size == -1 else min(self.group_size, k)
        if group_size * n_groups != k or not (self.overrides or group_size == wanted):
            raise FormatError(
                f"{where}: found {n_groups} groups for K={k}, wanted group_size={wanted} to "
                f"divide K and give {-(-k // wanted)} groups; fetch the checkpoint again"
            )
        if (bits == 3 and rows % 3) or n * bits % WORD_BITS:
            raise FormatError(
                f"{where}: N={n}, K={k} of {bits} bits do not fill whole 32-bit words"
                "; use another checkpoint"
            )
        return n, k, bits, group_size

    def _stored_codes(self, module: str, headers_only: bool) -> StoredCodes:
        n, k, bits, group_size = self._sizes(module)
        if headers_only:
            affine, zero = (
                (Affine.SYMMETRIC, 1 << (bits - 1)) if self.symmetric else (Affine.ZERO, 0)
            )
            # Weights that read one input share its order, and only those are multiplied at once.
            order = b"act-order" if self.act_order and group_size < k else None
            return StoredCodes(bits, group_size, affine, zero, order)
        affine, zero = affine_of(
            self._zeros(module, self._zero_words(module, n, k, bits, group_size), bits)
        )
        columns = self._group_order(module, k, group_size)[1]
        order = None if columns is None else columns.tobytes()
        return StoredCodes(bits, group_size, affine, zero, order)

    def _zero_words(self, module: str, n: int, k: int, bits: int, group_size: int) -> U32:
        words = self._words(f"{module}.qzeros")
        self._check_words(f"{module}.qzeros", words, (k // group_size, n * bits // WORD_BITS))
        return words

    def _matrix(self, module: str) -> QuantizedMatrix:
        words = self._words(f"{module}.qweight")
        n, k, bits, group_size = self._sizes(module)
        zero_words = self._zero_words(module, n, k, bits, group_size)
        scales = self._scales(module, k // group_size, n)
        zeros = self._zeros(module, zero_words, bits)
        codes = unpack_words(words, bits)
        order, columns = self._group_order(module, k, group_size)
        if columns is not None:
            codes = np.ascontiguousarray(codes[:, columns])
        return affine_matrix(
            codes,
            np.ascontiguousarray(scales[order]),
            zeros[order],
            bits=bits,
            group_size=group_size,
            columns=columns,
        )

    def _zeros(self, module: str, words: U32, bits: int) -> I32:
        """-> i32 [G, N] in code units."""
        stored = unpack_words(np.ascontiguousarray(words.T), bits).astype(np.int32)
        if not self.minus_one:
            return stored
        middle = 1 << (bits - 1)
        if self.symmetric and bool((stored == middle).all()):
            # Some writers declare "gptq" and store the zeros of v2 (vllm-project/vllm#38966). A
            # symmetric zero is the middle code, so the case is clear.
            logger.warning(
                "%s: checkpoint_format is gptq, and the zeros are already %d as in gptq_v2; they "
                "are taken as they are",
                self._where(module),
                middle,
            )
            return stored
        if bits == 3:
            return (stored + 1) & 7
        # GPTQModel subtracts one from every code of a word in one subtraction, so a borrow runs
        # into the code above; adding the same ones to the word is its exact inverse.
        ones = np.uint32(sum(1 << at for at in range(0, WORD_BITS, bits)))
        return unpack_words(np.ascontiguousarray(words.T) + ones, bits).astype(np.int32)

    def _group_order(
        self, module: str, k: int, group_size: int
    ) -> tuple[npt.NDArray[np.intp], I32 | None]:
        """-> the stored group of each group, and the input channel of each column or None.

        Channels are sorted by group, stably; where groups are whole already, only they move.
        """
        n_groups = k // group_size
        in_order = np.arange(n_groups, dtype=np.intp)
        if f"{module}.g_idx" not in self.folder.tensors:
            if self.act_order:
                raise FormatError(
                    f"{self._where(module)}: desc_act is true, and g_idx is missing"
                    "; fetch the checkpoint again"
                )
            return in_order, None
        groups = self.folder.tensor(f"{module}.g_idx")
        if groups.shape != (k,) or groups.dtype.kind not in "iu":
            raise FormatError(
                f"{self._where(module)}: g_idx is {groups.dtype} {list(groups.shape)}, wanted "
                f"integers [{k}]; fetch the checkpoint again"
            )
        if not self.act_order and not groups.any():
            return in_order, None  # AutoGPTQ leaves g_idx at zero where there is no act-order
        out_of_range = groups.min() < 0 or groups.max() >= n_groups
        if out_of_range or (np.bincount(groups, minlength=n_groups) != group_size).any():
            raise FormatError(
                f"{self._where(module)}: g_idx does not give each of the {n_groups} groups "
                f"{group_size} channels; fetch the checkpoint again"
            )
        blocks = groups.reshape(n_groups, group_size)
        if (blocks == blocks[:, :1]).all():
            return blocks[:, 0].astype(np.intp), None
        return in_order, np.argsort(groups, kind="stable").astype(np.int32)
