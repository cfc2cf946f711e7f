import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from products import exact, graph, inputs, product

from elute.errors import DeviceError, ShapeError, UnsupportedError
from elute.npu import checks
from elute.npu.device import Graph, Outputs, Profile
from elute.npu.sim import PROFILES, Keep, Sim, integer_product

F32 = np.float32
FLOATS = Profile("floats", per_channel=True, outputs=Outputs.FLOAT)


@given(
    m=st.integers(1, 5), n=st.integers(1, 9), k=st.integers(1, 4100),
    seed=st.integers(0, 2**32 - 1), extreme=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_products_by_float_blocks_are_exact(m, n, k, seed, extreme) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(-128, 128, (m, k)).astype(np.int8)
    w = random.integers(-127, 128, (n, k)).astype(np.int8)
    if extreme:
        x[:], w[:] = -128, -127
    want = x.astype(np.int64) @ w.astype(np.int64).T
    assert np.array_equal(integer_product(x, w), want)
    assert np.array_equal(integer_product(x, w.astype(np.float32)), want)


@pytest.mark.parametrize("keep", list(Keep))
@pytest.mark.parametrize("name", [*PROFILES, "floats"])
def test_every_profile_and_choice_of_keeping_gives_its_outputs(name: str, keep: Keep) -> None:
    profile = PROFILES.get(name, FLOATS)
    of = graph(7, 1500, 40, 24, per_channel=profile.per_channel)
    device = Sim(profile, keep=keep)
    stages = []
    device.load([of], progress=lambda *told: stages.append(told))
    assert stages == [("npu: compile", 1, 1)]
    x = inputs(7, 1500)
    for p, got in zip(of.products, device.run(of.name, x), strict=True):
        acc = exact(x, p)
        scale = (p.weight_scales * np.float32(p.input_scale)).astype(np.float32)
        if profile.outputs is Outputs.INT32:
            assert got.dtype == np.int32
            assert np.array_equal(got, acc)
        elif profile.outputs is Outputs.FLOAT:
            assert got.dtype == np.float32
            assert np.array_equal(got, acc.astype(np.float32) * scale)
        else:
            factor = scale / np.float32(p.output_scale)
            want = np.clip(np.rint(acc.astype(np.float32) * factor), -128, 127)
            assert got.dtype == np.int8
            assert np.array_equal(got, want)
            assert np.abs(got.astype(int)).max() >= 127


def test_the_self_test_passes_sim_and_names_what_is_wrong() -> None:
    of = graph(6, 64, 8)
    device = Sim("htp")
    device.load([of])
    checks.self_test(device, [of])

    class Saturating(Sim):
        def run(self, graph, x):
            """As if sums ended at 16 bits."""
            return [np.clip(y, -32768, 32767) for y in super().run(graph, x)]

    wrong = Saturating("sim")
    wrong.load([of])
    with pytest.raises(
        DeviceError, match=r"npu sim: p0.8x64: found -?32767|8 in row \d+, output \d+, wanted -?\d+"
    ):
        checks.self_test(wrong, [of])


def test_the_input_of_the_self_test_has_the_extremes() -> None:
    x = checks.test_input(8, 100)
    assert (x[1] == 127).all()
    assert (x[2] == -128).all()


NOT_A_SCALE = ", wanted a positive finite float32; calibrate again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scales": np.full(8, np.nan, F32)}, f"the weight scale nan{NOT_A_SCALE}"),
        ({"weight_scales": np.zeros(1, F32)}, f"the weight scale 0.0{NOT_A_SCALE}"),
        (
            {"weight_scales": np.ones(3, F32)},
            "weight scales float32 [3], wanted float32 [1] or [8]",
        ),
        ({"weight_scales": np.ones(1)}, "weight scales float64 [1], wanted float32 [1] or [8]"),
        ({"input_scale": float("inf")}, f"the input scale inf{NOT_A_SCALE}"),
        ({"input_scale": -1.0}, f"the input scale -1.0{NOT_A_SCALE}"),
        (
            {"input_scale": 1e-44, "weight_scales": np.full(1, 1e-3, F32)},
            f"the product scale 0.0{NOT_A_SCALE}",
        ),
        ({"output_scale": 0.0}, f"the output scale 0.0{NOT_A_SCALE}"),
        (
            {"output_scale": None},
            "no output scale, wanted one, since htp gives int8; calibrate the outputs",
        ),
        (
            {"shape": (8, 200_000)},
            "the shape 8 x 200000, wanted 1 to 132104 channels; beyond that sums do not fit 32 "
            "bits",
        ),
        (
            {"weights": lambda: np.full((8, 16), -128, np.int8)},
            "the weight -128, wanted -127 to 127; quantize symmetrically",
        ),
        (
            {"weights": lambda: np.zeros((8, 16), F32)},
            "weights float32 [8, 16], wanted int8 [8, 16]",
        ),
        (
            {"weights": lambda: np.zeros((16, 8), np.int8)},
            "weights int8 [16, 8], wanted int8 [8, 16]",
        ),
    ],
)
def test_sim_refuses_products_that_an_npu_refuses(changes: dict, message: str) -> None:
    of = Graph(4, (dataclasses.replace(product(8, 16, name="wq"), **changes),))
    with pytest.raises(UnsupportedError) as refused:
        Sim("htp").load([of])
    assert str(refused.value) == f"wq: found {message}"


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (
            Graph(4, (product(8, 16, name="wq"), product(8, 24, name="wk"))),
            "wk: found K=24 beside K=16 of wq, wanted one input; put it in a graph of its own",
        ),
        (
            Graph(0, (product(8, 16, name="wq"),)),
            "graph: found 1 products of 0 rows, wanted at least one of each; leave it out",
        ),
    ],
)
def test_sim_refuses_graphs_that_an_npu_refuses(of: Graph, message: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        Sim("htp").load([of])
    assert str(refused.value) == message


def test_one_scale_refuses_a_scale_for_each_output() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"p0.8x16: found 8 weight scales, wanted 1, all that one-scale takes; "
        "quantize the weights per tensor",
    ):
        Sim("one-scale").load([graph(4, 16, 8)])


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((4, 16), np.float32),
        np.zeros((4, 16), np.uint8),
        np.zeros((3, 16), np.int8),
        np.zeros((4, 17), np.int8),
        np.zeros(64, np.int8),
    ],
)
def test_sim_refuses_inputs_that_it_was_not_compiled_for(x: np.ndarray) -> None:
    device = Sim()
    device.load([graph(4, 16, 8)])
    with pytest.raises(ShapeError) as refused:
        device.run("p0.8x16", x)
    assert str(refused.value) == (
        f"p0.8x16: found an input {x.dtype} {list(x.shape)}, wanted int8 [4, 16]; "
        "an NPU's shapes are static, so pad the rows"
    )


def test_names_are_known_once() -> None:
    of = graph(4, 16, 8)
    device = Sim()
    with pytest.raises(DeviceError, match=r"npu sim: found no graph p0.8x16 among the 0 loaded"):
        device.run(of.name, inputs(4, 16))
    device.load([of])
    with pytest.raises(UnsupportedError, match=r"p0.8x16: found it twice, wanted one graph of a"):
        device.load([of])
    device.close()
    device.load([of])
    with pytest.raises(UnsupportedError, match="npu sim: found the profile x, wanted one of sim, "):
        Sim("x")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_an_error_of_the_device(bad: float) -> None:
    of = graph(2, 16, 8)
    outputs = [np.full((2, 8), 1, F32)]
    assert checks.check_outputs(of, FLOATS, outputs, "floats") == outputs
    outputs[0][1, 3] = bad
    with pytest.raises(DeviceError) as refused:
        checks.check_outputs(of, FLOATS, outputs, "floats")
    assert str(refused.value) == (
        "npu floats: p0.8x16: found values that are not finite; use --npu off and report it"
    )
    with pytest.raises(DeviceError, match="found 0 outputs, wanted 1"):
        checks.check_outputs(of, FLOATS, [], "floats")


def test_a_digest_is_of_rows_and_products_in_order() -> None:
    a, b = product(8, 16), product(8, 16, seed=1)
    graphs = [Graph(4, (a, b)), Graph(4, (b, a)), Graph(5, (a, b)), Graph(4, (a,))]
    assert len({checks.digest(of) for of in graphs}) == 4
    assert checks.digest(Graph(4, (product(8, 16), b))) == checks.digest(graphs[0])
