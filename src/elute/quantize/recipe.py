"""What each tensor is quantized to, as ordered rules. Quantizes nothing and reads no weights."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elute.errors import FormatError, ShapeError
from elute.formats.packed_layout import group_fits
from elute.formats.safetensors import parse_json
from elute.types import LUT_WIDTH, Affine, StoredCodes

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DEFAULT_BITS = 4
TERNARY_BITS = 2
TERNARY_ZERO = 1  # codes 0, 1, 2 are -1, 0, 1; code 3 never occurs
OUTER_BITS = 8  # embedding and head: the rows of rare tokens have no others to average errors out
# At 4.5 bits a weight, symmetric groups of 32 beat asymmetric groups of 64: perplexity 27.5 : 30.8
# on SmolLM2-135M, squared error 0.0075 : 0.0080 on normal, 0.0117 : 0.0122 on Student-t weights.
DEFAULT_GROUP = 32


class Scheme(StrEnum):
    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"
    TERNARY = "ternary"
    KEEP = "keep"  # the codes of the checkpoint, even when all else is requantized


@dataclass(frozen=True)
class Rule:
    """How to quantize the tensors whose name matches a shell pattern."""

    match: str
    bits: int = DEFAULT_BITS
    group_size: int | None = DEFAULT_GROUP  # None: the whole row
    scheme: Scheme = Scheme.SYMMETRIC

    def for_columns(self, n_columns: int, *, where: str) -> Rule:
        """This rule with the largest group that packs a row of n_columns and is not above its own,
        or else with the whole row. Raises ShapeError when no group packs that row.
        """
        if n_columns % LUT_WIDTH:
            raise ShapeError(
                f"{where}: K={n_columns} is not a multiple of {LUT_WIDTH}; pad K to "
                f"{-(-n_columns // LUT_WIDTH) * LUT_WIDTH}"
            )
        wanted = min(self.group_size or n_columns, n_columns)
        fitting = (g for g in range(wanted, 0, -1) if group_fits(n_columns, g))
        return replace(self, group_size=next(fitting, n_columns))

    def stored(self, n_columns: int) -> StoredCodes:
        """What quantizing by this rule, fitted to its rows, gives: as rtn and ternary do."""
        group_size = self.group_size or n_columns
        if self.scheme is Scheme.TERNARY:
            return StoredCodes(TERNARY_BITS, group_size, Affine.SYMMETRIC, TERNARY_ZERO)
        if self.scheme is Scheme.ASYMMETRIC or self.bits == 1:  # one bit has no code in the middle
            return StoredCodes(self.bits, group_size, Affine.MIN, 0)
        return StoredCodes(self.bits, group_size, Affine.SYMMETRIC, 1 << (self.bits - 1))

    def to_json(self) -> dict[str, Any]:
        group: int | str = "row" if self.group_size is None else self.group_size
        return {
            "match": self.match,
            "bits": self.bits,
            "group_size": group,
            "scheme": self.scheme.value,
        }


@dataclass(frozen=True)
class Recipe:
    """Rules in order; the first whose pattern matches a tensor's name decides.

    Tensors that the checkpoint holds as codes keep them, whatever the rules say, unless requantize.
    """

    rules: tuple[Rule, ...]
    requantize: bool = False

    @classmethod
    def default(cls, *, bits: int = DEFAULT_BITS, group_size: int | None = DEFAULT_GROUP) -> Recipe:
        """`bits` for every linear layer, 8 for the embedding and the head."""
        return cls(_default_rules(Rule("*", bits=bits, group_size=group_size)))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a .toml or .json file; docs/packed-format.md shows both.

        Fields that a rule leaves out come from the top level, and the rules of `default` follow
        the file's.

        Raises FormatError, naming the rule and what it may say.
        """
        path = Path(path)
        try:
            body = path.read_bytes()
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror}); name a file") from None
        if path.suffix not in (".json", ".toml"):
            raise FormatError(
                f"{path}: a recipe ends in .json or .toml, found {path.suffix!r}; rename it"
            )
        return cls.from_json(
            parse_json(body, where=str(path)) if path.suffix == ".json" else _toml(body, path),
            where=str(path),
        )

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> Recipe:
        """The parsed contents of a recipe file. Raises FormatError as `load` does."""
        fields = _fields(value, {"bits", "group_size", "scheme", "rules", "requantize"}, where)
        fallback = _rule({**fields, "match": "*"}, Rule("*"), where)
        listed = fields.get("rules", [])
        if not isinstance(listed, list):
            raise FormatError(
                f"{where}: rules is {listed!r}, wanted a list of objects; correct the recipe"
            )
        rules: list[Rule] = []
        for number, entry in enumerate(listed, start=1):
            at = f"{where}: rule {number}"
            given = _fields(entry, {"match", "bits", "group_size", "scheme"}, at)
            if "match" not in given:
                raise FormatError(f"{at}: has no match; add one such as match = '*.q_proj.weight'")
            rules.append(_rule(given, fallback, at))
        requantize = fields.get("requantize", False)
        if not isinstance(requantize, bool):
            raise FormatError(
                f"{where}: requantize is {requantize!r}, wanted true or false; correct the recipe"
            )
        return cls(rules=(*rules, *_default_rules(fallback)), requantize=requantize)

    def rule_for(self, name: str) -> Rule:
        """Raises FormatError when no rule matches."""
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                return rule
        raise FormatError(f"recipe: no rule matches {name!r}; add one that ends with match = '*'")

    def to_json(self) -> dict[str, Any]:
        return {"rules": [rule.to_json() for rule in self.rules], "requantize": self.requantize}


def _default_rules(fallback: Rule) -> tuple[Rule, ...]:
    scheme = Scheme.SYMMETRIC if fallback.scheme is Scheme.TERNARY else fallback.scheme
    outer = replace(fallback, bits=OUTER_BITS, scheme=scheme)
    return replace(outer, match=EMBEDDING), replace(outer, match=HEAD), replace(fallback, match="*")


def _rule(given: Mapping[str, Any], fallback: Rule, where: str) -> Rule:
    match = given["match"]
    if not isinstance(match, str) or not match:
        raise FormatError(
            f"{where}: match is {match!r}, wanted a pattern such as '*.weight'; correct the recipe"
        )
    bits = given.get("bits", fallback.bits)
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise FormatError(
            f"{where}: bits is {bits!r}, wanted an integer from 1 to 8; correct the recipe"
        )
    scheme = _scheme(given, fallback, where)
    if scheme is Scheme.TERNARY:
        if given.get("bits", TERNARY_BITS) != TERNARY_BITS:
            raise FormatError(
                f"{where}: ternary with bits={bits}, wanted no bits or {TERNARY_BITS}"
                "; correct the recipe"
            )
        bits = TERNARY_BITS
    return Rule(match, bits, _group_size(given, fallback, where), scheme)


def _group_size(given: Mapping[str, Any], fallback: Rule, where: str) -> int | None:
    if "group_size" not in given:
        return fallback.group_size
    size = given["group_size"]
    if size == "row":
        return None
    # any row long enough: the sizes that pack some K
    if isinstance(size, int) and not isinstance(size, bool) and group_fits(2 * size, size):
        return size
    raise FormatError(
        f"{where}: group_size is {size!r}, wanted 16, 32, 64, a multiple of 64, or 'row'"
        "; correct the recipe"
    )


def _scheme(given: Mapping[str, Any], fallback: Rule, where: str) -> Scheme:
    if "scheme" not in given:
        return fallback.scheme
    try:
        return Scheme(given["scheme"])
    except ValueError:
        raise FormatError(
            f"{where}: scheme is {given['scheme']!r}, wanted one of {', '.join(Scheme)}"
            "; correct the recipe"
        ) from None


def _fields(value: Any, known: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: found {type(value).__name__}, wanted an object; correct the recipe"
        )
    for key in value:
        if key not in known:
            raise FormatError(
                f"{where}: found {key!r}, wanted only {', '.join(sorted(known))}"
                "; correct the recipe"
            )
    return value


def _toml(body: bytes, path: Path) -> Any:
    try:
        return tomllib.loads(body.decode())
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except RecursionError:
        raise FormatError(f"{path}: found TOML nested too deeply to read; correct it") from None
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{path}: found invalid TOML ({error}); correct it") from None
