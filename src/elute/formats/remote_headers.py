"""A hub model's headers without its weights: a folder of files whose tensors are holes.

Each file of weights has its header and its length, and takes no room on the disk; readers open the
folder as if all were there, and must not read a tensor. What is transferred: config.json, the
index, and of each file of weights its header in ranges of FIRST_BYTES and up.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elute.errors import EluteError, UnsupportedError
from elute.formats.hf_folder import INDEX_NAME, read_json_object
from elute.formats.hub import hub_errors, no_weights
from elute.formats.safetensors import MAX_HEADER_BYTES

FIRST_BYTES = 1 << 16  # a header of some 500 tensors; a longer one takes a second range
GGUF_FIRST_BYTES = 1 << 20  # most of a vocabulary; doubled until the header is whole
SMALL_FILES = ("config.json", "quantize_config.json")
CHUNK_BYTES = 1 << 14
TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")


@dataclass(frozen=True)
class RemoteRepository:
    """One revision of a hub repository; `model` is what messages call it."""

    repo: str
    model: str
    revision: str | None
    endpoint: str | None

    def files(self) -> list[str]:
        """Raises as formats.hub.fetch_folder."""
        from huggingface_hub import HfApi

        with hub_errors(self.model, None):
            api = HfApi(endpoint=self.endpoint, library_name="elute")
            return api.list_repo_files(self.repo, revision=self.revision)

    def read(self, file: str, first: int, end: int) -> tuple[bytes, int]:
        """Bytes first .. end - 1 of a file, fewer at its end, and the size of the whole file.

        Reads no more than that where a server ignores ranges. Raises as formats.hub.fetch_file.
        """
        from huggingface_hub import get_session, hf_hub_url, utils

        url = hf_hub_url(self.repo, file, revision=self.revision, endpoint=self.endpoint)
        headers = {
            **utils.build_hf_headers(library_name="elute"),  # type: ignore[attr-defined]
            "Range": f"bytes={first}-{end - 1}",
            "Accept-Encoding": "identity",  # a compressed answer has other ranges
        }
        with (
            hub_errors(self.model, file),
            get_session().stream("GET", url, headers=headers, timeout=60) as answer,
        ):
            utils.hf_raise_for_status(answer)  # type: ignore[attr-defined]
            skipped = 0 if answer.status_code == 206 else first
            ranged = TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
            total = int(ranged[1] if ranged else answer.headers["Content-Length"])
            wanted = skipped + min(end, total) - first
            body = bytearray()
            for chunk in answer.iter_bytes(CHUNK_BYTES):
                body += chunk
                if len(body) >= wanted:
                    break
        if len(body) < wanted:
            raise EluteError(
                f"{self.model}: the download of {file} broke off after {len(body)} of {wanted} "
                "bytes; run the command again"
            )
        return bytes(body[skipped:wanted]), total

    def whole(self, file: str) -> bytes:
        body, total = self.read(file, 0, FIRST_BYTES)
        return body if len(body) == total else body + self.read(file, len(body), total)[0]


def fetch_headers(repository: RemoteRepository, file: str | None, folder: Path) -> Path:
    """Puts what a plan needs into `folder` -> what open_checkpoint opens.

    file  a GGUF file of the repository; None: the repository's safetensors

    Raises as formats.hub.fetch_folder and fetch_file, FormatError for a header that is none.
    """
    if file is not None:
        target = folder / Path(file).name
        _gguf(repository, file, target)
        return target
    listed = repository.files()
    weights = [name for name in listed if name.endswith(".safetensors") and "/" not in name]
    weights = [name for name in weights if not name.startswith("consolidated")]
    if not weights:
        raise UnsupportedError(no_weights(repository.model, listed))
    for name in (*SMALL_FILES, INDEX_NAME):
        if name in listed:
            (folder / name).write_bytes(repository.whole(name))
    if INDEX_NAME in listed:  # there may be copies beside those that it names
        named = read_json_object(folder / INDEX_NAME).get("weight_map")
        used = set(named.values()) if isinstance(named, dict) else set()
        weights = [name for name in weights if name in used]
    for name in weights:
        _safetensors(repository, name, folder / name)
    return folder


def _safetensors(repository: RemoteRepository, file: str, target: Path) -> None:
    body, total = repository.read(file, 0, FIRST_BYTES)
    if len(body) >= 8:
        (header_bytes,) = struct.unpack_from("<Q", body)
        end = 8 + header_bytes
        if header_bytes <= MAX_HEADER_BYTES and len(body) < end <= total:
            body += repository.read(file, len(body), end)[0]
    _with_hole(target, body, total)


def _gguf(repository: RemoteRepository, file: str, target: Path) -> None:
    from elute.formats.gguf import ROPE_FREQS
    from elute.formats.gguf_header import GgufHeader, HeaderCut, read_header

    body, total = repository.read(file, 0, GGUF_FIRST_BYTES)
    header: GgufHeader | None = None
    while header is None:
        try:
            header = read_header(target, np.frombuffer(body, np.uint8), file_bytes=total)
        except HeaderCut:
            body += repository.read(file, len(body), 2 * len(body))[0]
    _with_hole(target, body, total)
    factors = header.tensors.get(ROPE_FREQS)  # belongs to the config, though it is a tensor
    if factors is not None and factors.offset + factors.n_bytes > len(body):
        end = factors.offset + min(factors.n_bytes, FIRST_BYTES)
        values = repository.read(file, factors.offset, end)[0]
        with target.open("r+b") as opened:
            opened.seek(factors.offset)
            opened.write(values)


def _with_hole(target: Path, body: bytes, total: int) -> None:
    with target.open("wb") as opened:
        opened.write(body)
        opened.truncate(total)


def renamed(
    error: EluteError, folder: Path, repository: RemoteRepository, file: str | None
) -> EluteError:
    """The error with the model's name where it named what was fetched into `folder`."""
    told = str(error)
    if file is not None:
        told = told.replace(str(folder / Path(file).name), repository.model)
    return type(error)(told.replace(str(folder), repository.model))
