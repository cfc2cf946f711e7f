"""What a device takes of a budget: sizes mean what they say, and needs follow what is held."""

import pytest
from tiny import tiny_checkpoint

from elute.errors import ShapeError
from elute.formats.packed_layout import MatrixRecord
from elute.model.families import op_list
from elute.runtime.npu_memory import hot_bytes, int8_bytes, npu_needs
from elute.types import Affine


@pytest.mark.parametrize(
    ("hot", "wanted"),
    [
        (None, 30_000),
        (0, 0),
        (0.5, 500_000),
        (1, 1_000_000),
        ("0.01", 10_000),
        ("1", 1_000_000),
        ("64K", 64_000),
        ("1MiB", 1_000_000),  # no more than there are
        ("2000", 2000),
        (4096, 4096),
    ],
)
def test_a_share_or_a_size_of_hot_rows(hot, wanted):
    assert hot_bytes(hot, 1_000_000) == wanted


@pytest.mark.parametrize("hot", ["much", "-1", -0.5, "3 %", "nan", float("nan")])
def test_what_is_neither_is_refused(hot):
    with pytest.raises(
        ShapeError, match=r"--npu-hot: found .* wanted a share from 0 to 1 or a size"
    ):
        hot_bytes(hot, 1_000_000)


def test_needs_count_what_is_held():
    config, weights = tiny_checkpoint("llama")
    ops = op_list(config)
    records = {
        name: MatrixRecord(weights[name].shape, 4, 32, Affine.SYMMETRIC, 8, False, "file")
        for name in ops.matrices()
    }
    total = int8_bytes(ops, records)
    assert total == sum(weights[name].size for name in ops.matrices() if "layers" in name)

    def needs(device="sim", emulated=True, chunk=256, hot=0, half_bytes=1 << 20):
        return npu_needs(
            ops,
            records,
            device=device,
            emulated=emulated,
            chunk=chunk,
            hot=hot,
            half_bytes=half_bytes,
        )

    assert needs(hot=1000).lean == needs().lean + 1000
    assert needs(chunk=128).lean < needs().lean
    assert needs(half_bytes=2 << 20).lean > needs().lean
    assert needs(half_bytes=2 << 20).kept == needs().kept  # all is in memory: nothing is read
    assert needs("cpu").lean >= needs("qnn", emulated=False).lean + total
    assert needs("cpu").lean == needs("cpu").kept
