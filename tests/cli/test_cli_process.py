"""What only a real process shows: signals, pipes, tracebacks."""

import os
import signal
import subprocess
import time

import pytest

posix_only = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@posix_only
def test_ctrl_c_ends_the_answer_with_its_figures(elute_process):
    process = elute_process("run", "default", "x")
    assert process.stdout.read(4) == "word"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert len(out) < 3000
    assert "generated" in err
    assert "Traceback" not in err


@posix_only
def test_a_second_ctrl_c_leaves_during_a_native_call(elute_process, monkeypatch):
    monkeypatch.setenv("FAKE_BLOCK", "1")
    process = elute_process("run", "default", "x")
    assert process.stderr.readline() == "blocked\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None, "once waits for the call"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130
    assert "Traceback" not in process.stderr.read()


@posix_only
def test_chat_goes_on_after_ctrl_c(elute_process):
    process = elute_process("chat")
    process.stdin.write("x\n")
    process.stdin.flush()
    assert process.stdout.read(4) == "word"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("prompt")
    process.stdin.write("/exit\n")
    process.stdin.close()
    assert process.wait(timeout=10) == 0


@posix_only
def test_a_reader_that_leaves_is_no_error(elute_process):
    process = elute_process("run", "-q", "default", "x")
    assert process.stdout.read(4) == "word"
    process.stdout.close()
    assert process.wait(timeout=10) == 0
    assert process.stderr.read() == ""


@posix_only
def test_closed_streams_are_no_error(elute_process):
    closed = {"preexec_fn": lambda: [os.close(stream) for stream in (0, 1)]}
    process = elute_process("run", "-q", "default", "x", "--max-tokens", "3", **closed)
    assert process.wait(timeout=10) == 0
    assert process.stderr.read() == ""


def test_an_unexpected_error_is_one_line(elute_process, monkeypatch):
    process = elute_process("run", "broken", "x")
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (1, "")
    assert err == (
        "error: RuntimeError: a bug with two lines (unexpected; ELUTE_DEBUG=1 shows more)\n"
    )
    monkeypatch.setenv("ELUTE_DEBUG", "1")
    process = elute_process("run", "broken", "x")
    assert "Traceback" in process.communicate(timeout=10)[1]


def test_help_does_not_import_numpy(elute_process):
    code = (
        "import sys; from elute.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'numpy' not in sys.modules and 'rich' not in sys.modules"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
