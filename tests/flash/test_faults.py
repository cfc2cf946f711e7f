"""What a bad disk does: the same bits, later, or a DeviceError that names file and offset; never a
wrong token, a hang or a crash, and the process can load the model again."""

import faulthandler
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_weights import PROMPT, READERS, answers, flash, packed, wanted

import elute
from elute.errors import DeviceError, UnsupportedError
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.runtime.executor import Executor

__all__ = ["packed", "wanted"]  # fixtures

HANG_S = 60
# Reads of one stream, counted from 1; the least window of this model takes some 50 to load, and
# a forward some 35.
WHILE_LOADING = [1, 7]
WHILE_RUNNING = [100, 173]


@pytest.fixture(autouse=True)
def _no_hang():
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def sums(packed):
    return packed.page_sums()


def check_usable(packed, wanted):
    assert np.array_equal(answers(packed, flash(packed, 0)), wanted)


HARMLESS = [
    "slow=10",
    "again%30",
    "short%60",
    "late%60",
    "full%50",
    "late%30 full%30 short%30 again%20 slow=3 seed=1",
    "late%80 full%80 short%80 again%10 seed=2",
    "late%5 full%5 short%5 again%50 seed=3",
]


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize("faults", HARMLESS)
@pytest.mark.parametrize("checked", [False, True])
def test_what_harms_nothing_changes_no_bit(packed, wanted, sums, below, faults, checked):
    weights = flash(
        packed,
        0.1,
        reader=f"faulty:{below} {faults}",
        request_bytes=16384,
        sums=sums if checked else None,
    )
    assert weights.reader == f"faulty:{below}"
    assert np.array_equal(answers(packed, weights), wanted)


@pytest.mark.parametrize("depth", [1, 2, 32])
@pytest.mark.parametrize("request_bytes", [4096, 1 << 20])
def test_nor_does_it_at_any_depth(packed, wanted, sums, depth, request_bytes):
    weights = flash(
        packed,
        0.3,
        reader="faulty:auto late%50 full%50 short%50 again%20",
        depth=depth,
        request_bytes=request_bytes,
        sums=sums,
    )
    assert np.array_equal(answers(packed, weights), wanted)


def test_a_slow_disk_is_waited_for(packed, wanted):
    waited = []
    for faults in ("", " slow=20"):
        weights = flash(packed, 0, reader=f"faulty:pread{faults}")
        assert np.array_equal(answers(packed, weights), wanted)
        waited.append(weights.figures()[1])
    assert waited[1] > 2 * waited[0]


def offset_of(error, packed) -> int:
    """Of the sentence that an error must be."""
    found = re.match(
        r"(\S*model-00001\.safetensors): cannot read \d+ bytes from byte (\d+) \(", str(error)
    )
    assert found, error
    assert "elute verify" in str(error)
    assert found[1] == str(packed.path / "model-00001.safetensors")
    assert 0 < int(found[2]) < packed.files["model-00001.safetensors"].size
    return int(found[2])


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize("nth", WHILE_LOADING)
def test_a_read_that_fails_while_loading_is_an_error(packed, wanted, below, nth):
    with pytest.raises(DeviceError, match="Input/output error") as raised:
        flash(packed, 0, reader=f"faulty:{below} eio@{nth}")
    offset_of(raised.value, packed)
    check_usable(packed, wanted)


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize("nth", WHILE_RUNNING)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_read_that_fails_in_a_run_is_an_error(packed, wanted, below, nth, n_threads):
    weights = flash(packed, 0, reader=f"faulty:{below} late%40 eio@{nth}")
    executor = Executor(op_list(packed.config), weights, n_threads=n_threads)
    rows = run_until_error(executor, packed)
    assert len(rows) < 20
    with pytest.raises(DeviceError, match="Input/output error"):  # and it stays so
        executor.forward(PROMPT[:5], 0)
    check_usable(packed, wanted)


def run_until_error(executor, packed, *, says="Input/output error"):
    """-> the logits of the forwards before it; each is as good as without it."""
    rows = []

    def go_on() -> None:
        for i in range(20):
            rows.append(executor.forward(PROMPT[:5], 5 * i))

    with pytest.raises(DeviceError, match=says) as raised:
        go_on()
    offset_of(raised.value, packed)
    resident = Executor(op_list(packed.config), packed, n_threads=1)
    for i, row in enumerate(rows):
        assert np.array_equal(resident.forward(PROMPT[:5], 5 * i), row)
    return rows


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize("nth", WHILE_LOADING)
def test_a_flipped_bit_is_found_while_loading(packed, sums, wanted, below, nth):
    with pytest.raises(DeviceError, match=r"CRC-32C is [0-9a-f]{8}, wanted") as raised:
        flash(packed, 0, reader=f"faulty:{below} flip@{nth}", sums=sums)
    assert offset_of(raised.value, packed) % 4096 == 0
    check_usable(packed, wanted)


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize("nth", WHILE_RUNNING)
@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_is_found_in_a_run(packed, sums, below, nth, seed):
    reader = f"faulty:{below} flip@{nth} seed={seed + 1} late%30"
    executor = Executor(op_list(packed.config), flash(packed, 0, reader=reader, sums=sums))
    run_until_error(executor, packed, says=r"cannot read 4096 bytes .*CRC-32C is [0-9a-f]{8}")


@pytest.mark.parametrize("seed", range(1, 13))
def test_any_schedule_ends_in_the_same_bits_or_an_error(packed, sums, wanted, seed):
    draw = np.random.default_rng(seed)
    faults = " ".join(
        f"{name}%{draw.integers(1, most + 1)}"
        for name, most in [("late", 90), ("full", 90), ("short", 90), ("again", 60)]
    )
    faults += f" seed={seed}"
    if draw.integers(2):
        faults += f" {draw.choice(['eio', 'flip'])}%1"
    try:
        weights = flash(
            packed,
            float(draw.choice([0, 0.2, 0.5])),
            reader=f"faulty:{draw.choice(READERS)} {faults}",
            depth=int(draw.integers(1, 20)),
            request_bytes=4096 * int(draw.integers(1, 30)),
            sums=sums,
        )
        found = answers(packed, weights)
    except DeviceError as error:
        offset_of(error, packed)
        assert "%1" in faults
    else:
        assert np.array_equal(found, wanted)


def test_a_stream_ends_while_a_slow_disk_still_reads(packed):
    for _ in range(5):
        weights = flash(packed, 0, reader="faulty:pread slow=30 late%50", request_bytes=4096)
        executor = Executor(op_list(packed.config), weights, n_threads=2)
        del executor, weights


@pytest.mark.parametrize(
    "fault", ["eio", "eio@0", "flip%101", "slow@3", "seed%2", "fire@1", "late@x"]
)
def test_an_unknown_fault_is_refused(packed, fault):
    with pytest.raises(ValueError, match=f"found the fault '{fault}'"):
        flash(packed, 0, reader=f"faulty:pread {fault}")
    with pytest.raises(ValueError, match="reader: found mmap"):
        flash(packed, 0, reader="faulty:mmap")


# Damage on the disk itself, through load() and the command line


@pytest.fixture
def copied(packed, tmp_path):
    shutil.copytree(packed.path, tmp_path / "model")
    return PackedModel.open(tmp_path / "model")


def damage(packed, name, at=0) -> int:
    """Flips a bit of a tensor. -> its page's offset in the file"""
    shard = packed.shards[packed.records[name.rsplit(".", 1)[0]].file]
    offset = shard.offset(name) + at
    with shard.path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
    return offset // 4096 * 4096


PLANES = "model.layers.3.mlp.down_proj.weight.planes"


def test_damage_that_happens_in_a_run_is_found(copied):
    weights = flash(copied, 0, sums=copied.page_sums())
    executor = Executor(op_list(copied.config), weights, n_threads=2)
    executor.forward(PROMPT[:5], 0)
    offset = damage(copied, PLANES, 5000)

    def go_on() -> None:
        for i in range(3):  # one forward may have been read ahead
            executor.forward(PROMPT[:5], 5 + 5 * i)

    with pytest.raises(DeviceError) as raised:
        go_on()
    assert f"cannot read 4096 bytes from byte {offset} (their CRC-32C is " in str(raised.value)


@pytest.mark.parametrize("memory", [None, "1G"])
def test_load_refuses_damaged_weights_when_it_checks(copied, memory, tmp_path):
    options = {"memory": memory, "context": 64, "cache_dir": tmp_path / "cache"}
    with elute.load(copied.path, checked=True, **options) as model:
        sound = model.generate([1, 2, 3], max_tokens=3, temperature=0, ignore_end=True).tokens
    with elute.load(copied.path, **options) as model:
        assert (
            model.generate([1, 2, 3], max_tokens=3, temperature=0, ignore_end=True).tokens == sound
        )
    offset = damage(copied, PLANES, 4097)
    with pytest.raises(DeviceError, match=rf"model-00001\.safetensors: .*byte {offset}\b"):
        elute.load(copied.path, checked=True, **options)
    elute.load(copied.path, **options).close()  # who does not ask is not told


@pytest.mark.parametrize("memory", [None, "1G"])
def test_load_says_it_when_there_is_nothing_to_check_against(copied, memory, tmp_path):
    manifest = json.loads((copied.path / "elute.json").read_text())
    del manifest["files"]["pages.crc32c"]
    (copied.path / "elute.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsupportedError, match=r"found no pages\.crc32c"):
        elute.load(copied.path, checked=True, memory=memory, cache_dir=tmp_path / "cache")


def test_a_checked_run_on_damaged_weights_is_one_sentence_and_exit_code_1(copied, tmp_path):
    def run():
        command = [sys.executable, "-m", "elute", "run", str(copied.path), "eta", "--raw"]
        command += ["--checked", "--memory", "1G", "--max-tokens", "2", "--context", "64", "-q"]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)

    assert run().returncode == 0
    offset = damage(copied, PLANES)
    done = run()
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {copied.path / 'model-00001.safetensors'}: ")
    assert f"from byte {offset} (their CRC-32C" in line
