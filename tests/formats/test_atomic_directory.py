"""A directory appears whole or not at all, and two writers never meet."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elute.errors import BudgetError, EluteError
from elute.formats import atomic_directory as module
from elute.formats.atomic_directory import atomic_directory


def write(out: Path, text: str, *, replace: bool = False) -> None:
    with atomic_directory(out, replace=replace) as partial:
        (partial / "file").write_text(text)


def test_it_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with atomic_directory(out, replace=False) as partial:
        assert partial.name.startswith("out.partial-")
        assert not out.exists()
        (partial / "file").write_text("a")
    assert (out / "file").read_text() == "a"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out", replace=False):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing_leaves_only_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exception_while_replacing_keeps_the_old(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out", replace=True):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_replace_what_appeared_meanwhile_stays(tmp_path: Path) -> None:
    conversion = atomic_directory(tmp_path / "out", replace=False)
    (conversion.__enter__() / "file").write_text("late")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("early")
    with pytest.raises(EluteError, match="another conversion finished first"):
        conversion.__exit__(None, None, None)
    assert (tmp_path / "out" / "file").read_text() == "early"


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "a")
    assert (tmp_path / "out" / "file").read_text() == "a"


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", replace=False) as partial:
        with (
            pytest.raises(EluteError, match=rf"another conversion is writing {partial.name}"),
            atomic_directory(tmp_path / "out", replace=False),
        ):
            pass
        write(tmp_path / "other", "elsewhere is fine")
    assert (tmp_path / "out").is_dir()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from elute.formats.atomic_directory import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1]), replace=False) as partial:\n"
        "    (partial / 'file').write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    with pytest.raises(EluteError, match="another conversion is writing"):
        write(out, "too early")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    assert len(list(tmp_path.glob("out.partial-*"))) == 1
    write(out, "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.ENOSPC, BudgetError, "No space left on device.*; free space or choose another"),
        (errno.EDQUOT, BudgetError, "Disk quota exceeded.*; free space or choose another"),
        (errno.EIO, EluteError, "Input/output error.*; choose another directory"),
    ],
)
def test_disk_errors_are_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[EluteError],
    says: str,
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(kind, match=rf"out: cannot be written \({says}"):
        write(tmp_path / "out", "a")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EluteError, match="out: cannot be written"):
        write(tmp_path / "file" / "out", "a")
