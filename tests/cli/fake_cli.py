"""The elute command over a fake model that takes its time. Run by the tests of signals and pipes.

FAKE_BLOCK=1: the first forward is a call that lets no Python bytecode run in the main thread.
"""

import ctypes
import os
import time
from pathlib import Path

from fakes import FakeExecutor, FakeTemplate, FakeTokenizer

from elute import api
from elute.cli import main


class SlowExecutor(FakeExecutor):
    def forward(self, tokens, position, *, all_logits=False):
        if os.environ.get("FAKE_BLOCK"):
            print("blocked", file=__import__("sys").stderr, flush=True)
            # Like a native forward: the GIL is free, signal handlers of Python must wait.
            libc = ctypes.CDLL(None)
            until = time.monotonic() + 30
            while time.monotonic() < until:
                libc.poll(None, 0, 30_000)
        time.sleep(0.01)
        return super().forward(tokens, position, all_logits=all_logits)


def load(model, **_):
    if model == "broken":
        raise RuntimeError("a bug\nwith two lines")
    return api.Model(
        SlowExecutor(context=4000, script=b"word " * 600),
        FakeTokenizer(),
        name=str(model),
        path=Path("fake"),
        template=FakeTemplate(),
        sampling=api.Sampling(temperature=0),
    )


api.load = load
main()
