"""GGUF files of random blocks, for timing other engines on a published shape.

Tensor types are those that llama-quantize gives a file type, stand-ins for odd widths included, so
that a file is as large as the real one. There is no tokenizer in it: llama-bench makes up tokens.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elute.errors import BudgetError, UnsupportedError
from elute.formats.atomic_directory import atomic_directory, disk_errors
from elute.formats.gguf_names import ARCHITECTURES, EXPERTS, expected_tensors
from elute.model.families import op_list
from elute.quantize.recipe import EMBEDDING, HEAD
from elute.types import U8

VERSION = 1  # of what is written; part of the name, so that older files are not taken for it
FILE_NAME = "random.gguf"
BLOCK_BYTES = 8 << 20  # random bytes that a type's tensors repeat
FREE_BYTES = 256 << 20  # left on the disk

# Bytes of a block that hold f16 scales and minima; any other byte may have any value.
HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
# Bits of normal halves, 2^-12 to 2^-11: times the largest codes and inner scales about 1.
HALF_FROM, HALF_BELOW = 0x0C00, 0x1000

# File type -> type of most tensors.
FILE_TYPES: Mapping[str, str] = {
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q8_0": "Q8_0",
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q6_K": "Q6_K",
    "TQ1_0": "TQ1_0",
    "TQ2_0": "TQ2_0",
}
# What stands in for a type whose blocks of 256 do not divide a row, in blocks of 32.
STAND_INS: Mapping[str, str] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# elute's storage -> the file type of llama.cpp that takes as many bits.
OF_BITS: Mapping[int, str] = {2: "Q2_K", 3: "Q3_K_S", 4: "Q4_0", 5: "Q5_0", 6: "Q6_K", 8: "Q8_0"}
OF_TERNARY = "TQ2_0"


@dataclass(frozen=True)
class RandomGguf:
    """A file, whether it was made now, and how many of its matrices have stand-ins."""

    path: Path
    n_bytes: int
    made: bool
    stand_ins: int


def file_type_of(bits: int | None) -> str:
    """The type that corresponds to a width, None being ternary. Raises UnsupportedError."""
    found = OF_TERNARY if bits is None else OF_BITS.get(bits)
    if found is None:
        raise UnsupportedError(
            f"versus: found {bits} bits, for which llama.cpp has no file type; choose one with "
            f"--versus-type: {', '.join(FILE_TYPES)}"
        )
    return found


def tensor_type(file_type: str, name: str, *, tied: bool, n_gqa: int) -> str:
    """As llama-quantize chooses it for a matrix of a dense model, without an importance matrix.

    Of rows that its blocks divide; `fitting` gives the type of others.

    name   of the Hugging Face checkpoint
    n_gqa  query heads that share a key
    Source: llama_tensor_get_type_impl in llama.cpp's src/llama-quant.cpp, build of August 2026.
    """
    found = FILE_TYPES[file_type]
    if name == HEAD or (name == EMBEDDING and tied):
        found = "Q8_0" if found == "Q8_0" else "Q6_K"
    elif name == EMBEDDING:
        found = "Q4_K" if found.startswith("TQ") else found
    elif file_type == "Q2_K" and ".v_proj." in name:
        found = "Q4_K" if n_gqa >= 4 else "Q3_K"
    elif file_type == "Q2_K" and (".down_proj." in name or ".o_proj." in name):
        found = "Q3_K"
    return found


def fitting(ggml_type: str, n_columns: int) -> str:
    """The type, or what llama-quantize takes where its blocks do not divide a row."""
    return ggml_type if n_columns % _block(ggml_type)[0] == 0 else STAND_INS[ggml_type]


def random_gguf(
    name: str,
    config: Mapping[str, Any],
    file_type: str,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> RandomGguf:
    """The file of this shape and type in `folder`, written unless it is there; whole or not at all.

    name      of the shape, vocabulary included
    config    a config.json of llama, qwen2 or bitnet
    progress  is called with (bytes written, bytes in all)

    Raises UnsupportedError for a shape of experts, BudgetError when the disk does not hold it,
    EluteError when it cannot be written.
    """
    if config["model_type"] in EXPERTS:
        raise UnsupportedError(
            f"versus: found {name}, a model of experts, for which no random GGUF file is made; "
            "choose a dense shape"
        )
    plan = _Plan(config, file_type)
    place = folder / f"{name}-{file_type}-v{VERSION}"
    path = place / FILE_NAME
    made = not path.is_file()
    if made:
        _check_disk(folder, plan.n_bytes)
        with atomic_directory(place, replace=False) as partial, disk_errors(place):
            plan.write(partial / FILE_NAME, name, progress)
    return RandomGguf(path, path.stat().st_size, made, plan.stand_ins)


@dataclass(frozen=True)
class _Tensor:
    """ggml_type None is f32."""

    gguf_name: str
    shape: tuple[int, ...]
    ggml_type: str | None

    @property
    def n_bytes(self) -> int:
        n_weights = math.prod(self.shape)
        if self.ggml_type is None:
            return 4 * n_weights
        columns, n_bytes = _block(self.ggml_type)
        return n_weights // columns * n_bytes


class _Plan:
    """What a file holds, known before anything is written."""

    def __init__(self, config: Mapping[str, Any], file_type: str) -> None:
        heads = config["num_attention_heads"]
        self._config = {
            "head_dim": config["hidden_size"] // heads,
            "attention_bias": any(name.endswith(".bias") for name in op_list(config).vectors()),
            **config,
        }
        self._file_type = file_type
        self._tensors: list[_Tensor] = []
        self.stand_ins = 0
        n_gqa = heads // config["num_key_value_heads"]
        for tensor in expected_tensors(ARCHITECTURES[config["model_type"]], self._config):
            chosen = None
            if len(tensor.shape) == 2:
                wanted = tensor_type(
                    file_type, tensor.name, tied=config["tie_word_embeddings"], n_gqa=n_gqa
                )
                chosen = fitting(wanted, tensor.shape[1])
                self.stand_ins += chosen != wanted
            self._tensors.append(_Tensor(tensor.gguf_name, tensor.shape, chosen))
        self.n_bytes = sum(tensor.n_bytes for tensor in self._tensors)

    def write(self, path: Path, name: str, progress: Callable[[int, int], None] | None) -> None:
        import gguf

        random = np.random.Generator(np.random.PCG64(0))
        blocks = {
            ggml_type: random_blocks(ggml_type, BLOCK_BYTES // _block(ggml_type)[1], random)
            for ggml_type in sorted({tensor.ggml_type or "" for tensor in self._tensors} - {""})
        }
        writer = gguf.GGUFWriter(path, self._config["model_type"])
        try:
            self._add_keys(writer, gguf, name)
            for tensor in self._tensors:
                writer.add_tensor_info(
                    tensor.gguf_name,
                    tensor.shape,
                    np.dtype(np.float32),
                    tensor.n_bytes,
                    raw_dtype=gguf.GGMLQuantizationType[tensor.ggml_type or "F32"],
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for tensor in self._tensors:
                writer.write_tensor_data(
                    np.full(tensor.shape, tensor.gguf_name.endswith(".weight"), np.float32)
                    if tensor.ggml_type is None
                    else np.resize(blocks[tensor.ggml_type], tensor.n_bytes)
                )
                done += tensor.n_bytes
                if progress is not None:
                    progress(done, self.n_bytes)
            writer.fout[0].flush()
            os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()

    def _add_keys(self, writer: Any, gguf: Any, name: str) -> None:
        config = self._config
        writer.add_name(f"{name} (random)")
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{self._file_type}"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_tokenizer_model("no_vocab")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_rope_freq_base(config["rope_theta"])


def random_blocks(ggml_type: str, n_blocks: int, random: np.random.Generator) -> U8:
    """-> u8 [n_blocks * bytes of a block]: random codes, f16 scales that are small and normal."""
    n_bytes = _block(ggml_type)[1]
    blocks = random.integers(0, 256, (n_blocks, n_bytes), dtype=np.uint8)
    for at in HALVES[ggml_type]:
        halves = random.integers(HALF_FROM, HALF_BELOW, (n_blocks, 1), dtype="<u2")
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(-1)


def _block(ggml_type: str) -> tuple[int, int]:
    """-> weights and bytes of a block."""
    import gguf

    columns, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]
    return columns, n_bytes


def _check_disk(folder: Path, wanted: int) -> None:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free - FREE_BYTES
    if wanted > free:
        raise BudgetError(
            f"{folder}: the random model takes {wanted >> 20} MiB, but {max(0, free) >> 20} MiB "
            "can be used; free space, or set ELUTE_HOME to a folder on another disk"
        )
