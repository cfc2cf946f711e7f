"""Conversion is what the recipe says, in little memory, and complete or absent."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from matrices import random_matrix
from memory_checkpoint import MemoryCheckpoint

from elute.errors import BudgetError, EluteError, FormatError, ShapeError, UnsupportedError
from elute.formats import packed_writer
from elute.formats.packed import PackedModel
from elute.pack import convert as module
from elute.pack.convert import convert
from elute.pack.quads import unpack
from elute.quantize import rtn, ternary
from elute.quantize.recipe import EMBEDDING, HEAD, Recipe, Rule, Scheme
from elute.types import Affine

HERE = Path(__file__).parent


def floats(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def small_checkpoint(**config: Any) -> MemoryCheckpoint:
    return MemoryCheckpoint(
        {
            EMBEDDING: floats(100, 128, 1),
            "model.layers.0.self_attn.q_proj.weight": floats(70, 128, 2),
            "model.layers.0.input_layernorm.weight": np.ones(128, ml_dtypes.bfloat16),
            HEAD: floats(100, 128, 3),
        },
        config=config,
    )


def test_the_default_recipe_reaches_every_tensor(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(model_type="llama")
    calls: list[tuple[int, int, str]] = []
    model = convert(
        checkpoint, tmp_path / "out", Recipe.default(), progress=lambda *call: calls.append(call)
    )
    assert model.names == tuple(checkpoint.names())
    assert [model.records[name].bits for name in (EMBEDDING, HEAD)] == [8, 8]
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    want = rtn.quantize(checkpoint.read(q_proj), bits=4, group_size=32, symmetric=True)
    got = unpack(model.matrix(q_proj))
    assert np.array_equal(got.codes, want.codes)
    assert np.array_equal(got.dequantize(), want.dequantize())
    assert np.array_equal(model.vector("model.layers.0.input_layernorm.weight"), np.ones(128))
    model.verify()
    total = 270 * 128 + 128
    assert calls[0] == (100 * 128, total, EMBEDDING)
    assert calls[-1] == (total, total, HEAD)


def test_chunks_of_rows_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = MemoryCheckpoint({"w": floats(133, 64)})
    whole = convert(checkpoint, tmp_path / "whole", Recipe.default())
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 1)
    parts = convert(checkpoint, tmp_path / "parts", Recipe.default())
    name = "model-00001.safetensors"
    assert whole.files[name] == parts.files[name]


def test_a_tied_head_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        model = convert(
            small_checkpoint(tie_word_embeddings=True), tmp_path / "out", Recipe.default()
        )
    assert HEAD not in model.names
    assert "leaves out lm_head.weight, which the model does not use" in caplog.text


def test_only_wanted_tensors_are_written_in_their_order(tmp_path: Path) -> None:
    wanted = [HEAD, EMBEDDING]
    model = convert(small_checkpoint(), tmp_path / "out", Recipe.default(), tensors=wanted)
    assert model.names == (HEAD, EMBEDDING)


def test_matrices_that_stay_floats_do_whatever_the_recipe_says(tmp_path: Path) -> None:
    codes = random_matrix(8, 64, bits=8, group_size=64, affine=Affine.SYMMETRIC, seed=1)
    tensors = {"a.weight": floats(8, 62), "b.weight": codes, "c.weight": floats(8, 64)}
    checkpoint = MemoryCheckpoint(tensors)
    model = convert(checkpoint, tmp_path / "out", Recipe.default(), floats=("a.weight", "b.weight"))
    assert np.array_equal(model.vector("a.weight"), tensors["a.weight"])
    assert np.array_equal(model.vector("b.weight"), codes.dequantize())
    assert model.matrix("c.weight").bits == 4


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    wanted = ["a.weight", EMBEDDING, "b.weight"]
    with pytest.raises(FormatError, match=r"memory: found no a.weight, b.weight; wanted by"):
        convert(small_checkpoint(), tmp_path / "out", Recipe.default(), tensors=wanted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("affine", list(Affine))
def test_codes_are_kept(tmp_path: Path, affine: Affine, caplog: pytest.LogCaptureFixture) -> None:
    matrix = random_matrix(70, 96, bits=3, group_size=32, affine=affine, seed=1, columns=True)
    with caplog.at_level("INFO"):
        model = convert(MemoryCheckpoint({"w": matrix}), tmp_path / "out", Recipe.default())
    got = unpack(model.matrix("w"))
    assert np.array_equal(got.codes, matrix.codes)
    assert np.array_equal(got.dequantize(), matrix.dequantize())
    assert "kept the codes of 1 quantized matrices (1 at 3 bits)" in caplog.text


def test_codes_are_requantized_only_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = random_matrix(40, 64, bits=6, group_size=16, affine=Affine.MIN, seed=1, columns=True)
    recipe = Recipe((Rule("kept", scheme=Scheme.KEEP), Rule("*", bits=3)), requantize=True)
    checkpoint = MemoryCheckpoint({"w": matrix, "kept": matrix})
    model = convert(checkpoint, tmp_path / "out", recipe)
    want = rtn.quantize(matrix.dequantize(), bits=3, group_size=32, symmetric=True)
    assert np.array_equal(unpack(model.matrix("w")).dequantize(), want.dequantize())
    assert np.array_equal(unpack(model.matrix("kept")).dequantize(), matrix.dequantize())
    assert "quantized 1 quantized matrices again" in caplog.text


def test_ternary_symmetric_and_whole_rows(tmp_path: Path) -> None:
    w = floats(33, 100)
    recipe = Recipe(
        (
            Rule("t", scheme=Scheme.TERNARY, group_size=None),
            Rule("s", bits=5, scheme=Scheme.SYMMETRIC, group_size=None),
        )
    )
    model = convert(MemoryCheckpoint({"t": w, "s": w}), tmp_path / "out", recipe)
    t, s = (unpack(model.matrix(name)).dequantize() for name in "ts")
    assert np.array_equal(t, ternary.quantize(w, group_size=100).dequantize())
    assert np.array_equal(s, rtn.quantize(w, bits=5, group_size=100, symmetric=True).dequantize())


def test_groups_that_do_not_fit_fall_back_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = MemoryCheckpoint({"a": floats(4, 96), "b": floats(4, 96), "c": floats(4, 36)})
    model = convert(checkpoint, tmp_path / "out", Recipe.default(group_size=64))
    assert [model.records[name].group_size for name in "abc"] == [32, 32, 36]
    assert caplog.text.count("2 matrices with K=96 take group_size=32, because 64") == 1
    assert "1 matrices with K=36 take group_size=36" in caplog.text


@pytest.mark.parametrize(
    ("tensor", "recipe", "kind", "says"),
    [
        (floats(4, 66), Recipe.default(), ShapeError, "w: K=66 is not a multiple of 4"),
        (np.zeros((4, 4, 4), np.float32), Recipe.default(), UnsupportedError, r"shape \[4, 4, 4\]"),
        (np.zeros((0, 4), np.float32), Recipe.default(), UnsupportedError, r"shape \[0, 4\]"),
        (np.float32([1, np.nan]), Recipe.default(), FormatError, r"w: weight \[1\] is nan"),
        (floats(4, 64), Recipe((Rule("x"),)), FormatError, "no rule matches 'w'"),
        (
            floats(4, 64),
            Recipe((Rule("*", scheme=Scheme.KEEP),)),
            UnsupportedError,
            "w: the recipe keeps it, but the checkpoint holds floats",
        ),
    ],
)
def test_tensors_that_cannot_be_packed_are_refused(
    tmp_path: Path, tensor: np.ndarray, recipe: Recipe, kind: type[EluteError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        convert(MemoryCheckpoint({"w": tensor}), tmp_path / "out", recipe, tensors=["w"])
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 1)
    w = floats(100, 64)
    w[90, 5] = np.inf
    with pytest.raises(FormatError, match=r"w: weight \[90, 5\] is inf"):
        convert(MemoryCheckpoint({"w": w}), tmp_path / "out", Recipe.default())


# What stands at the place of the output


def test_a_packed_model_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(small_checkpoint(), out, Recipe.default())
    with pytest.raises(EluteError, match="holds a packed model already; force"):
        convert(small_checkpoint(), out, Recipe.default())
    old = PackedModel.open(out)
    convert(small_checkpoint(), out, Recipe.default(bits=2), force=True)
    assert PackedModel.open(out).bits_per_weight < old.bits_per_weight
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replaced_model_stays_readable_where_it_is_open(tmp_path: Path) -> None:
    old = convert(small_checkpoint(), tmp_path / "out", Recipe.default())
    before = old.matrix(EMBEDDING)
    codes = unpack(before).codes
    convert(small_checkpoint(), tmp_path / "out", Recipe.default(bits=2), force=True)
    assert np.array_equal(unpack(before).codes, codes)


def test_what_is_not_a_packed_model_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "diary").write_text("dear")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for out, says in [
        (precious, "something other than a packed model"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "loop", "is a symbolic link to itself; choose another name"),
        (tmp_path / ("n" * 300), r"cannot be written \(File name too long\)"),
    ]:
        with pytest.raises(EluteError, match=says):
            convert(small_checkpoint(), out, Recipe.default(), force=True)
    assert (precious / "diary").read_text() == "dear"


# Full disks, killed conversions, memory


class FullDisk(io.FileIO):
    """Takes short writes, and none beyond a limit."""

    limit = 40_000

    def write(self, body: Any) -> int:
        room = self.limit - self.tell()
        if room <= 0:
            raise OSError(28, os.strerror(28))
        return super().write(memoryview(body)[: min(room, 1000)])


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_writer.io, "FileIO", FullDisk)
    with pytest.raises(
        BudgetError, match=r"out: cannot be written \(No space left on device\); free"
    ):
        convert(small_checkpoint(), tmp_path / "out", Recipe.default())
    assert not list(tmp_path.iterdir())


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_writer.io, "FileIO", FullDisk)
    monkeypatch.setattr(FullDisk, "limit", 1 << 30)
    model = convert(small_checkpoint(), tmp_path / "out", Recipe.default())
    want = rtn.quantize(small_checkpoint().read(HEAD), bits=8, group_size=32, symmetric=True)
    assert np.array_equal(unpack(model.matrix(HEAD)).codes, want.codes)


def run_child(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    header = (
        "import sys, time, resource, numpy as np; from pathlib import Path\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from memory_checkpoint import MemoryCheckpoint\n"
        "from elute.pack.convert import convert\n"
        "from elute.quantize.recipe import Recipe\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", header + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_limit_on_file_size_is_a_full_disk(tmp_path: Path) -> None:
    child = run_child(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "w = np.ones((1024, 1024), np.float32)\n"
        "convert(MemoryCheckpoint({'w': w}), Path(sys.argv[1]), Recipe.default())\n",
        str(tmp_path / "out"),
    )
    _, errors = child.communicate(timeout=60)
    assert "BudgetError" in errors.splitlines()[-1]
    assert "out: cannot be written (File too large)" in errors
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_leaves_nothing_that_opens(tmp_path: Path) -> None:
    code = (
        "def stuck():\n"
        "    print('ready', flush=True); time.sleep(60)\n"
        "w = np.ones((64, 64), np.float32)\n"
        "tensors = {'a': w, 'b': ((64, 64), stuck)}\n"
        "convert(MemoryCheckpoint(tensors), Path(sys.argv[1]), Recipe.default())\n"
    )
    out = tmp_path / "out"
    child = run_child(code, str(out))
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    with pytest.raises(FormatError):
        PackedModel.open(partial)
    convert(small_checkpoint(), out, Recipe.default()).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "codes"])
def test_memory_stays_below_twice_the_largest_tensor(tmp_path: Path, kind: str) -> None:
    """Peak resident memory, above what the interpreter holds after its imports."""
    code = (
        "import ml_dtypes, json\n"
        "from elute.types import Affine, QuantizedMatrix\n"
        "n, k = 12288, 2048\n"
        "def floats(dtype):\n"
        "    w = np.empty((n, k), dtype)\n"
        "    for at in range(0, n, 512): w[at:at + 512] = np.linspace(-1, 1, k)\n"
        "    return w\n"
        "def codes():\n"
        "    scales = np.ones((k // 64, n), np.float16)\n"
        "    return QuantizedMatrix(np.ones((n, k), np.uint8), scales, scales,\n"
        "        Affine.MIN, 0, 8, 64)\n"
        "make = {'float32': lambda: floats(np.float32), 'codes': codes,\n"
        "        'bfloat16': lambda: floats(ml_dtypes.bfloat16)}[sys.argv[2]]\n"
        "tensors = {name: ((n, k), make) for name in ('model.embed_tokens.weight', 'b')}\n"
        # ru_maxrss would count what the parent, this test run, held at the start
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: 1024 * int(status().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "convert(MemoryCheckpoint(tensors), Path(sys.argv[1]), Recipe.default())\n"
        "print(json.dumps([before, peak()]))\n"
    )
    child = run_child(code, str(tmp_path / "out"), kind)
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    before, peak = json.loads(output)
    tensor = 12288 * 2048 * {"float32": 4, "bfloat16": 2, "codes": 1}[kind]
    assert peak <= 2 * tensor + 300e6, (before, peak, tensor)
    # one tensor as read, a fifth for scales and offsets (and their copies), and the chunks
    assert peak - before <= 1.2 * tensor + 60e6, (before, peak, tensor)
