"""When processor and disk worked during one token, out of what a WeightStream noted. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

READ, WAIT, RELEASE = range(3)  # WeightStream::EventKind

Span = tuple[float, float]  # seconds from the start of the token


@dataclass(frozen=True)
class TokenTimeline:
    """Of one forward: it begins when the forward before it has used its last piece.

    compute  nobody waits; wait: a thread waits for weights; flash: a read is under way
    """

    seconds: float
    compute: tuple[Span, ...]
    flash: tuple[Span, ...]
    wait: tuple[Span, ...]

    def to_json(self) -> dict[str, Any]:
        def rounded(spans: Sequence[Span]) -> list[list[float]]:
            return [[round(start, 7), round(end, 7)] for start, end in spans]

        return {
            "seconds": round(self.seconds, 7),
            "compute": rounded(self.compute),
            "flash": rounded(self.flash),
            "wait": rounded(self.wait),
        }


def token_timeline(events: npt.NDArray[np.int64], n_pieces: int) -> TokenTimeline | None:
    """events i64 [n, 4] of WeightStream.events; the token of median length among those that are
    there as a whole. None where there is none.
    """
    releases = events[events[:, 0] == RELEASE]
    last = releases[(releases[:, 1] + 1) % n_pieces == 0]
    ends = {int(sequence) // n_pieces: int(at) for sequence, at in last[:, [1, 2]]}
    oldest = int(events[:, 2].min()) if len(events) else 0
    tokens = sorted(
        (ends[number] - ends[number - 1], ends[number - 1], ends[number])
        for number in ends
        if number - 1 in ends and ends[number - 1] > oldest
    )
    if not tokens:
        return None
    _, begin, end = tokens[len(tokens) // 2]

    def spans(kind: int) -> tuple[Span, ...]:
        found = events[events[:, 0] == kind][:, 2:]
        inside = found[(found[:, 1] > begin) & (found[:, 0] < end)]
        clipped = np.clip(inside, begin, end) - begin
        return _union((start / 1e9, stop / 1e9) for start, stop in sorted(clipped.tolist()))

    wait, seconds = spans(WAIT), (end - begin) / 1e9
    return TokenTimeline(seconds, _gaps(wait, seconds), spans(READ), wait)


def _union(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Of spans in order of their starts."""
    merged: list[Span] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def _gaps(spans: Sequence[Span], seconds: float) -> tuple[Span, ...]:
    """What lies between them, from 0 to `seconds`."""
    edges = [0.0, *(edge for span in spans for edge in span), seconds]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, end) for start, end in pairs if end > start)
