"""Language models larger than the memory they are given, at 1-4 bits, on ordinary CPUs.

    import elute
    model = elute.load()
    print(model.chat("Why is the sky blue?").text)

Names load on first use, so that `import elute` costs a few milliseconds and no numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elute.api import Chunk, Completion, Model, Sampling, Score, load
    from elute.errors import (
        BudgetError,
        DeviceError,
        EluteError,
        FormatError,
        ShapeError,
        UnsupportedError,
    )

__all__ = [
    "BudgetError",
    "Chunk",
    "Completion",
    "DeviceError",
    "EluteError",
    "FormatError",
    "Model",
    "Sampling",
    "Score",
    "ShapeError",
    "UnsupportedError",
    "load",
]

_API = frozenset({"Chunk", "Completion", "Model", "Sampling", "Score", "load"})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("elute")
    if name not in __all__:
        raise AttributeError(f"module 'elute' has no attribute {name!r}")
    module = importlib.import_module("elute.api" if name in _API else "elute.errors")
    value = getattr(module, name)
    globals()[name] = value  # the next access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
