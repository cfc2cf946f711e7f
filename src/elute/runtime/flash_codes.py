"""Codes of weights that are not in memory, for the rows that a device and its shadows need.

What is read goes past the window and the cache of the forwards, and never through a mapping: page
faults would count against the budget, and hold the thread up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.flash import banks
from elute.flash.fetch import HALF_BYTES, Fetcher, Reading, Run
from elute.flash.plan import BLOCK
from elute.flash.weights import FlashWeights
from elute.formats.packed import PackedModel
from elute.npu.codes import (
    BankCodes,
    Codes,
    PanelCodes,
    Scales,
    bank_columns,
    panel_columns,
    panel_rows,
    panels_of,
    put_columns,
)
from elute.npu.sites import Site
from elute.types import F32, I8, I64, PANEL, U8, InBank, PackedMatrix, WeightSource

LANES = 64  # channels of a block of panels


def codes_of(
    weights: WeightSource, packed: PackedModel, fetcher: Fetcher | None, *, isa: str
) -> Callable[[Site], Codes]:
    """Of the sites of an executor on these weights.

    fetcher  where not all of them are in memory
    """

    def find(site: Site) -> Codes:
        source = weights if isinstance(weights, FlashWeights) else packed
        in_bank = [source.in_bank(name) for name in site.weights]
        members = [each for each in in_bank if each is not None]
        if members:
            return _in_bank(source, packed, members, fetcher, isa=isa)
        matrices = [source.matrix(name) for name in site.weights]
        if isinstance(source, FlashWeights) and any(n in source.plan.places for n in site.weights):
            assert fetcher is not None
            places = [
                source.planes_at(name) if name in source.plan.places else None
                for name in site.weights
            ]
            return FlashPanelCodes(matrices, places, fetcher, isa=isa)
        return PanelCodes(matrices, isa=isa)

    return find


def _in_bank(
    source: FlashWeights | PackedModel,
    packed: PackedModel,
    members: Sequence[InBank],
    fetcher: Fetcher | None,
    *,
    isa: str,
) -> Codes:
    name = members[0].bank
    record = packed.banks[name]
    blocks = packed.bank(name) if isinstance(source, PackedModel) else source.bank_blocks(name)
    if blocks is not None:
        return BankCodes(
            members,
            blocks,
            rows_per_block=record.rows_per_block,
            row_bytes=record.row_bytes,
            isa=isa,
        )
    assert fetcher is not None
    (rows,) = (each for each in banks.channel_rows(packed) if each.name == name)
    return FlashBankCodes(members, rows, fetcher, isa=isa)


def least_half(packed: PackedModel, widest: int) -> int:
    """Of a fetcher's buffers, for inputs of at most `widest` channels: a block, a panel."""
    largest = max((bank.block_bytes for bank in packed.banks.values()), default=0)
    panel = widest * 4 * 8 + 2 * BLOCK  # of 8 bits
    return max(HALF_BYTES, -(-largest // BLOCK) * BLOCK, -(-panel // BLOCK) * BLOCK)


class FlashPanelCodes:
    """In panels, of which some products' planes are in memory and others are not.

    places  (file, offset) of the planes of each product that is not; matrices have their scales

    A channel is in every panel, a few hundred bytes in each: runs of pages, which are most of the
    matrix as soon as some channels are wanted, so that those whose gaps are small are one run.
    """

    def __init__(
        self,
        matrices: Sequence[PackedMatrix],
        places: Sequence[tuple[str, int] | None],
        fetcher: Fetcher,
        *,
        isa: str,
    ) -> None:
        self.shapes = tuple(matrix.shape for matrix in matrices)
        self._matrices, self._places = matrices, places
        self._fetcher, self._isa = fetcher, isa

    def ask(self, channels: npt.NDArray[Any]) -> _AskedPanels:
        steps, runs = [], []
        for i, place in enumerate(self._places):
            if place is None:
                continue
            for begin, end in self._cuts(i):
                steps.append((i, begin, end))
                runs.append(self._runs(i, begin, end, np.arange(begin, end), channels))
        return _AskedPanels(self, channels, steps, self._fetcher.begin(runs))

    def columns(
        self,
        channels: npt.NDArray[Any],
        steps: Sequence[tuple[int, int, int]],
        reading: Reading,
        scales: Scales,
    ) -> I8:
        starts = np.cumsum([0, *(n for n, _ in self.shapes)]).tolist()
        made = np.empty((channels.size, starts[-1]), np.int8)
        for i, place in enumerate(self._places):
            if place is None:
                made[:, starts[i] : starts[i + 1]] = panel_columns(
                    self._matrices[i], scales[i], channels, isa=self._isa
                )
        for (i, begin, end), half in zip(steps, reading.halves(), strict=True):
            panels = self._panels(i, begin, end, half)
            first = starts[i] + begin * PANEL
            made[:, first : first + panels.shape[0]] = panel_columns(
                panels, _part(scales[i], begin, end), channels, isa=self._isa
            )
        return made

    def rows(self, product: int, scales: F32, outputs: npt.NDArray[Any] | None = None) -> I8:
        if self._places[product] is None:
            return panel_rows(self._matrices[product], scales, outputs, isa=self._isa)
        n, k = self.shapes[product]
        wanted = np.arange(n) if outputs is None else outputs
        steps, runs = [], []
        for begin, end in self._cuts(product):
            mine = np.flatnonzero((wanted >= begin * PANEL) & (wanted < end * PANEL))
            if mine.size:
                steps.append((begin, end, mine))
                panels = np.unique(wanted[mine] // PANEL)
                runs.append(self._runs(product, begin, end, panels, np.arange(k)))
        made = np.empty((wanted.size, k), np.int8)
        reading = self._fetcher.begin(runs)
        try:
            for (begin, end, mine), half in zip(steps, reading.halves(), strict=True):
                made[mine] = panel_rows(
                    self._panels(product, begin, end, half),
                    _part(scales, begin, end),
                    wanted[mine] - begin * PANEL,
                    isa=self._isa,
                )
        finally:
            reading.close()
        return made

    def _panel_bytes(self, i: int) -> int:
        return self.shapes[i][1] * 4 * self._matrices[i].bits

    def _cuts(self, i: int) -> Iterator[tuple[int, int]]:
        """Runs of panels that fit half of a buffer."""
        n = self._matrices[i].n_panels
        most = max(1, (self._fetcher.half_bytes - 2 * BLOCK) // self._panel_bytes(i))
        for begin in range(0, n, most):
            yield begin, min(begin + most, n)

    def _first_page(self, i: int, begin: int) -> int:
        return begin * self._panel_bytes(i) // BLOCK

    def _panels(self, i: int, begin: int, end: int, half: U8) -> PackedMatrix:
        size = self._panel_bytes(i)
        at = begin * size - self._first_page(i, begin) * BLOCK
        return panels_of(self._matrices[i], begin, end, half[at : at + (end - begin) * size])

    def _runs(
        self, i: int, begin: int, end: int, panels: npt.NDArray[Any], channels: npt.NDArray[Any]
    ) -> list[Run]:
        """The pages that hold some channels of some of these panels."""
        place = self._places[i]
        assert place is not None
        file, offset = place
        size = self._panel_bytes(i)
        block = LANES * 4 * self._matrices[i].bits
        first_page = self._first_page(i, begin)
        n_pages = -(-end * size // BLOCK) - first_page
        blocks = np.unique(channels // LANES)
        starts = (panels[:, None] * size + blocks * block).ravel() - first_page * BLOCK
        ends = np.minimum(
            starts.reshape(len(panels), -1) + block,
            ((panels + 1) * size - first_page * BLOCK)[:, None],
        ).ravel()
        edges = np.zeros(n_pages + 1, np.int64)
        np.add.at(edges, starts // BLOCK, 1)
        np.add.at(edges, (ends - 1) // BLOCK + 1, -1)
        wanted = np.flatnonzero(edges.cumsum()[:-1] > 0)
        return [
            Run(file, offset + (first_page + a) * BLOCK, (b - a) * BLOCK, a * BLOCK)
            for a, b in runs_of(wanted, self._fetcher.gap_bytes // BLOCK)
        ]


class _AskedPanels:
    def __init__(
        self,
        codes: FlashPanelCodes,
        channels: npt.NDArray[Any],
        steps: Sequence[tuple[int, int, int]],
        reading: Reading,
    ) -> None:
        self._codes, self._channels, self._steps = codes, channels, steps
        self._reading = reading
        self.read_bytes = reading.read_bytes

    def columns(self, scales: Scales) -> I8:
        return self._codes.columns(self._channels, self._steps, self._reading, scales)

    def close(self) -> None:
        self._reading.close()


class FlashBankCodes:
    """In a bank, by channel: a channel is a row of a block, and blocks are what is read."""

    def __init__(
        self, matrices: Sequence[InBank], bank: banks.Rows, fetcher: Fetcher, *, isa: str
    ) -> None:
        self.shapes = tuple(matrix.shape for matrix in matrices)
        self._matrices, self._bank = matrices, bank
        self._fetcher, self._isa = fetcher, isa

    def ask(self, channels: npt.NDArray[Any]) -> _AskedBank:
        steps, runs = self._steps(channels)
        return _AskedBank(self, steps, self._fetcher.begin(runs))

    def rows(self, product: int, scales: F32, outputs: npt.NDArray[Any] | None = None) -> I8:
        n, k = self.shapes[product]
        made = np.empty((n if outputs is None else len(outputs), k), np.int8)
        asked = self.ask(np.arange(k))
        try:
            for channels, rows in asked.parts():
                part = bank_columns(
                    self._matrices[product : product + 1], [scales], channels, rows, isa=self._isa
                )
                put_columns(made, channels, part, outputs)
        finally:
            asked.close()
        return made

    def made(self, scales: Scales, channels: npt.NDArray[Any], rows: U8) -> I8:
        return bank_columns(self._matrices, scales, channels, rows, isa=self._isa)

    def _steps(
        self, channels: npt.NDArray[Any]
    ) -> tuple[list[tuple[npt.NDArray[Any], I64]], list[list[Run]]]:
        """-> (channels, where in a half their rows lie) of each step, and what it reads"""
        bank = self._bank
        size, per_block = bank.block_bytes, bank.rows_per_block
        most = self._fetcher.half_bytes // size
        of_channel = channels // per_block
        steps, reads = [], []
        runs = runs_of(np.unique(of_channel), self._fetcher.gap_bytes // size)
        at = 0
        taken: list[Run] = []
        mine: list[tuple[int, int]] = []
        while runs or taken:
            if not runs or at == most:
                where = np.concatenate([np.arange(a, b) for a, b in mine])
                inside = (of_channel >= where[0]) & (of_channel <= where[-1])
                chosen = channels[inside]
                place = np.searchsorted(where, chosen // per_block)
                rows_at = place * size + chosen % per_block * bank.row_bytes
                steps.append((chosen, rows_at))
                reads.append(taken)
                at, taken, mine = 0, [], []
                continue
            first, end = runs.pop(0)
            fits = min(end - first, most - at)
            taken.append(Run(bank.file, bank.offset + first * size, fits * size, at * size))
            mine.append((first, first + fits))
            at += fits
            if first + fits < end:
                runs.insert(0, (first + fits, end))
        return steps, reads


class _AskedBank:
    def __init__(
        self,
        codes: FlashBankCodes,
        steps: Sequence[tuple[npt.NDArray[Any], I64]],
        reading: Reading,
    ) -> None:
        self._codes, self._steps, self._reading = codes, steps, reading
        self.read_bytes = reading.read_bytes

    def parts(self) -> Iterator[tuple[npt.NDArray[Any], U8]]:
        """(channels, their rows of the bank)"""
        row_bytes = self._codes._bank.row_bytes
        for (channels, at), half in zip(self._steps, self._reading.halves(), strict=True):
            rows = np.lib.stride_tricks.as_strided(
                half, (half.size - row_bytes + 1, row_bytes), (1, 1), writeable=False
            )
            yield channels, rows[at]

    def columns(self, scales: Scales) -> I8:
        made = [self._codes.made(scales, channels, rows) for channels, rows in self.parts()]
        return made[0] if len(made) == 1 else np.concatenate(made)

    def close(self) -> None:
        self._reading.close()


def runs_of(numbers: npt.NDArray[Any], gap: int) -> list[tuple[int, int]]:
    """Ascending numbers as [begin, end), those with at most `gap` others between them in one."""
    cuts = np.flatnonzero(np.diff(numbers) > gap + 1)
    begins = numbers[np.concatenate([[0], cuts + 1])]
    ends = numbers[np.concatenate([cuts, [numbers.size - 1]])] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def _part(scales: F32, begin: int, end: int) -> F32:
    """Of some panels, of weight scales [1] or [N]"""
    return scales if scales.size == 1 else scales[begin * PANEL : end * PANEL]
