"""The packed directory gives back what was packed, and refuses what is damaged."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_matrix
from safetensors import safe_open

from elute.errors import EluteError, FormatError, ShapeError, UnsupportedError
from elute.formats import packed_layout
from elute.formats.packed import PackedModel, PackedWriter
from elute.pack import quads
from elute.types import Affine, PackedMatrix, QuantizedMatrix, TokenizerFiles

TOKENIZER = TokenizerFiles(
    tokenizer_json='{"version": "1.0", "é": "日本"}',
    tokenizer_config={"eos_token": "</s>", "odd": "\ud800"},
    chat_template="{{ messages }}\r\n",
    generation_config={"eos_token_id": [1, 2]},
)


def writer(out: Path, names: list[str], **options: Any) -> PackedWriter:
    config = {"model_type": "llama", "rope_theta": np.float32(1e4)}
    return PackedWriter(
        out, names=names, config=config, tokenizer=TOKENIZER, source="test", **options
    )


def write_small(out: Path, **options: Any) -> QuantizedMatrix:
    """A model of one matrix with a column order and one vector."""
    matrix = random_matrix(40, 64, bits=4, group_size=32, affine=Affine.MIN, seed=0, columns=True)
    with writer(out, ["w", "v"], **options) as packed:
        packed.add_matrix("w", matrix.shape, [quads.pack(matrix)])
        packed.add_vector("v", np.arange(5, dtype=np.float32))
    return matrix


def check_equal(got: QuantizedMatrix, want: QuantizedMatrix) -> None:
    for field in ("codes", "scales", "offsets", "columns"):
        a, b = getattr(got, field), getattr(want, field)
        assert (a is None) == (b is None), field
        assert a is None or (a.dtype == b.dtype and np.array_equal(a, b)), field
    for field in ("affine", "zero", "bits", "group_size", "shape"):
        assert getattr(got, field) == getattr(want, field), field


def pieces(matrix: PackedMatrix, panels: int) -> list[PackedMatrix]:
    """The same matrix as runs of `panels` panels."""
    whole = quads.unpack(matrix)
    runs = []
    for first in range(0, whole.shape[0], 32 * panels):
        rows = slice(first, first + 32 * panels)
        part = QuantizedMatrix(
            codes=whole.codes[rows],
            scales=whole.scales[:, rows],
            offsets=None if whole.offsets is None else whole.offsets[:, rows],
            affine=whole.affine,
            zero=whole.zero,
            bits=whole.bits,
            group_size=whole.group_size,
            columns=whole.columns,
        )
        runs.append(quads.pack(part))
    return runs


@given(
    n=st.integers(1, 100),
    k_group=st.sampled_from([(64, 16), (96, 32), (192, 64), (256, 128), (100, 100), (4, 4)]),
    bits=st.integers(1, 8),
    affine=st.sampled_from(list(Affine)),
    columns=st.booleans(),
    panels=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_unpack_inverts_pack_through_the_file(
    n: int,
    k_group: tuple[int, int],
    bits: int,
    affine: Affine,
    columns: bool,
    panels: int,
    seed: int,
) -> None:
    k, group_size = k_group
    matrix = random_matrix(
        n, k, bits=bits, group_size=group_size, affine=affine, seed=seed, columns=columns
    )
    vector = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "model"
        with writer(out, ["w", "v"]) as packed:
            packed.add_vector("v", vector)
            packed.add_matrix("w", (n, k), pieces(quads.pack(matrix), panels))
        model = PackedModel.open(out)
        check_equal(quads.unpack(model.matrix("w")), matrix)
        assert np.array_equal(model.vector("v"), vector)
        assert [path.name for path in Path(directory).iterdir()] == ["model"]


def test_any_safetensors_reader_opens_the_weights(tmp_path: Path) -> None:
    matrix = write_small(tmp_path / "model")
    packed = quads.pack(matrix)
    with safe_open(tmp_path / "model" / "model-00001.safetensors", "np") as file:
        assert set(file.keys()) == {"w.planes", "w.scales", "w.offsets", "w.columns", "v"}
        assert np.array_equal(file.get_tensor("w.planes")[: packed.planes.size], packed.planes)
        assert np.array_equal(file.get_tensor("v")[:5], np.arange(5, dtype=np.float32))
        assert not file.get_tensor("v")[5:].any()


def test_tensors_lie_on_pages_and_can_be_read_beyond(tmp_path: Path) -> None:
    # 64 planes bytes short of a page: without padding the over-read would leave the tensor
    matrix = random_matrix(32, 1008, bits=1, group_size=16, affine=Affine.SYMMETRIC, seed=0)
    with writer(tmp_path / "model", ["w"]) as packed:
        packed.add_matrix("w", matrix.shape, [quads.pack(matrix)])
    model = PackedModel.open(tmp_path / "model")
    (shard,) = model.shards.values()
    for name, entry in shard.entries.items():
        assert entry.offset % 4096 == 0, name
        assert entry.n_bytes % 4096 == 0, name
    planes = model.matrix("w").planes
    assert planes.nbytes == 4032
    assert shard.entry("w.planes").n_bytes >= planes.nbytes + 64
    assert not planes.flags.writeable
    assert type(planes) is np.ndarray


def test_full_planes_get_another_page(tmp_path: Path) -> None:
    matrix = random_matrix(32, 1024, bits=1, group_size=16, affine=Affine.SYMMETRIC, seed=0)
    with writer(tmp_path / "model", ["w"]) as packed:
        packed.add_matrix("w", matrix.shape, [quads.pack(matrix)])
    (shard,) = PackedModel.open(tmp_path / "model").shards.values()
    assert shard.entry("w.planes").n_bytes == 8192


def test_texts_come_back_byte_for_byte(tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    model = PackedModel.open(tmp_path / "model")
    assert model.tokenizer_files() == TOKENIZER
    assert model.config == {"model_type": "llama", "rope_theta": 10000.0}
    assert (model.source, model.names) == ("test", ("w", "v"))


def test_bits_per_weight_counts_scales_and_offsets(tmp_path: Path) -> None:
    matrix = random_matrix(64, 128, bits=3, group_size=32, affine=Affine.ZERO, seed=0)
    with writer(tmp_path / "model", ["w"]) as packed:
        packed.add_matrix("w", matrix.shape, [quads.pack(matrix)])
    model = PackedModel.open(tmp_path / "model")
    assert model.bits_per_weight == 3 + 2 * 16 / 32
    assert model.nbytes == 64 * 128 * 4 // 8


def test_shards_stay_below_their_limit(tmp_path: Path) -> None:
    names = [f"w{i}" for i in range(5)]
    matrix = random_matrix(64, 128, bits=4, group_size=32, affine=Affine.MIN, seed=0)
    with writer(tmp_path / "model", names, max_shard_bytes=40_000) as packed:
        for name in names:
            packed.add_matrix(name, matrix.shape, [quads.pack(matrix)])
    model = PackedModel.open(tmp_path / "model")
    assert len(model.shards) == 3
    assert all(model.files[name].size <= 40_000 for name in model.shards)
    for name in names:
        check_equal(quads.unpack(model.matrix(name)), matrix)


def test_group_fits_agrees_with_the_packer() -> None:
    for k in range(1, 520):
        for group_size in range(k + 1):
            try:
                quads.check_groups(k, group_size)
                accepted = True
            except ShapeError:
                accepted = False
            assert packed_layout.group_fits(k, group_size) == accepted, (k, group_size)


# What the writer refuses


def test_pieces_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def random(n: int, bits: int = 4) -> PackedMatrix:
        return quads.pack(random_matrix(n, 64, bits=bits, group_size=32, affine=Affine.MIN, seed=0))

    for rows, parts, says in [
        (64, [random(32), random(32, bits=3)], "rows 32.. are packed unlike"),
        (64, [random(24), random(40)], "rows 24.. are packed unlike"),
        (64, [random(32)], "found 32 packed rows, wanted 64"),
        (64, [], "found 0 packed rows"),
    ]:
        with (
            pytest.raises(ShapeError, match=says),
            writer(tmp_path / "model", ["w"]) as packed,
        ):
            packed.add_matrix("w", (rows, 64), parts)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)])
def test_floats_of_other_ranks_and_no_floats_are_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    with (
        pytest.raises(ShapeError, match=r"v: found shape .*, wanted \[L\] or \[N, K\]"),
        writer(tmp_path / "model", ["v"]) as packed,
    ):
        packed.add_vector("v", np.zeros(shape, np.float32))


def test_a_matrix_of_floats_comes_back_as_it_was(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 1030)).astype(np.float32)
    with writer(tmp_path / "model", ["v"]) as packed:
        packed.add_vector("v", values)
    model = PackedModel.open(tmp_path / "model")
    assert np.array_equal(model.vector("v"), values)
    assert model.nbytes == values.nbytes
    with pytest.raises(FormatError, match="found no matrix 'v'"):
        model.matrix("v")


def test_names_that_collide_with_parts_are_refused(tmp_path: Path) -> None:
    matrix = random_matrix(32, 64, bits=4, group_size=32, affine=Affine.MIN, seed=0)

    def write() -> None:
        with writer(tmp_path / "model", ["w", "w.scales"]) as packed:
            packed.add_vector("w.scales", np.zeros(3, np.float32))
            packed.add_matrix("w", matrix.shape, [quads.pack(matrix)])

    with pytest.raises(FormatError, match=r"w\.scales: is the name of two tensors"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_config_without_json_form_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(FormatError, match=r"config.json: cannot be written"),
        PackedWriter(
            tmp_path / "m", names=[], config={"x": float("nan")}, tokenizer=TOKENIZER, source=""
        ),
    ):
        pass
    assert not list(tmp_path.iterdir())


# What the reader refuses

Edit = Callable[[dict[str, Any]], None]


def setter(*path: str, value: Any) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (setter("format", value="other"), "format is 'other', wanted 'elute-packed'"),
        (setter("layout", value="1"), "layout is '1', wanted an integer"),
        (setter("layout", value=True), "layout is True"),
        (setter("source", value=None), "source: found None, wanted a string"),
        (setter("recipe", value=[1]), "recipe: found list, wanted an object"),
        (setter("files", value=[]), "files: found list, wanted an object"),
        (setter("files", "../x", value={}), "file is '../x', wanted a plain file name"),
        (setter("files", "\ud800", value={}), "wanted a plain file name"),
        (setter("files", "config.json", value={"size": 1}), "wanted a size and a sha256"),
        (setter("files", "config.json", "size", value=7), "bytes, wanted 7"),
        (setter("files", "none", value={"size": 1, "sha256": ""}), "none: cannot be read"),
        (lambda m: m["files"].pop("tokenizer.json"), "files lists no tokenizer.json"),
        (lambda m: m["files"].pop("model-00001.safetensors"), "w: files lists no model-00001"),
        (setter("tensors", value="x"), "tensors: found str"),
        (setter("tensors", "w", value=3), "w: found int"),
        (setter("tensors", "w", "shape", value=[40, 64, 1]), "wanted a list of one or two"),
        (setter("tensors", "w", "shape", value=[0, 64]), "found 0, wanted an integer from 1"),
        (setter("tensors", "w", "shape", value=[40, 2**40]), "wanted an integer from 1 to"),
        (setter("tensors", "w", "shape", value=[40.0, 64]), "found 40.0, wanted an integer"),
        (setter("tensors", "w", "shape", value=[400, 64]), "w.planes is U8"),
        (setter("tensors", "w", "shape", value=[40, 66]), "group_size=32 does not fit K=66"),
        (setter("tensors", "w", "bits", value=9), "bits: found 9, wanted an integer from 1 to 8"),
        (setter("tensors", "w", "bits", value=True), "bits: found True"),
        (setter("tensors", "w", "group_size", value=24), "group_size=24 does not fit K=64"),
        (setter("tensors", "w", "group_size", value=0), "group_size: found 0"),
        (setter("tensors", "w", "affine", value="cubic"), "affine is 'cubic', wanted symmetric"),
        (setter("tensors", "w", "affine", value=None), "affine is None"),
        (setter("tensors", "w", "zero", value=8), "zero: found 8, wanted an integer from 0 to 0"),
        (setter("tensors", "w", "columns", value=1), "columns is 1, wanted true or false"),
        (setter("tensors", "w", "file", value="/etc/passwd"), "wanted a plain file name"),
        (setter("tensors", "w", "file", value=None), "file is None"),
        (setter("tensors", "w", "file", value="config.json"), "header length"),
        (setter("tensors", "v", "shape", value=[5000]), r"v is F32 \[1024\]"),
        (setter("tensors", "u", value={"shape": [5], "file": "model-00001.safetensors"}), "'u'"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, edit: Edit, says: str) -> None:
    write_small(tmp_path / "model")
    manifest_path = tmp_path / "model" / "elute.json"
    manifest = json.loads(manifest_path.read_text())
    edit(manifest)
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=says):
        PackedModel.open(tmp_path / "model")


def test_a_newer_layout_asks_for_an_upgrade(tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    manifest = tmp_path / "model" / "elute.json"
    manifest.write_text(manifest.read_text().replace('"layout": 1', '"layout": 3'))
    with pytest.raises(UnsupportedError, match=r"layout is 3, newer than the 2 .*upgrade elute"):
        PackedModel.open(tmp_path / "model")


def test_a_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"elute.json: cannot be read"):
        PackedModel.open(tmp_path)


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"{", b"[" * 100_000, b'{"a":1,"a":1}'])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "elute.json").write_bytes(body)
    with pytest.raises(FormatError, match=r"elute\.json"):
        PackedModel.open(tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose manifest a test may overwrite."""
    out = tmp_path_factory.mktemp("small") / "model"
    write_small(out)
    return out


@pytest.fixture(scope="module")
def whole_manifest(small: Path) -> bytes:
    return (small / "elute.json").read_bytes()


@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_damaged_manifest_never_crashes(
    small: Path, whole_manifest: bytes, at: float, byte: int, cut: bool
) -> None:
    body = bytearray(whole_manifest)
    place = int(at * len(body))
    body[place] = byte
    (small / "elute.json").write_bytes(body[:place] if cut else body)
    try:
        model = PackedModel.open(small)
        for name, record in model.records.items():
            is_matrix = isinstance(record, packed_layout.MatrixRecord)
            model.matrix(name) if is_matrix else model.vector(name)
    except EluteError:
        pass


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    shard = tmp_path / "model" / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"model-00001.safetensors: found \d+ bytes, wanted \d+"):
        PackedModel.open(tmp_path / "model")


def test_verify_names_the_file_that_changed(tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    shard = tmp_path / "model" / "model-00001.safetensors"
    body = bytearray(shard.read_bytes())
    body[-1] ^= 1
    shard.write_bytes(body)
    model = PackedModel.open(tmp_path / "model")
    with pytest.raises(FormatError, match=r"model-00001\.safetensors: sha256 is"):
        model.verify()


def test_columns_that_are_no_permutation_are_refused(tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    model = PackedModel.open(tmp_path / "model")
    offset = model.shards["model-00001.safetensors"].offset("w.columns")
    shard = tmp_path / "model" / "model-00001.safetensors"
    body = bytearray(shard.read_bytes())
    body[offset : offset + 4] = (1 << 20).to_bytes(4, "little")
    shard.write_bytes(body)
    with pytest.raises(FormatError, match=r"w.columns does not hold each of 0\.\.63 once"):
        PackedModel.open(tmp_path / "model").matrix("w")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    model = PackedModel.open(tmp_path / "model")
    with pytest.raises(FormatError, match="found no matrix 'v'"):
        model.matrix("v")
    with pytest.raises(FormatError, match="found no vector 'w'"):
        model.vector("w")


def test_verify_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    model = PackedModel.open(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    with pytest.raises(FormatError, match=r"generation_config.json: cannot be read \(No such"):
        model.verify()
