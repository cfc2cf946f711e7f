"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The GGUF file of the default model: $ELUTE_TEST_GGUF, else elute's cache; never fetched."""
    named = os.environ.get("ELUTE_TEST_GGUF")
    if named:
        path = Path(named)
    else:
        sources = pytest.importorskip("elute.formats.sources")
        path = sources.default_model_path()
    if not path.is_file():
        pytest.skip(f"the default model is not at {path}; run make demo, or set ELUTE_TEST_GGUF")
    return path
