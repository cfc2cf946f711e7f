"""A GGUF file as a Checkpoint: Hugging Face names and config keys, codes kept, tensors mapped."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from elute.errors import FormatError, UnsupportedError
from elute.formats.gguf_codes import CODE_TYPES, is_dequantizable, read_codes, read_weights
from elute.formats.gguf_config import read_architecture, read_config
from elute.formats.gguf_header import AGAIN, GgufHeader, TensorInfo, read_header, show
from elute.formats.gguf_names import Architecture, ExpectedTensor, expected_tensors, half_split_rows
from elute.types import U8, QuantizedMatrix, StoredCodes, TokenizerFiles

logger = logging.getLogger(__name__)

CHECK_CHUNK = 1 << 20  # floats tested for being finite at a time
ROPE_FREQS = "rope_freqs.weight"
_FLOATS: Mapping[GGMLQuantizationType, npt.DTypeLike] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}


def open_gguf(path: Path) -> GgufCheckpoint:
    """Maps the file and checks its header; no tensor is read before it is asked for.

    Raises FormatError for a file that breaks the format or lacks a tensor or key of its
    architecture, UnsupportedError for an architecture, tensor or type that elute lacks.
    """
    path = Path(path)
    data = _map(path)
    header = read_header(path, data)
    architecture = read_architecture(header)
    config = read_config(header, architecture, lambda: _rope_factors(header, data))
    if "elute_rope_frequency_factors" in config:
        _check_rope_factors(path, config)
    return GgufCheckpoint(
        header, data, config, _matched(header, architecture, config), architecture
    )


class GgufCheckpoint:
    """Implements types.Checkpoint; see open_gguf."""

    def __init__(
        self,
        header: GgufHeader,
        data: U8,
        config: Mapping[str, Any],
        tensors: Mapping[str, tuple[ExpectedTensor, TensorInfo]],
        architecture: Architecture,
    ) -> None:
        self._header = header
        self._data = data
        self._config = config
        self._tensors = tensors
        self._norm_offset = architecture.norm_offset
        self._warned: set[GGMLQuantizationType] = set()

    @property
    def source(self) -> str:
        return str(self._header.path)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    def tokenizer_files(self) -> TokenizerFiles:
        from elute.formats.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(self._header.metadata)

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def codes(self, name: str, *, headers_only: bool = False) -> StoredCodes | None:
        """Of a type in CODE_TYPES, which says it all."""
        info = self._find(name)[1]
        kind = CODE_TYPES.get(info.type)
        if kind is None or len(info.shape) != 2:
            return None
        return StoredCodes(kind.bits, kind.group_size, kind.affine, kind.zero)

    def read(self, name: str) -> npt.NDArray[Any] | QuantizedMatrix:
        """Floats as stored (read-only and mapped unless reordered); quantized matrices as codes.

        Gemma's norms come as f32, less the 1 that the converter added. Types without linear codes
        come as f32 after a warning. Raises FormatError where a weight or scale is not finite.
        """
        expected, info = self._find(name)
        where = self._where(info)
        data = self._data[info.offset : info.offset + info.n_bytes]
        rows = half_split_rows(info.shape[0], expected.rope_heads) if expected.rope_heads else None
        if info.type in CODE_TYPES and len(info.shape) == 2:
            n, k = info.shape
            return read_codes(data, (n, k), info.type, rows=rows, where=where)
        if info.type in _FLOATS:
            weights = data.view(_FLOATS[info.type]).reshape(info.shape)
        else:
            self._announce(info)
            weights = read_weights(data, info.shape, info.type)
        _check_finite(weights, where)
        if rows is not None:
            in_order = np.empty_like(weights)
            in_order[rows] = weights
            weights = in_order
        if expected.is_norm and self._norm_offset:
            weights = weights.astype(np.float32) - np.float32(self._norm_offset)
        return weights

    def _find(self, name: str) -> tuple[ExpectedTensor, TensorInfo]:
        found = self._tensors.get(name)
        if found is None:
            raise FormatError(
                f"{self.source}: found no tensor {show(name)}, wanted one of names(), such as "
                f"{next(iter(self._tensors))!r}; ask for one of those"
            )
        return found

    def _where(self, info: TensorInfo) -> str:
        return f"{self.source}: tensor {show(info.name)}"

    def _announce(self, info: TensorInfo) -> None:
        if info.type in CODE_TYPES or info.type in self._warned:
            return
        self._warned.add(info.type)
        logger.warning(
            "%s: type %s has no linear codes, so its tensors (%s is the first) are dequantized and "
            "will be quantized again, which loses precision; a K or legacy type avoids that",
            self.source,
            info.type.name,
            info.name,
        )


def _map(path: Path) -> U8:
    try:
        if not path.is_file():
            raise FormatError(f"{path}: found no file, wanted a GGUF file; check the path")
        if path.stat().st_size == 0:
            raise FormatError(f"{path}: found an empty file, wanted a GGUF file; {AGAIN}")
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise FormatError(f"{path}: cannot be read ({reason}); check the path") from error


def _matched(
    header: GgufHeader, architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, tuple[ExpectedTensor, TensorInfo]]:
    """Every tensor that the config calls for, its shape and type checked; none left over."""
    matched: dict[str, tuple[ExpectedTensor, TensorInfo]] = {}
    left = dict(header.tensors)
    if "elute_rope_frequency_factors" in config:
        del left[ROPE_FREQS]
    for expected in expected_tensors(architecture, config):
        if expected.alone and expected.alone in left:
            expected = replace(expected, gguf_name=expected.alone, part=None)
        info = header.tensors.get(expected.gguf_name)
        left.pop(expected.gguf_name, None)
        if info is None:
            raise FormatError(
                f"{header.path}: tensor {expected.gguf_name!r}: found nothing, wanted shape "
                f"{list(expected.stored_shape)}; {AGAIN}"
            )
        if info.shape != expected.stored_shape:
            raise FormatError(
                f"{header.path}: tensor {expected.gguf_name!r}: found shape {list(info.shape)}, "
                f"wanted {list(expected.stored_shape)} by the metadata; {AGAIN}"
            )
        if info.type not in _FLOATS and not is_dequantizable(info.type):
            raise UnsupportedError(
                f"{header.path}: tensor {expected.gguf_name!r}: found type {info.type.name}, "
                "wanted one that the gguf library can dequantize; quantize to another type"
            )
        matched[expected.name] = (expected, _part(info, expected))
    for name in left:
        if name.endswith(".attn_rot_embd.weight"):
            continue  # inverse frequencies in early files; they follow from rope.freq_base
        raise UnsupportedError(
            f"{header.path}: tensor {show(name)}: found it in architecture "
            f"{header.metadata['general.architecture']!r}, wanted only tensors that elute computes "
            "with; use another model"
        )
    return matched


def _part(info: TensorInfo, expected: ExpectedTensor) -> TensorInfo:
    """Where the part lies: experts are behind one another, each in whole rows of whole blocks."""
    if expected.part is None:
        return info
    n_bytes = info.n_bytes // expected.parts
    at = info.offset + expected.part * n_bytes
    return replace(info, shape=expected.shape, offset=at, n_bytes=n_bytes)


def _rope_factors(header: GgufHeader, data: U8) -> list[float]:
    info = header.tensors[ROPE_FREQS]
    if info.type is not GGMLQuantizationType.F32 or math.prod(info.shape) > CHECK_CHUNK:
        raise FormatError(
            f"{header.path}: tensor {ROPE_FREQS!r}: found {info.type.name} {list(info.shape)}, "
            f"wanted F32 with one factor for each pair of channels; {AGAIN}"
        )
    factors: list[float] = data[info.offset : info.offset + info.n_bytes].view(np.float32).tolist()
    return factors


def _check_rope_factors(path: Path, config: Mapping[str, Any]) -> None:
    factors, wanted = config["elute_rope_frequency_factors"], config["head_dim"] // 2
    bad = [factor for factor in factors if not (math.isfinite(factor) and factor > 0)]
    if len(factors) != wanted or bad:
        found = f"the factor {bad[0]}" if bad else f"{len(factors)} factors"
        raise FormatError(
            f"{path}: tensor {ROPE_FREQS!r}: found {found}, wanted {wanted} finite factors above "
            f"0; {AGAIN}"
        )


def _check_finite(weights: npt.NDArray[Any], where: str) -> None:
    flat = weights.reshape(-1)
    for start in range(0, flat.size, CHECK_CHUNK):
        chunk = flat[start : start + CHECK_CHUNK]
        finite = np.isfinite(chunk)
        if not finite.all():
            bad = int(np.argmin(finite))
            at = [int(i) for i in np.unravel_index(start + bad, weights.shape)]
            raise FormatError(
                f"{where}: found weight {chunk[bad]} at {at}, wanted finite weights; {AGAIN}"
            )
