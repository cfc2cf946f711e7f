"""Fixtures that several rooms share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The GGUF file of the default model: $ELUTE_TEST_GGUF, else elute's cache; never fetched."""
    from elute.formats.sources import default_model_path

    named = os.environ.get("ELUTE_TEST_GGUF")
    path = Path(named) if named else default_model_path()
    if path is None or not path.is_file():
        pytest.skip(f"the default model is not here ({path}); run make demo or set ELUTE_TEST_GGUF")
    return path


@pytest.fixture(scope="session", autouse=True)
def kernels_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a run of tests keeps what the race of the kernels measured (and beside it what the disk
    gave), instead of in the user's cache."""
    from elute.flash import disk
    from elute.kernels import registry

    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "cache_dir", lambda: folder)
        patch.setattr(disk, "cache_dir", lambda: folder)
        yield folder / "kernels.json"


@pytest.fixture(autouse=True)
def _elute_logger() -> Iterator[None]:
    """Commands and some tests set up the `elute` logger; the next test finds it as it was."""
    logger = logging.getLogger("elute")
    before = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
