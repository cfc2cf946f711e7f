"""One linear on a device: what the device gets and what the CPU adds make the unclipped product."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_executor import InMemory

from elute.errors import DeviceError
from elute.npu import reference
from elute.npu.codes import PanelCodes, panel_rows
from elute.npu.device import Graph, Outputs, Product, requantized
from elute.npu.linear import Pending, StaticLinear
from elute.npu.rows import Rows, weight_scales
from elute.npu.sim import PROFILES, Sim
from elute.npu.sites import Site
from elute.quantize.rtn import quantize
from elute.runtime.executor import isas

ROWS = 6
WIDTHS = (32, 64)  # outputs of the two products
K = 96


class Made:
    """A linear of two products that share an input, the second one with a bias."""

    def __init__(
        self,
        profile: str,
        *,
        scale: float = 0.5,
        isa: str = "scalar",
        shadow: bool = True,
        hot: int = 5,
        columns: bool = False,
    ) -> None:
        random = np.random.default_rng([len(profile), hot])
        self.columns = random.permutation(K).astype(np.int32) if columns else None
        names = ("q", "k")
        shapes = zip(names, WIDTHS, strict=True)
        dense = {n: random.normal(0, 1, (w, K)).astype(np.float32) for n, w in shapes}
        dense["q"][3] = 0.0
        source = InMemory(
            {n: quantize(w, bits=4, group_size=32, symmetric=True) for n, w in dense.items()}, {}
        )
        matrices = [source.matrix(n) for n in names]
        per_channel = PROFILES[profile].per_channel
        exact = [
            quantize(dense[n], bits=4, group_size=32, symmetric=True).dequantize() for n in names
        ]
        scales = [weight_scales(np.abs(w).max(axis=1), per_channel=per_channel) for w in exact]
        self.w = [panel_rows(m, s, isa=isa) for m, s in zip(matrices, scales, strict=True)]
        output_scale = None if profile == "sim" else 0.7
        products = tuple(
            Product(n, w.shape, lambda w=w: w, s, scale, output_scale, n)
            for n, w, s in zip(names, self.w, scales, strict=True)
        )
        bias = random.normal(0, 3, WIDTHS[1]).astype(np.float32)
        site = Site(0, 0, (1, 2), names, (None, bias), self.columns)
        rows = Rows(PanelCodes(matrices, isa=isa), scales, np.arange(0, 2 * hot, 2))
        self.device = Sim(profile)
        self.linear = StaticLinear(
            site, Graph(ROWS, products), self.device.profile.outputs, rows, shadow=shadow, isa=isa
        )
        self.device.load([self.linear.graph])

    def pending(self, x: np.ndarray) -> Pending:
        pending = self.linear.split(x)
        pending.results = self.device.run(self.linear.name, pending.q)
        self.linear.add_shadow(pending)
        return pending

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        # of more rows than x has, as registers are: what lies beyond is nobody's
        outputs = [np.full((ROWS + 2, w), 7, np.float32) for w in WIDTHS]
        self.linear.finish(self.pending(x), outputs)
        for y in outputs:
            assert (y[len(x) :] == 7).all()
        return [y[: len(x)] for y in outputs]

    def steps(self, x: np.ndarray) -> np.ndarray:
        """round(x / scale), i64, in the order of stored columns"""
        x = x if self.columns is None else x[:, self.columns]
        return np.rint(x / np.float32(self.linear.graph.products[0].input_scale)).astype(np.int64)


EDGES = [0.0, 63.5, 63.75, 64.0, -64.0, -64.25, -64.5, 63.25, 0.25, 0.75, -0.25, 1e-40, 8e6, -8e6]
values = st.one_of(
    st.sampled_from(EDGES),
    st.floats(-80, 80, width=32),
    st.floats(-8e6, 8e6, width=32),
    st.integers(-300, 300).map(lambda n: n / 4),  # ties of a scale of 0.5
)


@st.composite
def inputs(draw: st.DrawFn) -> np.ndarray:
    """x f32 [M, K]: mostly small, some of any size at any place."""
    m = draw(st.integers(1, ROWS))
    seed = draw(st.integers(0, 2**32 - 1))
    spread = draw(st.sampled_from([0.0, 1.0, 20.0, 60.0, 1e4]))
    x = np.random.default_rng(seed).normal(0, spread, (m, K)).astype(np.float32)
    for value in draw(st.lists(values, max_size=12)):
        x[draw(st.integers(0, m - 1)), draw(st.integers(0, K - 1))] = value
    return x


@pytest.fixture(scope="module", params=isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("columns", [False, True])
def test_both_halves_are_the_unclipped_product(profile: str, columns: bool, isa: str) -> None:
    made = Made(profile, isa=isa, columns=columns)

    @given(x=inputs())
    @settings(max_examples=40, deadline=None)
    def check(x: np.ndarray) -> None:
        q = made.steps(x)
        pending = made.pending(x)
        clipped = pending.q[: len(x)].astype(np.int64)
        assert np.array_equal(clipped, np.clip(q, -128, 127))
        assert not pending.q[len(x) :].any()
        whole = reference.unclipped(
            pending.q[: len(x)], pending.starts, pending.channels, pending.residuals
        )
        assert np.array_equal(whole, q)
        shadow = np.zeros((len(x), sum(WIDTHS)), np.int64)
        if pending.shadow is not None:
            shadow += pending.shadow
        outputs = [np.empty((len(x), w), np.float32) for w in WIDTHS]
        made.linear.finish(pending, outputs)
        at = 0
        for i, (product, w, y) in enumerate(
            zip(made.linear.graph.products, made.w, outputs, strict=True)
        ):
            own = shadow[:, at : at + len(w)]
            at += len(w)
            total = q @ w.astype(np.int64).T
            assert np.array_equal(clipped @ w.astype(np.int64).T + own, total)
            factors = (product.weight_scales * np.float32(product.input_scale)).astype(np.float32)
            exact = total.astype(np.float32) * factors
            result = pending.results[i][: len(x)]
            if made.device.profile.outputs is Outputs.INT32:
                assert np.array_equal(result + own, total)
                want = exact
            else:
                assert np.array_equal(result, requantized((total - own).astype(np.int32), product))
                want = np.float32(product.output_scale) * result.astype(np.float32)
                want = want + factors * own.astype(np.float32)
                want = np.where((result == 127) | (result == -128), exact, want)
            bias = made.linear.site.biases[i]
            assert np.array_equal(y, want if bias is None else want + bias)

    check()


@given(x=inputs(), hot=st.integers(0, K // 2))
@settings(max_examples=25, deadline=None)
def test_hot_rows_change_no_bit(x: np.ndarray, hot: int) -> None:
    for profile in PROFILES:
        for got, want in zip(
            Made(profile, hot=hot)(x), Made(profile, hot=hot, isa=isas()[-1])(x), strict=True
        ):
            assert np.array_equal(got, want)
        made = Made(profile, hot=hot)
        rows = made.linear.rows
        none = Rows(rows._codes, rows._scales, np.zeros(0, np.int64))
        channels = np.unique(np.nonzero(x)[1])
        assert np.array_equal(whole(rows, channels), whole(none, channels))
        assert none.found == 0
        assert rows.found == (channels[channels % 2 == 0] < 2 * hot).sum()


def whole(rows: Rows, channels: np.ndarray) -> np.ndarray:
    found = np.zeros((channels.size, sum(WIDTHS)), np.int8)
    for cut, part in rows.ask(channels).parts():
        found[cut] = part
    return found


@given(x=inputs())
@settings(max_examples=25, deadline=None)
def test_without_a_shadow_the_clipped_product_is_all(x: np.ndarray) -> None:
    for profile in PROFILES:
        made, clipped = Made(profile, shadow=False), Made(profile)
        at_most = np.clip(x, np.float32(-64), np.float32(63.5))
        for got, want in zip(made(x), clipped(at_most), strict=True):
            assert np.array_equal(got, want)
        assert clipped.linear.counts.clipped == 0
        assert made.linear.counts.clipped == (np.abs(made.steps(x) + 0.5) > 127.5).sum()
        assert made.linear.rows.wanted == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 2.0**24])
@pytest.mark.parametrize("at", [(0, 0), (2, 95), (1, 17)])
def test_values_that_are_no_number_of_steps_are_refused(
    bad: float, at: tuple[int, int], isa: str
) -> None:
    made = Made("sim", isa=isa)
    x = np.ones((3, K), np.float32)
    want = made(x)
    x[at] = bad
    with pytest.raises(DeviceError) as refused:
        made.linear.split(x)
    assert str(refused.value) == (
        f"q: x[{at[0]}, {at[1]}]: found {np.float32(bad):g}, wanted a finite number of at most "
        "2^24 steps of 0.5; run without --npu"
    )
    x[at] = 1
    assert all(np.array_equal(g, w) for g, w in zip(made(x), want, strict=True))


def test_the_largest_number_of_steps_is_added_back(isa: str) -> None:
    """Sums beyond 32 bits."""
    made = Made("sim", isa=isa)
    x = np.full((2, K), 2.0**23, np.float32)
    x[1, ::2] *= -1
    q = made.steps(x)
    for i, (y, w) in enumerate(zip(made(x), made.w, strict=True)):
        total = q @ w.astype(np.int64).T
        assert np.abs(total).max() > 2**31
        product = made.linear.graph.products[i]
        factors = (product.weight_scales * np.float32(product.input_scale)).astype(np.float32)
        bias = made.linear.site.biases[i]
        exact = total.astype(np.float32) * factors
        assert np.array_equal(y, exact if bias is None else exact + bias)
