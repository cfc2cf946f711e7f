"""What every device refuses, and the proof after loading that it multiplies right."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elute.errors import DeviceError, ShapeError, UnsupportedError
from elute.npu.device import Q_MAX, Device, Graph, Outputs, Product, Profile
from elute.types import F32, I8

MAX_K = (2**31 - 1) // (128 * Q_MAX)  # channels whose sum of products surely fits an i32
F32_EPS = float(np.finfo(np.float32).eps)


def digest(graph: Graph) -> str:
    """Of all that the compiled graph depends on, but for the device: 64 hexadecimal digits."""
    parts = [str(graph.rows), *(product.digest for product in graph.products)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def accept(graphs: Sequence[Graph], profile: Profile, *, loaded: Collection[str] = ()) -> None:
    """Raises UnsupportedError for the first graph that the device cannot compile.

    loaded  names of graphs that it has. Makes no weights: `weights` checks those.
    """
    names = set(loaded)
    for graph in graphs:
        if not graph.products or graph.rows < 1:
            raise UnsupportedError(
                f"graph: found {len(graph.products)} products of {graph.rows} rows, wanted at "
                "least one of each; leave it out"
            )
        if graph.name in names:
            raise UnsupportedError(f"{graph.name}: found it twice, wanted one graph of a name")
        names.add(graph.name)
        width = graph.products[0].shape[1]
        for product in graph.products:
            if product.shape[1] != width:
                raise UnsupportedError(
                    f"{product.name}: found K={product.shape[1]} beside K={width} of {graph.name}, "
                    "wanted one input; put it in a graph of its own"
                )
            _accept(product, profile)


def _accept(product: Product, profile: Profile) -> None:
    name, (n, k) = product.name, product.shape
    if n < 1 or not 1 <= k <= MAX_K:
        raise UnsupportedError(
            f"{name}: found the shape {n} x {k}, wanted 1 to {MAX_K} channels; beyond that sums "
            "do not fit 32 bits"
        )
    scales = product.weight_scales
    if scales.dtype != np.float32 or scales.shape not in ((1,), (n,)):
        raise UnsupportedError(
            f"{name}: found weight scales {scales.dtype} {list(scales.shape)}, "
            f"wanted float32 [1] or [{n}]"
        )
    if scales.shape != (1,) and not profile.per_channel:
        raise UnsupportedError(
            f"{name}: found {n} weight scales, wanted 1, all that {profile.name} takes; quantize "
            "the weights per tensor"
        )
    if profile.outputs is Outputs.INT8 and product.output_scale is None:
        raise UnsupportedError(
            f"{name}: found no output scale, wanted one, since {profile.name} gives int8; "
            "calibrate the outputs"
        )
    for what, values in _scales(product, profile):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise UnsupportedError(
                f"{name}: found the {what} scale {values[bad[0]]}, wanted a positive finite "
                "float32; calibrate again"
            )


def _scales(product: Product, profile: Profile) -> list[tuple[str, F32]]:
    """All that a device makes of the product's scales, as vectors."""
    input_scale = np.array([product.input_scale], np.float32)
    factors = product.weight_scales * input_scale
    scales = [("weight", product.weight_scales), ("input", input_scale), ("product", factors)]
    if profile.outputs is Outputs.INT8:
        output_scale = np.array([product.output_scale], np.float32)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            scales += [("output", output_scale), ("requantizing", factors / output_scale)]
    return scales


def weights(product: Product) -> I8:
    """-> i8 [N, K], made now and within -127..127. Raises UnsupportedError for others."""
    w = product.weights()
    if w.dtype != np.int8 or w.shape != product.shape:
        raise UnsupportedError(
            f"{product.name}: found weights {w.dtype} {list(w.shape)}, "
            f"wanted int8 {list(product.shape)}"
        )
    if (w == -128).any():
        raise UnsupportedError(
            f"{product.name}: found the weight -128, wanted -127 to 127; quantize symmetrically"
        )
    return w


def check_input(graph: Graph, x: npt.NDArray[Any]) -> None:
    """Raises ShapeError for what the graph was not compiled for."""
    wanted = [graph.rows, graph.products[0].shape[1]]
    if x.dtype != np.int8 or list(x.shape) != wanted:
        raise ShapeError(
            f"{graph.name}: found an input {x.dtype} {list(x.shape)}, wanted int8 {wanted}; "
            "an NPU's shapes are static, so pad the rows"
        )


def graph_named(graphs: Mapping[str, Graph], name: str, device: str) -> Graph:
    """Raises DeviceError for a graph that was not loaded."""
    if name not in graphs:
        raise DeviceError(
            f"npu {device}: found no graph {name} among the {len(graphs)} loaded; load it first"
        )
    return graphs[name]


def check_outputs(
    graph: Graph, profile: Profile, outputs: Sequence[npt.NDArray[Any]], device: str
) -> list[npt.NDArray[Any]]:
    """-> the outputs. Raises DeviceError unless they are what the graph promises, and finite."""
    dtype = {Outputs.INT8: np.int8, Outputs.INT32: np.int32, Outputs.FLOAT: np.float32}
    if len(outputs) != len(graph.products):
        raise DeviceError(
            f"npu {device}: {graph.name}: found {len(outputs)} outputs, "
            f"wanted {len(graph.products)}"
        )
    for product, output in zip(graph.products, outputs, strict=True):
        wanted = [graph.rows, product.shape[0]]
        if output.dtype != dtype[profile.outputs] or list(output.shape) != wanted:
            raise DeviceError(
                f"npu {device}: {product.name}: found an output {output.dtype} "
                f"{list(output.shape)}, wanted {np.dtype(dtype[profile.outputs])} {wanted}"
            )
        if profile.outputs is Outputs.FLOAT and not np.isfinite(output).all():
            raise DeviceError(
                f"npu {device}: {product.name}: found values that are not finite; "
                "use --npu off and report it"
            )
    return list(outputs)


def self_test(device: Device, graphs: Sequence[Graph]) -> None:
    """One graph of each kind (rows, shapes, scales) must multiply as `sim` does.

    Within 1 step for int8, exactly for int32, within 4 roundings for floats. Inputs hold rows of
    only 127 and only -128, where instructions that add in 16 bits saturate.

    Raises DeviceError, naming the worst product.
    """
    from elute.npu.sim import Keep, Sim

    kinds: dict[object, Graph] = {}
    for graph in graphs:
        shapes = tuple((p.shape, p.weight_scales.size > 1) for p in graph.products)
        kinds.setdefault((graph.rows, shapes), graph)
    reference = Sim(device.profile, keep=Keep.NOTHING)
    reference.load(list(kinds.values()))
    for graph in kinds.values():
        x = test_input(graph.rows, graph.products[0].shape[1])
        got, want = device.run(graph.name, x), reference.run(graph.name, x)
        for product, g, w in zip(graph.products, got, want, strict=True):
            _compare(product, g, w, device.profile)


def test_input(rows: int, width: int) -> I8:
    """-> i8 [rows, width]: rows of several spreads, and the two extremes where there is room."""
    random = np.random.default_rng(20407)
    spread = np.array([4, 16, 64, 200])[np.arange(rows) % 4, None]
    x = np.clip(np.rint(random.normal(0, spread, (rows, width))), -128, 127).astype(np.int8)
    if rows > 2:
        x[1], x[2] = 127, -128
    return x


def _compare(
    product: Product, got: npt.NDArray[Any], want: npt.NDArray[Any], profile: Profile
) -> None:
    off = np.abs(got.astype(np.float64) - want)
    bound = {Outputs.INT8: 1.0, Outputs.INT32: 0.0}.get(profile.outputs)
    excess = off - (4 * F32_EPS * np.abs(want) if bound is None else bound)
    at = np.unravel_index(np.argmax(excess), excess.shape)
    if excess[at] > 0:
        raise DeviceError(
            f"npu {profile.name}: {product.name}: found {got[at]} in row {at[0]}, output {at[1]}, "
            f"wanted {want[at]} ({(excess > 0).mean():.1%} of the outputs are wrong); use "
            "--npu off and report it"
        )
