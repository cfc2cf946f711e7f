from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeExecutor, FakeTemplate, FakeTokenizer

import elute
from elute import api

TESTS = Path(__file__).parent.parent
SOURCE = Path(elute.__file__).parent.parent


@pytest.fixture
def fake_load(monkeypatch):
    """Puts a fake model behind elute.load; it remembers the calls."""

    class Load:
        script = b"hello there"
        template = True
        context = 256
        calls: list[dict]

        def __init__(self):
            self.calls = []

        def __call__(self, model, **options):
            self.calls.append({"model": model, **options})
            self.executor = FakeExecutor(script=self.script, context=self.context)
            return api.Model(
                self.executor,
                FakeTokenizer(),
                name=str(model),
                path=Path("fake"),
                template=FakeTemplate() if self.template else None,
                sampling=api.Sampling(temperature=0),
                bits_per_weight=4.5,
            )

    load = Load()
    monkeypatch.setattr(api, "load", load)
    return load


@pytest.fixture
def elute_process():
    """Starts the command line in a process of its own, the fake model behind it."""
    started = []

    def start(*arguments, program="fake_cli.py", **options):
        path = os.pathsep.join([str(SOURCE), str(TESTS / "runtime"), str(TESTS / "cli")])
        process = subprocess.Popen(
            [sys.executable, str(TESTS / "cli" / program), *arguments],
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()
