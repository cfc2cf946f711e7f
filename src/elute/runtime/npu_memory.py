"""What prompts through a device take of a budget of memory, before it is there. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from elute.errors import ShapeError
from elute.formats.packed_layout import Records
from elute.model.ops import Linear, OpList
from elute.npu.assemble import HOT_SHARE
from elute.npu.codes import COLUMNS_BYTES
from elute.npu.ranges import BINS
from elute.npu.rows import PART_BYTES
from elute.runtime.memory import parse_size

IN_FLIGHT = 2  # chunks under way under a budget: one on the device, one on the processor
# Threads of a prompt and of what reads, with their stacks, and BLAS's buffers beside `sim`.
GROWTH_BYTES = 16 << 20
# What a runtime in this process holds for each byte of int8 weights, at its peak: 2.7 of the
# default model by ONNX Runtime's CPU provider; the others, with a compiler beside, are guesses.
HELD = {"cpu": 3.0, "openvino": 5.0, "qnn": 5.0}


@dataclass(frozen=True)
class NpuNeeds:
    """Bytes of a budget.

    lean  where the device's int8 weights are made anew for each chunk
    kept  where they stay
    """

    lean: int
    kept: int


def hot_bytes(hot: float | str | None, int8_bytes: int) -> int:
    """Of a share of the int8 weights' bytes, 0 to 1, or of a size such as "64M"; the default when
    None. Raises ShapeError for anything else."""
    if hot is None:
        return int(HOT_SHARE * int8_bytes)
    try:
        share = float(hot)
    except ValueError:
        share = -1.0
    if 0 <= share <= 1:
        return int(share * int8_bytes)
    if isinstance(hot, str) and share < 0:
        try:
            return min(parse_size(hot), int8_bytes)
        except ShapeError:
            pass
    elif share > 1:
        return min(int(share), int8_bytes)
    raise ShapeError(f"--npu-hot: found {hot!r}, wanted a share from 0 to 1 or a size such as 64M")


def int8_bytes(ops: OpList, records: Records) -> int:
    """Of all weights that a device multiplies."""
    return sum(n * k for op in _linears(ops) for n, k in _shapes(op, records))


def npu_needs(
    ops: OpList,
    records: Records,
    *,
    device: str,
    emulated: bool,
    chunk: int,
    hot: int,
    half_bytes: int,
) -> NpuNeeds:
    """Beside what runtime.memory counts for the same model without a device.

    device    its name; its own int8 weights count where it is this processor, `emulated`
    hot       bytes of rows that stay in memory
    half_bytes  of a fetcher's buffers
    """
    linears = [_shapes(op, records) for op in _linears(ops)]
    widest_in = max(shapes[0][1] for shapes in linears)
    widest_out = max(sum(n for n, _ in shapes) for shapes in linears)
    total = sum(n * k for shapes in linears for n, k in shapes)
    largest = max(n * k for shapes in linears for n, k in shapes)
    site = max(sum(n * k for n, k in shapes) for shapes in linears)
    registers = (IN_FLIGHT - 1) * 4 * chunk * sum(ops.registers.values())
    # int8 inputs, results and shadows of chunks under way; of one, what they are made from, and the
    # sums of a shadow whose rows are not there all at once
    in_parts = site > PART_BYTES
    pending = chunk * IN_FLIGHT * (widest_in + 8 * widest_out)
    pending += chunk * (8 * widest_in + (12 if in_parts else 4) * widest_out)
    rows = 2 * min(PART_BYTES, site) + COLUMNS_BYTES
    # histograms of inputs and outputs, channels, outliers: read whole, then dropped
    counted = sum(
        8 * BINS * (1 + len(shapes)) + 32 * shapes[0][1] + sum(8 * n for n, _ in shapes)
        for shapes in linears
    )
    buffers = (IN_FLIGHT + 1) * 2 * half_bytes
    common = hot + registers + pending + rows + 2 * counted + GROWTH_BYTES
    if device == "sim":
        return NpuNeeds(common + buffers + 2 * largest, common + 2 * largest + total)
    held = int(HELD[device] * total) if emulated else 2 * largest
    return NpuNeeds(common + buffers + held, common + buffers + held)


def _linears(ops: OpList) -> Sequence[Linear]:
    return [op for op in ops.ops if isinstance(op, Linear)]


def _shapes(op: Linear, records: Records) -> list[tuple[int, int]]:
    shapes = [records[name].shape for name in op.weights]
    assert all(len(shape) == 2 and prod(shape) > 0 for shape in shapes)
    return [(shape[0], shape[1]) for shape in shapes]
