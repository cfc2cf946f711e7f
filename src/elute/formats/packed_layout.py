"""Sizes, ranges and manifest records of the packed directory. Opens no file.

docs/packed-format.md is the specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elute.errors import FormatError
from elute.types import ACT_BLOCK, LUT_WIDTH, PANEL, Affine

FORMAT = "elute-packed"
LAYOUT = 1  # raised when the meaning of any byte changes
CHANNEL_LAYOUT = 2  # of folders that hold banks of channels
NEWEST_LAYOUT = CHANNEL_LAYOUT  # readers accept this and older
MANIFEST = "elute.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
PAGE_SUMS = "pages.crc32c"  # absent in folders that were written before there was one

ALIGNMENT = 4096  # a page, and the strictest O_DIRECT alignment in use
OVER_READ = 64  # readable bytes after the planes: one AVX-512 register beyond the last quad
MIN_GROUP = 16
TILE = 128  # outputs that lie together in a row of the channel order
_MAX_SIDE = 1 << 30  # rows and columns, rounded up to panels and blocks, are int32 in the kernels


def align(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def group_fits(n_columns: int, group_size: int) -> bool:
    """Whether pack.quads.check_groups accepts these sizes."""
    if n_columns % LUT_WIDTH or group_size < 1 or n_columns % group_size:
        return False
    if group_size == n_columns:
        return True
    whole_blocks = group_size % ACT_BLOCK == 0
    part_of_block = group_size >= MIN_GROUP and ACT_BLOCK % group_size == 0
    return whole_blocks or part_of_block


@dataclass(frozen=True)
class Part:
    """One safetensors tensor of a weight: `n_bytes` that count, zero-padded to `stored_bytes`."""

    suffix: str
    dtype: str
    item_bytes: int
    n_bytes: int

    @property
    def stored_bytes(self) -> int:
        return align(self.n_bytes + (OVER_READ if self.suffix == ".planes" else 0))

    @property
    def stored_items(self) -> int:
        return self.stored_bytes // self.item_bytes


@dataclass(frozen=True)
class MatrixRecord:
    """What elute.json says of a matrix w[N, K]."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    affine: Affine
    zero: int  # 0 unless SYMMETRIC
    columns: bool  # whether a column order is stored
    file: str
    bank: str | None = None  # whose rows hold the codes, in channel order; None: planes
    bank_offset: int = 0  # of this matrix within each row

    @property
    def n_panels(self) -> int:
        return -(-self.shape[0] // PANEL)

    @property
    def n_groups(self) -> int:
        return self.shape[1] // self.group_size

    @property
    def planes_bytes(self) -> int:
        """In panel order, padding apart."""
        return self.n_panels * (self.shape[1] // LUT_WIDTH) * (PANEL // 2) * self.bits

    @property
    def row_bytes(self) -> int:
        """Of a channel, in channel order."""
        return -(-self.shape[0] // TILE) * (TILE // 8) * self.bits

    def parts(self) -> Iterator[Part]:
        """In the order in which they lie in the file."""
        k = self.shape[1]
        if self.bank is None:
            yield Part(".planes", "U8", 1, self.planes_bytes)
        group_bytes = self.n_panels * self.n_groups * PANEL * 2
        yield Part(".scales", "F16", 2, group_bytes)
        if self.affine is not Affine.SYMMETRIC:
            yield Part(".offsets", "F16", 2, group_bytes)
        if self.columns:
            yield Part(".columns", "I32", 4, k * 4)

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "affine": self.affine.value,
            "zero": self.zero,
            "columns": self.columns,
            "file": self.file,
            **({} if self.bank is None else {"bank": self.bank, "bank_offset": self.bank_offset}),
        }


@dataclass(frozen=True)
class BankRecord:
    """What elute.json says of a bank: the rows of input channels, several matrices' side by side,
    in blocks of whole pages."""

    n_rows: int  # K of its matrices
    row_bytes: int
    rows_per_block: int
    file: str

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.rows_per_block)

    @property
    def block_bytes(self) -> int:
        return align(self.rows_per_block * self.row_bytes)

    @property
    def n_bytes(self) -> int:
        return self.n_blocks * self.block_bytes

    def part(self) -> Part:
        return Part(".channels", "U8", 1, self.n_bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            "n_rows": self.n_rows,
            "row_bytes": self.row_bytes,
            "rows_per_block": self.rows_per_block,
            "file": self.file,
        }


def rows_per_block(row_bytes: int) -> int:
    """The fewest rows of which at most an eighth of a block is padding."""
    return next(
        rows
        for rows in range(1, ALIGNMENT + 1)
        if align(rows * row_bytes) <= rows * row_bytes * 9 / 8
    )


def bank_from_json(value: Any, *, where: str) -> BankRecord:
    """Raises FormatError unless every field is present, typed and in its range."""
    fields = mapping(value, where=where)
    return BankRecord(
        n_rows=_integer(fields.get("n_rows"), 1, _MAX_SIDE, where=f"{where}: n_rows"),
        row_bytes=_integer(fields.get("row_bytes"), 1, _MAX_SIDE, where=f"{where}: row_bytes"),
        rows_per_block=_integer(
            fields.get("rows_per_block"), 1, ALIGNMENT, where=f"{where}: rows_per_block"
        ),
        file=plain_name(fields.get("file"), where=where),
    )


def check_banks(
    records: Mapping[str, MatrixRecord | VectorRecord],
    banks: Mapping[str, BankRecord],
    *,
    where: str,
) -> None:
    """Raises FormatError unless every matrix that names a bank lies in its rows."""
    for name, record in records.items():
        if not isinstance(record, MatrixRecord) or record.bank is None:
            continue
        bank = banks.get(record.bank)
        if bank is None:
            raise FormatError(
                f"{where}: {name}: found no bank {record.bank!r}; convert the model again"
            )
        end = record.bank_offset + record.row_bytes
        if bank.n_rows != record.shape[1] or end > bank.row_bytes or record.columns:
            raise FormatError(
                f"{where}: {name}: K={record.shape[1]} and bytes {record.bank_offset} to {end} of "
                f"a row do not fit the bank of {bank.n_rows} rows of {bank.row_bytes} bytes; "
                "convert the model again"
            )


@dataclass(frozen=True)
class VectorRecord:
    """What elute.json says of f32 values: a vector [L], or a matrix [N, K] kept as it is."""

    shape: tuple[int, ...]
    file: str

    def parts(self) -> Iterator[Part]:
        yield Part("", "F32", 4, math.prod(self.shape) * 4)

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "file": self.file}


Records = Mapping[str, MatrixRecord | VectorRecord]  # by tensor name, in the order written


def weight_bytes(records: Records) -> int:
    """Of all weights, padding apart."""
    return sum(_own_bytes(record) for record in records.values())


def _own_bytes(record: MatrixRecord | VectorRecord) -> int:
    parts = sum(part.n_bytes for part in record.parts())
    if isinstance(record, MatrixRecord) and record.bank is not None:
        return parts + record.row_bytes * record.shape[1]
    return parts


def bits_per_weight(records: Records) -> float:
    """Bits that the matrices take, scales, offsets and column orders included, per weight."""
    matrices = [r for r in records.values() if isinstance(r, MatrixRecord)]
    n_weights = sum(record.shape[0] * record.shape[1] for record in matrices)
    n_bytes = sum(_own_bytes(record) for record in matrices)
    return 8 * n_bytes / n_weights if n_weights else 0.0


def record_from_json(value: Any, *, where: str) -> MatrixRecord | VectorRecord:
    """Raises FormatError unless every field is present, typed and in its range."""
    fields = mapping(value, where=where)
    shape = fields.get("shape")
    if not isinstance(shape, list) or len(shape) not in (1, 2):
        raise FormatError(
            f"{where}: shape is {shape!r}, wanted a list of one or two sizes"
            "; convert the model again"
        )
    sizes = [_integer(size, 1, _MAX_SIDE, where=f"{where}: shape") for size in shape]
    file = plain_name(fields.get("file"), where=where)
    if len(sizes) == 1 or "bits" not in fields:
        return VectorRecord(shape=tuple(sizes), file=file)
    n, k = sizes
    bits = _integer(fields.get("bits"), 1, 8, where=f"{where}: bits")
    group_size = _integer(fields.get("group_size"), 1, _MAX_SIDE, where=f"{where}: group_size")
    if not group_fits(k, group_size):
        raise FormatError(
            f"{where}: group_size={group_size} does not fit K={k}; convert the model again"
        )
    try:
        affine = Affine(str(fields.get("affine")))
    except ValueError:
        raise FormatError(
            f"{where}: affine is {fields.get('affine')!r}, wanted {', '.join(Affine)}"
            "; convert the model again"
        ) from None
    largest_zero = 255 if affine is Affine.SYMMETRIC else 0
    zero = _integer(fields.get("zero"), 0, largest_zero, where=f"{where}: zero")
    columns = fields.get("columns")
    if not isinstance(columns, bool):
        raise FormatError(
            f"{where}: columns is {columns!r}, wanted true or false; convert the model again"
        )
    bank = fields.get("bank")
    if bank is not None and not isinstance(bank, str):
        raise FormatError(f"{where}: bank is {bank!r}, wanted a name; convert the model again")
    bank_offset = _integer(
        fields.get("bank_offset", 0), 0, _MAX_SIDE, where=f"{where}: bank_offset"
    )
    return MatrixRecord((n, k), bits, group_size, affine, zero, columns, file, bank, bank_offset)


def mapping(value: Any, *, where: str) -> Mapping[str, Any]:
    """Raises FormatError unless value is a JSON object."""
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: found {type(value).__name__}, wanted an object; convert the model again"
        )
    return value


def plain_name(value: Any, *, where: str) -> str:
    """Raises FormatError unless value names a file in the directory itself."""
    if (
        not isinstance(value, str)
        or value in ("", ".", "..")
        or set(value) & set("/\\")
        or not value.isprintable()  # NUL, and halves of characters, which no path can hold
    ):
        raise FormatError(
            f"{where}: file is {value!r}, wanted a plain file name; convert the model again"
        )
    return value


def _integer(value: Any, low: int, high: int, *, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FormatError(
            f"{where}: found {value!r}, wanted an integer from {low} to {high}"
            "; convert the model again"
        )
    return value
