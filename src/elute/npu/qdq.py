"""Graphs as ONNX models, in the forms that NPU runtimes compile. Knows no runtime.

What holds on Qualcomm's HTP as onnxruntime-qnn 2.7.0 emulates it (v75, three shapes): MatMul by a
constant matrix, Gemm and Conv 1x1 are equally right with 8-bit activations, signed or unsigned, and
with one weight scale or one an output: within 1 step, 2 % of the outputs off by it. MatMul needs no
transposition of activations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import DeviceError, UnsupportedError
from elute.npu import checks
from elute.npu.device import Graph, Outputs
from elute.types import I8, U8

FORM = 1  # of the models below and of how they are compiled: another one is another artefact
INPUT = "x"
OPSET, IR = 21, 10
MAX_BYTES = (2**31) - (1 << 24)  # a serialized protobuf ends at 2 GiB


def unsigned(x: I8) -> U8:
    """-> x + 128, how the graphs of Outputs.INT32 want their input."""
    return x.view(np.uint8) ^ np.uint8(128)


def onnx_model(graph: Graph, outputs: Outputs) -> bytes:
    """The serialized model; its outputs are y0, y1, ... in the order of the products.

    INT8   x i8 -> DequantizeLinear -> MatMul with dequantized i8 weights -> QuantizeLinear -> i8
    INT32  x u8 (see `unsigned`) -> MatMulInteger with u8 weights, both around 128 -> i32. Not i8:
           before VNNI, x86 multiplies u8 by i8 with sums that saturate at 16 bits.

    Raises DeviceError without the onnx package, UnsupportedError for a graph of 2 GiB.
    """
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise DeviceError(
            f"npu: the package onnx does not load ({error}); pip install 'elute[npu]'"
        ) from None
    assert outputs is not Outputs.FLOAT
    size = sum(n * k for n, k in (product.shape for product in graph.products))
    if size > MAX_BYTES:
        raise UnsupportedError(
            f"{graph.name}: found {size} bytes of weights, wanted at most {MAX_BYTES}; make a "
            "graph of each product"
        )
    as_int8 = outputs is Outputs.INT8
    parts = _int8(graph) if as_int8 else _int32(graph)
    element_in = TensorProto.INT8 if as_int8 else TensorProto.UINT8
    element_out = TensorProto.INT8 if as_int8 else TensorProto.INT32
    width = graph.products[0].shape[1]
    body = helper.make_graph(
        parts.nodes,
        "products",
        [helper.make_tensor_value_info(INPUT, element_in, [graph.rows, width])],
        [
            helper.make_tensor_value_info(f"y{i}", element_out, [graph.rows, product.shape[0]])
            for i, product in enumerate(graph.products)
        ],
        parts.constants,
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    return bytes(model.SerializeToString())


class _Parts:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: npt.NDArray[Any] | np.generic) -> str:
        from onnx import numpy_helper

        array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output


def _int8(graph: Graph) -> _Parts:
    parts = _Parts()
    zero = parts.constant("zero", np.int8(0))
    reals: dict[float, str] = {}  # by input scale: products that read one input share its scale
    for i, product in enumerate(graph.products):
        if product.input_scale not in reals:
            scale = parts.constant(f"x_scale{i}", np.float32(product.input_scale))
            real = parts.node("DequantizeLinear", [INPUT, scale, zero], f"x_real{i}")
            reals[product.input_scale] = real
        per_channel = product.weight_scales.size > 1
        scales = product.weight_scales if per_channel else product.weight_scales[0]
        w = parts.node(
            "DequantizeLinear",
            [
                parts.constant(f"w{i}", checks.weights(product).T),
                parts.constant(f"w_scale{i}", scales),
                parts.constant(f"w_zero{i}", np.zeros(np.shape(scales), np.int8)),
            ],
            f"w_real{i}",
            **({"axis": 1} if per_channel else {}),
        )
        y = parts.node("MatMul", [reals[product.input_scale], w], f"y_real{i}")
        y_scale = parts.constant(f"y_scale{i}", np.float32(product.output_scale or 0))
        parts.node("QuantizeLinear", [y, y_scale, zero], f"y{i}")
    return parts


def _int32(graph: Graph) -> _Parts:
    parts = _Parts()
    zero = parts.constant("zero", np.uint8(128))
    for i, product in enumerate(graph.products):
        w = parts.constant(f"w{i}", unsigned(checks.weights(product)).T)
        parts.node("MatMulInteger", [INPUT, w, zero, zero], f"y{i}")
    return parts
