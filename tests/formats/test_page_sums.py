"""Page sums: those of the files, however they were written; and every way of being damaged."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_matrix
from test_packed import writer

from elute import _native
from elute.errors import FormatError, UnsupportedError
from elute.formats.packed import PackedModel
from elute.formats.page_sums import PAGE, PageSummer, PageSums
from elute.formats.verify import verify
from elute.pack import quads
from elute.types import Affine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two weight files, with three matrices and a vector."""
    out = tmp_path / "model"
    with writer(out, ["a", "b", "c", "v"], max_shard_bytes=60_000) as packed:
        for seed, name in enumerate("abc"):
            matrix = random_matrix(
                64, 512, bits=4, group_size=32, affine=Affine.MIN, seed=seed, columns=True
            )
            packed.add_matrix(name, matrix.shape, [quads.pack(matrix)])
        packed.add_vector("v", np.arange(5, dtype=np.float32))
    assert len(list(out.glob("*.safetensors"))) >= 2
    return out


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def flip(file: Path, at: int, bit: int = 1) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ bit]))


def without_sums(folder: Path) -> None:
    """Makes it a folder of an older version."""
    manifest = json.loads((folder / "elute.json").read_text())
    del manifest["files"]["pages.crc32c"]
    (folder / "elute.json").write_text(json.dumps(manifest))
    (folder / "pages.crc32c").unlink()


@given(sizes=st.lists(st.integers(0, 3 * PAGE), max_size=12), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_sums_do_not_depend_on_the_pieces(sizes: list[int], seed: int) -> None:
    total = -(-sum(sizes) // PAGE) * PAGE
    data = np.random.default_rng(seed).integers(0, 256, total, dtype=np.uint8)
    summer = PageSummer()
    at = 0
    for size in [*sizes, total - sum(sizes)]:
        summer.add(data[at : at + size])
        at += size
    assert np.array_equal(summer.sums(), _native.crc32c_pages(data))


def test_the_writer_sums_every_page_of_every_file(folder: Path) -> None:
    wanted = [_native.crc32c_pages(np.fromfile(file, np.uint8)) for file in weight_files(folder)]
    data = (folder / "pages.crc32c").read_bytes()
    assert np.array_equal(np.frombuffer(data, "<u4"), np.concatenate(wanted))
    listed = json.loads((folder / "elute.json").read_text())["files"]["pages.crc32c"]
    assert listed == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sums = PackedModel.open(folder).page_sums()
    for file, of in zip(weight_files(folder), wanted, strict=True):
        assert np.array_equal(sums.of(file.name), of)
        assert sums.bad_pages(folder, file.name) == []


def test_a_folder_of_an_older_version_opens_and_has_none(folder: Path) -> None:
    without_sums(folder)
    model = PackedModel.open(folder)
    assert model.matrix("a").shape == (64, 512)
    with pytest.raises(UnsupportedError, match=r"found no pages\.crc32c.*convert the model again"):
        model.page_sums()
    verdict = verify(folder)
    assert (verdict.faults, verdict.by_page) == ((), False)


def test_sums_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="sums: found 8 bytes, wanted 4 for each of 3 pages"):
        PageSums.parse(bytes(8), {"b": PAGE, "a": 2 * PAGE}, where="sums")
    with pytest.raises(FormatError, match="a has 4097 bytes, wanted whole pages of 4096"):
        PageSums.parse(bytes(8), {"a": PAGE + 1}, where="sums")
    sums = PageSums.parse(bytes(range(12)), {"b": PAGE, "a": 2 * PAGE}, where="sums")
    assert sums.of("a").tolist() == [0x03020100, 0x07060504]
    assert sums.of("b").tolist() == [0x0B0A0908]


def test_a_damaged_file_of_sums_is_refused(folder: Path) -> None:
    flip(folder / "pages.crc32c", 3)
    with pytest.raises(FormatError, match=r"pages\.crc32c: sha256 is \w+, wanted"):
        PackedModel.open(folder).page_sums()


def test_a_sound_folder_is_found_sound_and_every_byte_is_counted(folder: Path) -> None:
    seen = []
    verdict = verify(folder, progress=lambda done, total: seen.append((done, total)))
    total = sum(record.size for record in PackedModel.open(folder).files.values())
    assert (verdict.faults, verdict.by_page, verdict.n_bytes) == ((), True, total)
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("direct", [True, False])
def test_a_flipped_bit_is_found_wherever_it_is(folder: Path, direct: bool) -> None:
    model = PackedModel.open(folder)
    sums = model.page_sums()
    for file in weight_files(folder):
        n_pages = file.stat().st_size // PAGE
        for page in {0, 1, n_pages // 2, n_pages - 1}:
            for at in (0, PAGE - 1):
                flip(file, page * PAGE + at, 0x80)
                (bad,) = sums.bad_pages(folder, file.name, direct=direct)
                assert (bad.page, bad.offset, bad.error) == (page, page * PAGE, 0)
                assert bad.wanted == sums.of(file.name)[page]
                assert bad.found != bad.wanted
                flip(file, page * PAGE + at, 0x80)
        assert sums.bad_pages(folder, file.name, direct=direct) == []


def test_a_fault_names_file_page_and_tensor(folder: Path) -> None:
    model = PackedModel.open(folder)
    file = folder / model.records["b"].file
    at = model.shards[file.name].offset("b.scales")
    flip(file, at + 5)
    flip(file, model.shards[file.name].offset("b.planes"))
    flip(file, model.shards[file.name].offset("b.planes") + 2 * PAGE)
    planes, scales = verify(folder).faults
    assert f"{file}: page {at // PAGE} at byte {at}, of b.scales: CRC-32C is " in scales
    assert "of b.planes: CRC-32C" in planes
    assert planes.endswith("; 2 of its pages are wrong")


def test_a_fault_of_a_header_is_found_though_it_cannot_be_read(folder: Path) -> None:
    file = weight_files(folder)[0]
    flip(file, 9)
    (fault,) = verify(folder).faults
    assert f"{file}: page 0 at byte 0, of an unknown tensor: CRC-32C is" in fault
    flip(file, 9)
    flip(file, 4000)  # blanks behind the JSON
    (fault,) = verify(folder).faults
    assert "page 0 at byte 0, of " in fault


def test_a_fault_of_another_file_is_found_by_its_digest(folder: Path) -> None:
    flip(folder / "tokenizer.json", 2)
    flip(folder / "pages.crc32c", 2)
    first, second = verify(folder).faults
    assert f"{folder / 'tokenizer.json'}: sha256 is " in first
    assert f"{folder / 'pages.crc32c'}: sha256 is " in second


def test_without_sums_weights_are_hashed_whole(folder: Path) -> None:
    without_sums(folder)
    file = weight_files(folder)[1]
    flip(file, PAGE * 2)
    (fault,) = verify(folder).faults
    assert f"{file}: sha256 is " in fault


def test_pages_beyond_the_end_are_named(folder: Path) -> None:
    model = PackedModel.open(folder)
    sums = model.page_sums()
    file = weight_files(folder)[0]
    n_pages = file.stat().st_size // PAGE
    os.truncate(file, (n_pages - 2) * PAGE)
    bad = sums.bad_pages(folder, file.name)
    assert [page.page for page in bad] == [n_pages - 2, n_pages - 1]
    assert str(bad[0]) == "cannot be read (the file ends before it)"
    with pytest.raises(FormatError, match=r"found \d+ bytes, wanted"):
        verify(folder)


def test_pages_that_cannot_be_read_are_named_and_the_others_checked(folder: Path) -> None:
    file = weight_files(folder)[0]
    wanted = PackedModel.open(folder).page_sums().of(file.name)
    bad = _native.bad_pages(str(file), 0, wanted, reader="faulty:pread eio@3", request_bytes=PAGE)
    assert [(page, error) for page, error, _ in bad] == [(2, 5)]
    # A long read that fails is done again page by page, and they are fine.
    assert _native.bad_pages(str(file), 0, wanted, reader="faulty:pread eio@1") == []
