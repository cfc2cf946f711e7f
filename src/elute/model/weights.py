"""The weights that an op list needs: names, shapes, and a check of those that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elute.errors import FormatError, ShapeError, UnsupportedError
from elute.model.ops import Embed, Experts, Head, Linear, OpList, RmsNorm, Router


def weight_shapes(ops: OpList) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, in order of first use; matrices and routers are [N, K]."""
    shapes: dict[str, tuple[int, ...]] = {}
    width = ops.registers
    for op in ops.ops:
        if isinstance(op, Embed):
            shapes[op.weight] = (ops.vocabulary, width[op.output])
        elif isinstance(op, Head):
            shapes[op.weight] = (ops.vocabulary, width[op.input])
        elif isinstance(op, RmsNorm):
            shapes[op.weight] = (op.head_width or width[op.input],)
        elif isinstance(op, Linear):
            for weight, output, bias in zip(op.weights, op.outputs, op.biases, strict=True):
                shapes[weight] = (width[output], width[op.input])
                if bias is not None:
                    shapes[bias] = (width[output],)
        elif isinstance(op, Router):
            shapes[op.weight] = (width[op.output], width[op.input])
        elif isinstance(op, Experts):
            for gate, up, down in zip(op.gates, op.ups, op.downs, strict=True):
                shapes[gate] = shapes[up] = (op.width, width[op.input])
                shapes[down] = (width[op.output], op.width)
    return shapes


def check_weights(
    ops: OpList,
    shape_of: Callable[[str], tuple[int, ...] | None],
    *,
    where: str,
    names: Sequence[str] | None = None,
) -> None:
    """Raises unless `shape_of` gives every weight, or those of `names`, its shape; None: not there.

    FormatError for a missing weight, ShapeError for one of another shape than the config says.
    """
    shapes = weight_shapes(ops)
    for name in shapes if names is None else names:
        wanted = shapes[name]
        found = shape_of(name)
        if found is None:
            raise FormatError(
                f"{where}: found no tensor {name}, wanted one of shape {list(wanted)}; "
                f"download the missing files or correct config.json"
            )
        check_shape(name, found, wanted, where=where)


def check_columns(ops: OpList, ordered: Callable[[str], bool], *, where: str) -> None:
    """Raises UnsupportedError for weights in an order of their own (act-order) that no executor
    takes: those of experts and embeddings. ordered: whether a matrix has one.
    """
    names = [
        name
        for op in ops.ops
        if isinstance(op, Embed | Experts)
        for name in (op.matrices() if isinstance(op, Experts) else (op.weight,))
    ]
    for name in dict.fromkeys(names):
        if ordered(name):
            raise UnsupportedError(
                f"{where}: {name} has its columns in an order of their own (act-order), wanted "
                "them in order in experts and embeddings; use a checkpoint without act-order, or "
                "--bits, which quantizes it again"
            )


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], *, where: str) -> None:
    """Raises ShapeError unless the weight has the shape that the config says."""
    if tuple(found) != wanted:
        raise ShapeError(
            f"{where}: {name} has shape {list(found)}, and config.json wants {list(wanted)}; "
            f"use the config.json that belongs to these weights"
        )
