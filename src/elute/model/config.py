"""Typed, checked access to the keys of a Hugging Face config.json. Knows no family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elute.errors import FormatError, UnsupportedError
from elute.model.ops import Activation

# Largest size that a config may state: tensor sides and positions are i32 in the native executor.
MAX_COUNT = 2**31 - 1
# No model needs numbers beyond these, and the product or quotient of any two is finite in f32.
MIN_NUMBER, MAX_NUMBER = 1e-12, 1e12
_SHOWN_CHARACTERS = 60  # a hostile value must not become a message of megabytes

_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu2": Activation.RELU2,
}


@dataclass(frozen=True, eq=False)
class Config:
    """A JSON object and its place, for messages.

    A key whose value is null counts as missing, as in transformers. Every accessor raises
    FormatError when the key is missing without a default, or its value has the wrong type or range.
    """

    values: Mapping[str, Any]
    where: str = "config.json"

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None, *, at_most: int = MAX_COUNT) -> int:
        """A whole number from 1 to `at_most`."""
        return self._whole(key, default, at_least=1, at_most=at_most)

    def index(self, key: str, default: int | None = None) -> int:
        """A whole number from 0."""
        return self._whole(key, default, at_least=0, at_most=MAX_COUNT)

    def number(self, key: str, default: float | None = None, *, above: float = MIN_NUMBER) -> float:
        """A number greater than `above`, at most MAX_NUMBER."""
        wanted = f"a number above {above:g}, at most {MAX_NUMBER:g}"
        value = self._value(key, default, wanted)
        if not _is_number(value, above):
            raise self.wrong(key, wanted)
        return float(value)

    def optional_count(self, key: str) -> int | None:
        return self.count(key) if self.has(key) else None

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default, "a string")
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty when the key is missing."""
        values = self._list(key, "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "a list of strings")
        return tuple(values)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers in the range of `number`; empty when the key is missing."""
        wanted = f"a list of numbers above {MIN_NUMBER:g}, at most {MAX_NUMBER:g}"
        values = self._list(key, wanted)
        if not all(_is_number(value, MIN_NUMBER) for value in values):
            raise self.wrong(key, wanted)
        return tuple(float(value) for value in values)

    def indices(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0; empty when the key is missing."""
        wanted = "a list of whole numbers from 0"
        values = self._list(key, wanted)
        if not all(type(value) is int and value >= 0 for value in values):
            raise self.wrong(key, wanted)
        return tuple(values)

    def part(self, key: str) -> Config:
        """The object under `key`; empty when the key is missing."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Config(value, f"{self.where}: {key}")

    def activation(self, key: str, default: str) -> Activation:
        """Raises UnsupportedError for an activation function that no kernel computes."""
        name = self.text(key, default)
        if name not in _ACTIVATIONS:
            raise self.unsupported(f"{key} is {shown(name)}", ", ".join(sorted(_ACTIVATIONS)))
        return _ACTIVATIONS[name]

    def wrong(self, key: str, wanted: str) -> FormatError:
        """The error for the value under `key`, ready to raise."""
        return self.misfit(f"{key} is {shown(self.values.get(key))}", wanted)

    def misfit(self, found: str, wanted: str) -> FormatError:
        """The error for something that this file should not say, ready to raise."""
        return FormatError(
            f"{self.where}: {found}, wanted {wanted}; correct the file or download the model again"
        )

    def unsupported(self, found: str, known: str) -> UnsupportedError:
        """The error for something that elute does not compute, ready to raise."""
        return UnsupportedError(
            f"{self.where}: {found}, and elute runs {known}; use a model that has one of these"
        )

    def _value(self, key: str, default: Any, wanted: str) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.misfit(f"found no {key}", wanted)
        return default

    def _whole(self, key: str, default: int | None, *, at_least: int, at_most: int) -> int:
        wanted = f"a whole number from {at_least} to {at_most}"
        value = self._value(key, default, wanted)
        if isinstance(value, float) and value.is_integer():  # some exporters write 4096.0
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, wanted)
        if not at_least <= value <= at_most:
            raise self.wrong(key, wanted)
        return value

    def _list(self, key: str, wanted: str) -> Sequence[Any]:
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise self.wrong(key, wanted)
        return value


def _is_number(value: object, above: float) -> bool:
    """Compared before any conversion: json reads integers of any length. False for NaN."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and above < value <= MAX_NUMBER
    )


def shown(value: object) -> str:
    """A value for a message, cut to a line's length."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = "a value too long to print"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
