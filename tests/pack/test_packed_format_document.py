"""docs/packed-format.md is true: its example is parsed and packed, its recipes are loaded."""

import re
from pathlib import Path

import numpy as np
import pytest

from elute.pack import channels
from elute.pack.quads import pack, unpack
from elute.quantize.recipe import Recipe
from elute.types import U8, Affine, QuantizedMatrix

DOCUMENT = Path(__file__).parents[2] / "docs" / "packed-format.md"


def block(kind: str) -> str:
    (body,) = re.findall(rf"^```{kind}\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    return str(body)


def example_codes() -> U8:
    codes = np.zeros((18, 16), np.uint8)
    for line in block("codes").splitlines():
        row, values = line.removeprefix("row").split(":")
        codes[int(row)] = [int(value) for value in values.split()]
    return codes


def example_bytes(kind: str) -> bytes:
    body = b""
    for line in block(kind).splitlines():
        at, values = line.split(":")
        assert int(at) == len(body)
        body += bytes.fromhex(values)
    return body


def test_the_worked_example_is_what_pack_writes() -> None:
    scales, offsets = np.zeros((2, 1, 18), np.float16)
    text = DOCUMENT.read_text()
    given = re.findall(r"(\S+) and (\S+) \(row (\d+)\)", text)
    assert len(given) == 3
    for scale, offset, row in given:
        scales[0, int(row)], offsets[0, int(row)] = float(scale), float(offset)
    matrix = QuantizedMatrix(
        codes=example_codes(),
        scales=scales,
        offsets=offsets,
        affine=Affine.MIN,
        zero=0,
        bits=3,
        group_size=16,
    )
    packed = pack(matrix)
    assert packed.offsets is not None
    assert packed.planes.tobytes() == example_bytes("planes")
    assert packed.scales.tobytes() == example_bytes("scales")
    assert packed.offsets.tobytes() == example_bytes("offsets")
    w = unpack(packed).dequantize()
    results = re.findall(r"w\[(\d+), (\d+)\] = [^=]*? = (-?[\d.]+\d|\d)", text)
    assert len(results) == 2
    for row, column, value in results:
        assert w[int(row), int(column)] == float(value)


def test_the_example_in_channel_order_is_what_pack_writes() -> None:
    codes = np.zeros((130, 2), np.uint8)
    for line in block("channel-codes").splitlines():
        channel, values = line.removeprefix("channel").split(":", 1)
        for value in values.split():
            output, code = value.split(":")
            codes[int(output), int(channel)] = int(code)
    assert np.count_nonzero(codes) == 8
    rows = channels.pack_codes(codes, 3)
    assert rows.tobytes() == example_bytes("channel-rows")
    assert np.array_equal(channels.unpack_codes(rows, 130, 3), codes)


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_the_recipes_load_alike(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"r.{kind}"
    path.write_text(block(kind))
    recipe = Recipe.load(path)
    assert recipe.rule_for("model.layers.0.mlp.down_proj.weight").bits == 4
    assert recipe.rule_for("model.layers.0.mlp.up_proj.weight").bits == 3
    assert recipe.rule_for("lm_head.weight").bits == 8
