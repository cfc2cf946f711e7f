"""Model files of any origin, read as one Checkpoint each."""

from __future__ import annotations

from pathlib import Path

from elute.errors import FormatError, UnsupportedError
from elute.types import Checkpoint

GGUF_MAGIC = b"GGUF"
# Which reader takes which quantization_config.quant_method.
SUPPORTED_METHODS = ("gptq", "awq", "bitnet")


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognises a GGUF file or a Hugging Face folder (float, GPTQ, AWQ or BitNet) and opens it.

    Reads headers only. Raises FormatError for what is no model and UnsupportedError for a model in
    a form that elute does not read.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FormatError(f"{path}: no such file or folder; check the path")
    if not path.is_file():  # opening a pipe would wait for its writer
        raise FormatError(f"{path}: is neither a file nor a folder; name a file")
    if path.suffix == ".safetensors":
        raise UnsupportedError(
            f"{path}: a safetensors file alone lacks config and tokenizer; name its folder "
            f"{path.parent} instead"
        )
    if path.name == "config.json":
        raise UnsupportedError(f"{path}: name the folder {path.parent} instead")
    if path.suffix != ".gguf" and not _is_gguf(path):
        raise FormatError(
            f"{path}: wanted a .gguf file or a Hugging Face model folder; name one of them"
        )
    from elute.formats.gguf import open_gguf

    return open_gguf(path)


def _is_gguf(path: Path) -> bool:
    """By content: the blobs of the shared hub cache have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read ({error.strerror}); check that it may be read"
        ) from None


def _open_folder(path: Path) -> Checkpoint:
    from elute.formats.hf_folder import HfFolder

    if (path / "elute.json").is_file():
        raise UnsupportedError(
            f"{path}: this folder is already packed by elute; load it as it is, or convert the "
            f"model that it was made from"
        )
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if ggufs:
            raise UnsupportedError(
                f"{path}: found {len(ggufs)} GGUF files and no config.json; name one file, such as "
                f"{path / ggufs[0]}"
            )
    folder = HfFolder.open(path)
    method = folder.quantization.get("quant_method")
    if method is None and not folder.quantization:
        if any(name.endswith(".qweight") for name in folder.names()):
            raise FormatError(
                f"{path}: found packed tensors (.qweight) and no quantization_config in "
                f"config.json, wanted one that names the format; fetch config.json again"
            )
        return folder
    if method == "gptq":
        from elute.formats.gptq import GptqFolder

        return GptqFolder.open(folder)
    if method == "awq":
        from elute.formats.awq import AwqFolder

        return AwqFolder.open(folder)
    if method == "bitnet":
        from elute.formats.bitnet import BitnetFolder

        return BitnetFolder.open(folder)
    raise UnsupportedError(
        f"{path}: found quant_method {method!r}, which elute does not read; wanted one of "
        f"{', '.join(SUPPORTED_METHODS)}, a float checkpoint or a GGUF file"
    )
