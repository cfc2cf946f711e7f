"""Reads BitNet b1.58 folders: ternary weights, packed, spelled out, or made from master weights.

Three kinds, told apart by quantization_config and the stored dtype:

    packed   u8 [N/4, K]: bits 2i and 2i+1 of byte [r, k] hold w + 1 of row i * N/4 + r
    spelled  floats [N, K] of -1, 0 and 1, with a weight_scale
    online   floats [N, K]; w becomes round(w / m) clipped to [-1, 1], times m = mean |w|

`linear_class` says what weight_scale means: `autobitlinear` multiplies by it (as in
microsoft/bitnet-b1.58-2B-4T), `bitlinear` divides (HF1BitLLM's models).
Source: transformers.integrations.bitnet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import FormatError, UnsupportedError
from elute.formats.gptq import finite_f16
from elute.formats.hf_folder import HfFolder, is_float
from elute.types import U8, Affine, QuantizedMatrix, StoredCodes, TokenizerFiles

ROWS_PER_BYTE = 4
TERNARY_BITS = 2
TERNARY_ZERO = 1
MIN_MEAN = 1e-5  # transformers clamps the mean of |w| to this
SCALE_SUFFIX = ".weight_scale"
NEVER_TERNARY = ("embed_tokens", "lm_head")


def unpack_rows(packed: U8) -> U8:
    """packed u8 [N/4, K] -> codes u8 [N, K] in 0..2 (or 3 in a damaged file)."""
    return np.concatenate([(packed >> (2 * part)) & 3 for part in range(ROWS_PER_BYTE)])


@dataclass(frozen=True, eq=False)
class BitnetFolder:
    """A Checkpoint of a BitNet folder."""

    folder: HfFolder
    scale_divides: bool
    online: bool
    modules: frozenset[str]  # names without ".weight"

    @classmethod
    def open(cls, folder: HfFolder) -> BitnetFolder:
        """Raises UnsupportedError for settings that transformers does not define."""
        quantization = folder.quantization
        linear_class = quantization.get("linear_class", "bitlinear")
        mode = quantization.get("quantization_mode", "offline")
        if linear_class not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
            raise UnsupportedError(
                f"{folder.source}: found BitNet linear_class {linear_class!r} and "
                f"quantization_mode {mode!r}, wanted bitlinear or autobitlinear, offline or online"
                "; use another checkpoint"
            )
        if quantization.get("use_rms_norm"):
            raise UnsupportedError(
                f"{folder.source}: found use_rms_norm in quantization_config, and elute has no "
                f"norm inside a linear layer; use another checkpoint"
            )
        online = mode == "online" and linear_class == "autobitlinear"
        skipped = quantization.get("modules_to_not_convert") or []
        if not isinstance(skipped, list) or not all(isinstance(s, str) for s in skipped):
            raise FormatError(
                f"{folder.source}: modules_to_not_convert is {skipped!r}, wanted a list of names"
                "; correct config.json"
            )
        modules = _online_modules(folder, skipped) if online else _scaled_modules(folder)
        if not modules:
            raise FormatError(
                f"{folder.source}: quantization_config says bitnet, and no tensor is a ternary "
                f"weight with a weight_scale; correct config.json"
            )
        return cls(
            folder=folder,
            scale_divides=linear_class == "bitlinear",
            online=online,
            modules=modules,
        )

    @property
    def source(self) -> str:
        return self.folder.source

    @property
    def config(self) -> Mapping[str, Any]:
        return self.folder.config

    def tokenizer_files(self) -> TokenizerFiles:
        return self.folder.tokenizer_files()

    def names(self) -> Sequence[str]:
        return tuple(name for name in self.folder.names() if not name.endswith(SCALE_SUFFIX))

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.folder.shape(name)
        if self._is_ternary(name) and self._is_packed(name):
            return stored[0] * ROWS_PER_BYTE, *stored[1:]
        return stored

    def codes(self, name: str, *, headers_only: bool = False) -> StoredCodes | None:
        if not self._is_ternary(name):
            return self.folder.codes(name)
        shape = self.folder.shape(name)
        return StoredCodes(TERNARY_BITS, shape[-1], Affine.SYMMETRIC, TERNARY_ZERO)

    def read(self, name: str) -> npt.NDArray[Any] | QuantizedMatrix:
        """Raises FormatError when a packed weight holds a code of 3 or a scale is not usable."""
        if not self._is_ternary(name):
            return self.folder.read(name)
        stored = self.folder.tensor(name)
        if stored.ndim != 2:
            raise FormatError(
                f"{self.source}: {name} has shape {list(stored.shape)}, wanted two dimensions"
                "; fetch the checkpoint again"
            )
        if self.online:
            return _quantize_online(stored, where=f"{self.source}: {name}")
        scale = self._scale(name.removesuffix(".weight"))
        if self._is_packed(name):
            codes = unpack_rows(stored)
            if codes.size and int(codes.max()) > 2:
                row, column = np.argwhere(codes == 3)[0].tolist()
                raise FormatError(
                    f"{self.source}: {name} holds the code 3 at [{row}, {column}], wanted 0 to 2"
                    "; fetch the checkpoint again"
                )
        else:
            codes = _spelled_codes(stored, where=f"{self.source}: {name}")
        return _ternary(codes, scale, where=f"{self.source}: {name}")

    def _is_ternary(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.modules

    def _is_packed(self, name: str) -> bool:
        return self.folder.entry(name).dtype == "U8"

    def _scale(self, module: str) -> np.float32:
        """Weight units per code step."""
        name = module + SCALE_SUFFIX
        values = self.folder.tensor(name)
        if values.size != 1 or not is_float(values.dtype):
            raise FormatError(
                f"{self.source}: {name} is {values.dtype} {list(values.shape)}, wanted one float"
                "; fetch the checkpoint again"
            )
        scale = np.float32(values.reshape(())[()])
        if not np.isfinite(scale) or scale == 0:
            raise FormatError(
                f"{self.source}: {name} is {scale}, wanted a finite scale, not zero"
                "; fetch the checkpoint again"
            )
        return np.float32(1) / scale if self.scale_divides else scale


def _scaled_modules(folder: HfFolder) -> frozenset[str]:
    names = set(folder.names())
    scaled = {n.removesuffix(SCALE_SUFFIX) for n in names if n.endswith(SCALE_SUFFIX)}
    for name in sorted(names):
        module = name.removesuffix(".weight")
        if folder.entry(name).dtype == "U8" and module not in scaled:
            raise FormatError(
                f"{folder.source}: {name} is packed and has no weight_scale"
                "; fetch the checkpoint again"
            )
        if name.endswith(SCALE_SUFFIX):
            weight = name.removesuffix("_scale")
            if weight not in names:
                raise FormatError(
                    f"{folder.source}: found {name} and no {weight}; fetch the checkpoint again"
                )
    return frozenset(scaled)


def _online_modules(folder: HfFolder, skipped: Sequence[str]) -> frozenset[str]:
    """What transformers replaces: every matrix but embeddings, head and `skipped`."""
    return frozenset(
        module
        for module, dot, last in (name.rpartition(".") for name in folder.names())
        if last == "weight"
        and len(folder.shape(f"{module}{dot}{last}")) == 2
        and not module.endswith(NEVER_TERNARY)
        and not any(_matches(module, pattern) for pattern in skipped)
    )


def _matches(module: str, pattern: str) -> bool:
    """transformers.quantizers.quantizers_utils.should_convert_module, without its regexes."""
    return (
        module.endswith(pattern)
        or re.match(rf"{re.escape(pattern)}(?:(?<=\.)|(?=\.|$))", module) is not None
    )


def _ternary(codes: U8, scale: np.float32, *, where: str) -> QuantizedMatrix:
    n, k = codes.shape
    scales = finite_f16(np.full((1, n), scale, np.float32), where=f"{where} scale")
    return QuantizedMatrix(
        codes=codes,
        scales=scales,
        offsets=None,
        affine=Affine.SYMMETRIC,
        zero=TERNARY_ZERO,
        bits=TERNARY_BITS,
        group_size=k,
    )


def _spelled_codes(stored: npt.NDArray[Any], *, where: str) -> U8:
    values = stored.astype(np.float32)
    codes = values + np.float32(1)
    valid = (codes == 0) | (codes == 1) | (codes == 2)
    if not valid.all():
        row, column = np.argwhere(~valid)[0].tolist()
        raise FormatError(
            f"{where} holds {values[row, column]} at [{row}, {column}], wanted -1, 0 or 1; for "
            f"master weights set quantization_mode to online in config.json"
        )
    return codes.astype(np.uint8)


def _quantize_online(stored: npt.NDArray[Any], *, where: str) -> QuantizedMatrix:
    """What transformers computes in each forward pass, done once."""
    if not is_float(stored.dtype):
        raise FormatError(
            f"{where} is {stored.dtype}, wanted master weights in floats"
            "; fetch the checkpoint again"
        )
    weights = stored.astype(np.float32)
    # In f64: the order of summation must not decide between two codes.
    mean = np.float32(max(np.abs(weights).mean(dtype=np.float64), MIN_MEAN))
    if not np.isfinite(mean):
        raise FormatError(f"{where} holds values that are not finite; fetch the checkpoint again")
    per_unit = np.float32(1) / mean
    codes = np.clip(np.rint(weights * per_unit), -1, 1) + np.float32(TERNARY_ZERO)
    # transformers rounds the dequantized weights to the dtype of the master weights.
    scale = np.float32((np.float32(1) / per_unit).astype(stored.dtype))
    return _ternary(codes.astype(np.uint8), scale, where=where)
