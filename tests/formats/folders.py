"""Builds tiny Hugging Face folders for the tests of the readers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 64}


def write_folder(
    path: Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
) -> Path:
    """config.json and one model.safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    config = dict(CONFIG if config is None else config)
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, path / "model.safetensors"
    )
    return path
