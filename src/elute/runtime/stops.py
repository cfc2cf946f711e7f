"""Stop strings in a stream: text is held back while it may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence

from elute.errors import ShapeError


class StopFilter:
    """Passes text through up to the first stop string, which itself is never shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ShapeError for an empty stop string, which would stop everything."""
        if isinstance(stops, str):
            stops = (stops,)
        if "" in stops:
            raise ShapeError(
                "stop: found an empty string, wanted at least one character; remove it"
            )
        self._stops = tuple(stops)
        self._held = ""
        self.stopped: str | None = None  # the stop string that was found

    def feed(self, text: str) -> str:
        """-> what can be shown for certain."""
        if self.stopped is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found, key=lambda hit: hit[0])
            shown, self._held = self._held[:at], ""
            return shown
        keep = max(self._overlap(stop) for stop in self._stops)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that is a start of `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0

    def flush(self) -> str:
        """-> what was held back, when the text ends without a stop string."""
        shown, self._held = self._held, ""
        return shown
