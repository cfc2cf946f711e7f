"""Re-orders a packed model: codes in channel order, those of matrices that read one input side by
side, so that an input channel is fetched and skipped by itself. Loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from elute.formats.packed import PackedModel
from elute.formats.packed_layout import MatrixRecord
from elute.formats.packed_writer import PackedWriter
from elute.pack import channels, quads
from elute.types import F16, F32, U8, InBank, QuantizedMatrix


def reorder(
    packed: PackedModel,
    out: Path,
    banks: Sequence[Sequence[str]],
    *,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> PackedModel:
    """Writes `packed`, whose matrices are in panel order, anew to `out`.

    banks     names of matrices with the same K, whose rows lie side by side in this order; others
              stay as they are, and so do banks of which one has a column order
    progress  called with (weights done, weights in all, tensor)

    The directory appears whole or not at all. Raises as PackedWriter does.
    """
    chosen = [names for names in banks if not any(_ordered(packed, name) for name in names)]
    in_banks = {name: names for names in chosen for name in names}
    sizes = {name: int(np.prod(record.shape)) for name, record in packed.records.items()}
    done, total = 0, sum(sizes.values())
    with PackedWriter(
        out,
        names=packed.names,
        config=packed.config,
        tokenizer=packed.tokenizer_files(),
        source=packed.source,
        recipe=packed.recipe,
        overwrite=force,
    ) as writer:
        written: set[str] = set()
        for name, record in packed.records.items():
            if name in written:
                continue
            members = in_banks.get(name, (name,))
            if name in in_banks:
                _write_bank(packed, writer, members)
            elif isinstance(record, MatrixRecord):
                writer.add_matrix(name, record.shape, [packed.matrix(name)])
            else:
                writer.add_vector(name, packed.vector(name))
            written.update(members)
            done += sum(sizes[member] for member in members)
            if progress is not None:
                progress(done, total, name)
    return PackedModel.open(out)


def _ordered(packed: PackedModel, name: str) -> bool:
    record = packed.records[name]
    return isinstance(record, MatrixRecord) and record.columns


def _write_bank(packed: PackedModel, writer: PackedWriter, names: Sequence[str]) -> None:
    matrices = [packed.matrix(name) for name in names]
    sizes = [channels.row_bytes(matrix.shape[0], matrix.bits) for matrix in matrices]
    rows = np.empty((matrices[0].shape[1], sum(sizes)), np.uint8)
    offsets = np.cumsum([0, *sizes]).tolist()
    for matrix, begin, end in zip(matrices, offsets, offsets[1:], strict=False):
        codes = quads.unpack_codes(matrix.planes, matrix.shape, matrix.bits)
        rows[:, begin:end] = channels.pack_codes(codes, matrix.bits)
    writer.add_bank(names[0], rows.shape[1], rows)
    for name, matrix, offset in zip(names, matrices, offsets, strict=False):
        writer.add_in_bank(
            name,
            InBank(
                shape=matrix.shape,
                scales=matrix.scales,
                offsets=matrix.offsets,
                affine=matrix.affine,
                zero=matrix.zero,
                bits=matrix.bits,
                group_size=matrix.group_size,
                bank=names[0],
                offset=offset,
            ),
        )


def dequantized(packed: PackedModel, name: str) -> F32:
    """w f32 [N, K] of a matrix in either order."""
    matrix = packed.in_bank(name)
    if matrix is None:
        return quads.unpack(packed.matrix(name)).dequantize()
    return dequantized_channels(packed, name, 0, matrix.shape[1])


def dequantized_channels(packed: PackedModel, name: str, begin: int, end: int) -> F32:
    """w[:, begin:end] f32 [N, end - begin] of a matrix that lies in a bank, in as much memory as
    that takes, whatever the matrix.
    """
    matrix = packed.in_bank(name)
    assert matrix is not None
    groups = np.arange(begin, end) // matrix.group_size
    first, last = int(groups[0]), int(groups[-1]) + 1

    def of_channels(packed_groups: F16) -> F16:
        of_groups = quads.unpack_groups(packed_groups[:, first:last], matrix.shape[0])
        by_channel: F16 = of_groups[groups - first]
        return by_channel

    return QuantizedMatrix(
        codes=bank_codes(packed, name, begin, end),
        scales=of_channels(matrix.scales),
        offsets=None if matrix.offsets is None else of_channels(matrix.offsets),
        affine=matrix.affine,
        zero=matrix.zero,
        bits=matrix.bits,
        group_size=1,
        columns=None,
    ).dequantize()


def bank_codes(packed: PackedModel, name: str, begin: int = 0, end: int | None = None) -> U8:
    """codes u8 [N, end - begin] of channels of a matrix that lies in a bank; of all K of them."""
    matrix = packed.in_bank(name)
    assert matrix is not None
    bank = packed.banks[matrix.bank]
    end = bank.n_rows if end is None else end
    block = begin // bank.rows_per_block
    blocks = packed.bank(matrix.bank)[block : -(-end // bank.rows_per_block)]
    rows = blocks[:, : bank.rows_per_block * bank.row_bytes].reshape(-1, bank.row_bytes)
    before = block * bank.rows_per_block
    size = channels.row_bytes(matrix.shape[0], matrix.bits)
    mine = rows[begin - before : end - before, matrix.offset : matrix.offset + size]
    return channels.unpack_codes(np.ascontiguousarray(mine), matrix.shape[0], matrix.bits)
