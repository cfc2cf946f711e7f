"""Reads a Hugging Face model folder: config, safetensors shards, tokenizer files.

Names and config keys leave here in the form of a plain text model: wrappers of multimodal models
are taken off and the "model." of base-model checkpoints is put on. Knows no quantization format.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import FormatError, UnsupportedError
from elute.formats.safetensors import DTYPES, SafetensorsFile, TensorEntry, parse_json
from elute.types import QuantizedMatrix, StoredCodes, TokenizerFiles

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
# How multimodal checkpoints prefix their text model, newest spelling first.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.")
LANGUAGE_HEAD = "language_model.lm_head."
# Keys that a multimodal config keeps at its top and that belong to the text model.
LIFTED_KEYS = (
    "torch_dtype",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "quantization_config",
)
MAX_NAME_BYTES = 255  # of a file name, on every file system in use
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class _StoredTensor:
    file: SafetensorsFile
    name: str  # as the file spells it

    @property
    def entry(self) -> TensorEntry:
        return self.file.entry(self.name)


@dataclass(frozen=True, eq=False)
class HfFolder:
    """A Checkpoint of float tensors, and the raw tensors for the readers of quantized folders."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, _StoredTensor]

    @classmethod
    def open(cls, path: Path) -> HfFolder:
        """Reads config.json and all safetensors headers; no tensor data.

        Raises FormatError for a folder that is incomplete or malformed, UnsupportedError for one
        that holds no safetensors.
        """
        config_path = path / "config.json"
        if not config_path.is_file():
            raise FormatError(
                f"{path}: found no config.json, wanted a Hugging Face model folder; name the "
                f"folder that holds config.json, or a .gguf file"
            )
        config = read_json_object(config_path)
        stored = _stored_tensors(path)
        text_config = config.get("text_config")
        if isinstance(text_config, dict):
            config, stored = _text_model(path, config, text_config, stored)
        return cls(path=path, config=config, tensors=_with_model_prefix(stored))

    @property
    def source(self) -> str:
        return str(self.path)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """quantization_config; empty for a float checkpoint."""
        quantization = self.config.get("quantization_config")
        if quantization is None:  # the key of compressed-tensors before 0.6
            quantization = self.config.get("compression_config")
        if quantization is None:
            # AutoGPTQ before 0.5 wrote its settings beside config.json, not into it.
            old_style = self.path / "quantize_config.json"
            if old_style.is_file():
                return {"quant_method": "gptq", **read_json_object(old_style)}
            return {}
        if not isinstance(quantization, dict):
            raise FormatError(
                f"{self.path / 'config.json'}: found a quantization_config that is a "
                f"{type(quantization).__name__}, wanted an object; correct config.json"
            )
        return quantization

    def names(self) -> Sequence[str]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def entry(self, name: str) -> TensorEntry:
        """The stored dtype, shape and place. Raises FormatError for an unknown name."""
        return self._stored(name).entry

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """The stored tensor, whatever its dtype, as a read-only view of the mapped file."""
        stored = self._stored(name)
        return stored.file.tensor(stored.name)

    def codes(self, name: str, *, headers_only: bool = False) -> StoredCodes | None:
        """None, or raises UnsupportedError, as `read`."""
        self._check_float(name)
        return None

    def read(self, name: str) -> npt.NDArray[Any] | QuantizedMatrix:
        """Raises UnsupportedError for a tensor of integers: a float folder has none."""
        self._check_float(name)
        values = self.tensor(name)
        return values.astype(np.float32) if values.dtype == np.float64 else values

    def tokenizer_files(self) -> TokenizerFiles:
        return self._tokenizer_files

    @cached_property
    def _tokenizer_files(self) -> TokenizerFiles:
        return read_tokenizer_files(self.path)

    def _check_float(self, name: str) -> None:
        dtype = DTYPES[self.entry(name).dtype]
        if not is_float(dtype):
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} holds {dtype}, wanted f32, f16 or bf16; "
                f"config.json declares no quantization that elute reads"
            )

    def _stored(self, name: str) -> _StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(
                f"{self.path}: found no tensor {name!r} among {len(self.tensors)}; the checkpoint "
                f"is incomplete or of another architecture than config.json says"
            ) from None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether tensors of this dtype are weights as they are (bf16 is no numpy kind of its own)."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises FormatError when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows add a byte order mark
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: found bytes that are not UTF-8 at {error.start}; fetch the file again"
        ) from None
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read ({error.strerror}); check that it may be read"
        ) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A file holding one JSON object. Raises FormatError for anything else."""
    value = parse_json(read_text(path), where=str(path), allow_nan=True)
    if not isinstance(value, dict):
        raise FormatError(
            f"{path}: found a JSON {type(value).__name__}, wanted an object; fetch the file again"
        )
    return value


def _stored_tensors(path: Path) -> dict[str, _StoredTensor]:
    index_path = path / INDEX_NAME
    if index_path.is_file():
        return _sharded(path, index_path)
    single = path / "model.safetensors"
    if not single.is_file():
        single = _only_safetensors(path)
    file = SafetensorsFile.open(single)
    return {name: _StoredTensor(file, name) for name in file.entries}


def _sharded(path: Path, index_path: Path) -> dict[str, _StoredTensor]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise FormatError(
            f"{index_path}: wanted a weight_map of tensor names to file names; fetch the file again"
        )
    shard_names = sorted(set(weight_map.values()))
    for name in shard_names:
        if not _is_plain_name(name):
            raise FormatError(
                f"{index_path}: found the shard name {name[:80]!r}, wanted a file name in this "
                f"folder; fetch the file again"
            )
    missing = [name for name in shard_names if not (path / name).is_file()]
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} of {len(shard_names)} shards are missing: "
            f"{', '.join(missing)}; fetch them into this folder"
        )
    files = {name: SafetensorsFile.open(path / name) for name in shard_names}
    absent = [t for t, shard in weight_map.items() if t not in files[shard].entries]
    if absent:
        raise FormatError(
            f"{path / weight_map[absent[0]]}: found no tensor {absent[0]!r}, which "
            f"{INDEX_NAME} places there ({len(absent)} such tensors); fetch the shards again"
        )
    return {name: _StoredTensor(files[shard], name) for name, shard in weight_map.items()}


def _is_plain_name(name: str) -> bool:
    """An index is data: it must not reach outside its folder, nor name what no file can be."""
    return (
        name not in ("", ".", "..")
        and not set(name) & set("/\\:")
        and name.isprintable()
        and len(name.encode()) <= MAX_NAME_BYTES
    )


def _only_safetensors(path: Path) -> Path:
    """The folder's one .safetensors file, for tools that do not call it model.safetensors."""
    found = sorted(p for p in path.glob("*.safetensors") if p.is_file())
    if len(found) == 1 and found[0].name.startswith("adapter_"):
        raise UnsupportedError(
            f"{path}: found only the adapter {found[0].name}, wanted a whole model; merge the "
            f"adapter into its base model first"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError(
            f"{path}: found {len(found)} safetensors files ({found[0].name}, ...) and no "
            f"{INDEX_NAME}, wanted the index that says which tensor lies where"
            "; fetch the index too"
        )
    pickles = sorted({p.name for pattern in PICKLES for p in path.glob(pattern)})
    if pickles:
        raise UnsupportedError(
            f"{path}: found only pickled weights ({pickles[0]}), which can run code when read; "
            f"convert them to safetensors with transformers' save_pretrained"
        )
    raise FormatError(
        f"{path}: found config.json and no weights, wanted model.safetensors; fetch the weights too"
    )


def _text_model(
    path: Path,
    config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    stored: Mapping[str, _StoredTensor],
) -> tuple[dict[str, Any], dict[str, _StoredTensor]]:
    """Takes the wrapper off a multimodal checkpoint: the text model's config and tensors alone."""
    lifted = {key: config[key] for key in LIFTED_KEYS if key in config and key not in text_config}
    text: dict[str, _StoredTensor] = {}
    for name, tensor in stored.items():
        if name.startswith(LANGUAGE_HEAD):
            text["lm_head." + name.removeprefix(LANGUAGE_HEAD)] = tensor
        elif name.startswith("lm_head."):
            text[name] = tensor
        else:
            for prefix in TEXT_PREFIXES:
                if name.startswith(prefix):
                    text["model." + name.removeprefix(prefix)] = tensor
                    break
    if not text:  # saved from the text model alone, with the whole config beside it
        return {**text_config, **lifted}, dict(stored)
    if len(text) < len(stored):
        logger.warning(
            "%s: a multimodal checkpoint, of which only the text model is read; %d other tensors "
            "are left out",
            path,
            len(stored) - len(text),
        )
    return {**text_config, **lifted}, text


def _with_model_prefix(stored: Mapping[str, _StoredTensor]) -> dict[str, _StoredTensor]:
    """Checkpoints saved from a base model (no head) lack the "model." before every name."""
    if any(name.startswith("model.") for name in stored):
        return dict(stored)
    if not any(name.startswith("embed_tokens.") for name in stored):
        return dict(stored)
    return {
        name if name.startswith("lm_head.") else f"model.{name}": tensor
        for name, tensor in stored.items()
    }


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """tokenizer.json and what stands beside it.

    Raises UnsupportedError when the folder has a tokenizer in another form, FormatError when it
    has none.
    """
    tokenizer_path = path / "tokenizer.json"
    if not tokenizer_path.is_file():
        for other in ("tokenizer.model", "tekken.json", "vocab.json", "tiktoken.model"):
            if (path / other).is_file():
                raise UnsupportedError(
                    f"{path}: found {other} and no tokenizer.json; make one with transformers: "
                    f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
        raise FormatError(f"{path}: found no tokenizer.json; fetch it from the model's repository")
    config = _optional_json(path / "tokenizer_config.json")
    return TokenizerFiles(
        tokenizer_json=read_text(tokenizer_path),
        tokenizer_config=config,
        chat_template=_chat_template(path, config),
        generation_config=_optional_json(path / "generation_config.json"),
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The default template, the only one that is used. A file wins over the config."""
    for file in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if (path / file).is_file():
            return read_text(path / file)
    for where, template in (
        ("tokenizer_config.json", tokenizer_config.get("chat_template")),
        ("chat_template.json", _optional_json(path / "chat_template.json").get("chat_template")),
    ):
        if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "rag"}]
            named = {
                str(t["name"]): t["template"]
                for t in template
                if isinstance(t, dict) and "name" in t and "template" in t
            }
            if len(named) != len(template):
                raise FormatError(
                    f"{path / where}: found a chat_template list with entries that are not unique "
                    f"pairs of name and template; fetch the file again"
                )
            template = named.get("default")
        if template is None:
            continue
        if not isinstance(template, str):
            raise FormatError(
                f"{path / where}: found a chat_template that is a {type(template).__name__}, "
                f"wanted a string; fetch the file again"
            )
        return template
    return None
