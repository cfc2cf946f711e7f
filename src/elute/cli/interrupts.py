"""Ctrl-C while a model answers: once ends the answer, twice leaves the program."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType
from typing import Self

from elute.cli import EXIT_INTERRUPTED


class Interrupts:
    """Counts SIGINT inside a `with` block, of the main thread.

    Python runs its signal handlers only between bytecodes, so a long native call would make the
    second Ctrl-C wait. The wakeup descriptor is written at once, and a thread that reads it can
    leave during the call.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def cancelled(self) -> bool:
        """Whether Ctrl-C was pressed in this block."""
        return self._stopped.is_set()

    def __enter__(self) -> Self:
        self._stopped.clear()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # as set_wakeup_fd demands
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_handler = signal.signal(signal.SIGINT, _ignore)
        self._thread = threading.Thread(target=self._watch, name="elute-interrupts", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGINT, self._old_handler)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        while received := self._reader.recv(1):
            if received[0] != signal.SIGINT:
                continue
            if self._stopped.is_set():
                os.write(2, b"\n")
                os._exit(EXIT_INTERRUPTED)  # the main thread may be minutes inside a native call
            self._stopped.set()


def _ignore(_signal: int, _frame: FrameType | None) -> None:
    """In place of KeyboardInterrupt: the watching thread decides."""
