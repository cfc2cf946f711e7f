"""What int8 prompts cost in accuracy and in time: shadow outliers beside what others do.

    python bench/npu.py [MODEL] --text FILE [--windows 40] [--context 512] [--only ROW ...]
                        [--table accuracy|pruning|bounds|noise|time] [--against PERPLEXITY]
                        [--shares 0,0.25,0.35,0.5,0.6,0.75,0.85,0.9,1] [--threads 1]

Perplexities by elute eval's protocol. Every row runs elute's own executor, cut at the products of
its linear layers, which are made otherwise; attention, norms and head stay. Scales come from a
calibration on elute's own text. Rows with a choice of bounds and shadows are the product itself on
the device `sim`; those of other methods, in float BLAS on rounded values, are in npu_methods.py.

    accuracy  float, elute's CPU path, static int8, shadows, SmoothQuant, LLM.int8
    pruning   shares of inputs without a shadow, by measured effect and by llm.npu's rule
    bounds    how far input and output scales reach, and how many rows stay in memory
    noise     calibrations on halves of the text
    time      of shadows, one chunk of 256 tokens, beside the int8 products on this CPU; no eval

`%` is against --against, which is measured where it is not given (float, slow). The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from npu_methods import (
    Float,
    LlmInt8,
    Method,
    MethodExecutor,
    RoundedWeights,
    SmoothQuant,
    Static,
)

from elute import _native
from elute.api import text_tokens
from elute.evaluate.perplexity import perplexity, text_windows
from elute.evaluate.reference import FloatExecutor
from elute.formats.tokenizer import Tokenizer
from elute.model.families import op_list
from elute.npu import assemble as assembled
from elute.npu import calibrate as calibration
from elute.npu import choices as chosen
from elute.npu.calibrate import SiteStatistics
from elute.npu.choices import Choice
from elute.npu.linear import Pending, StaticLinear
from elute.npu.prompts import PromptExecutor
from elute.npu.sim import Keep, Sim
from elute.pack.reorder import dequantized
from elute.runtime.calibration import own_text
from elute.runtime.executor import CHUNK, Executor
from elute.runtime.flash_codes import codes_of
from elute.runtime.npu import DEFAULT_PRUNING, measured_for_npu
from elute.runtime.store import open_packed
from elute.types import F32, I32

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.85)
PADDING = 64  # bytes that kernels may read past the planes
ROUNDS = 15

Statistics = Mapping[str, SiteStatistics]
Choices = Mapping[str, Choice]
Row = dict[str, Any]


class Bench:
    """A model, a text, and what a calibration found."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.packed = open_packed(given.model)
        self.ops = op_list(self.packed.config)
        tokenizer = Tokenizer.from_files(self.packed.tokenizer_files())
        self.own, _ = text_tokens(tokenizer, own_text())
        self.windows: list[list[int]] = []
        if given.text is not None:
            tokens, bos = text_tokens(tokenizer, given.text.read_text())
            self.windows = text_windows(
                tokens, context=given.context, n_windows=given.windows, bos=bos
            )
        context = max(given.context, calibration.WINDOW)
        self.context = context
        self.shares = [float(share) for share in given.shares.split(",")]
        self.host = Executor(self.ops, self.packed, context=context, n_threads=given.threads)
        self.statistics = measured_for_npu(self.packed, self.host, lambda: self.own)
        self.int8_bytes = sum(
            int(np.prod(self.packed.matrix(name).shape))
            for site in self.host.sites
            for name in site.weights
        )

    def weights(self, name: str) -> F32:
        return dequantized(self.packed, name)

    @cached_property
    def effects(self) -> dict[str, Mapping[Choice, float]]:
        return {name: found.effects for name, found in self.statistics.items()}

    def measure(self, executor: Any) -> Row:
        began = time.perf_counter()
        found = perplexity(executor, self.windows)
        seconds = time.perf_counter() - began
        return {
            "perplexity": found.perplexity,
            "error": found.standard_error,
            "seconds": round(seconds, 1),
        }

    def prompts(
        self,
        choices: Choices,
        *,
        profile: str = "sim",
        per_channel: bool = True,
        repair: bool = True,
        hot_share: float = assembled.HOT_SHARE,
        statistics: Statistics | None = None,
    ) -> PromptExecutor:
        """The product on the device `sim`. repair: saturated outputs are computed again."""
        device = Sim(profile, keep=Keep.FLOAT)
        linears = assembled.static_linears(
            self.host.sites,
            codes_of(self.packed, self.packed, None, isa=self.host.isa),
            self.statistics if statistics is None else statistics,
            choices,
            device.profile,
            chunk=CHUNK,
            identity="bench",
            isa=self.host.isa,
            per_channel=per_channel,
            hot_share=hot_share,
        )
        device.load([linear.graph for linear in linears])
        if not repair:
            for linear in linears:
                linear._repair = lambda *_: None
        return PromptExecutor(self.host, linears, device, chunk=CHUNK)

    def shadows(self, choices: Choices, **options: Any) -> Row:
        prompts = self.prompts(choices, **options)
        row = self.measure(prompts)
        figures = prompts.figures()
        counts = figures.counts
        row["clipped"] = counts.clipped / counts.inputs
        row["shadows"] = sum(choice.shadow for choice in choices.values())
        if counts.outputs:
            row["saturated"] = counts.saturated / counts.outputs
        if figures.wanted:
            row["found"] = figures.found / figures.wanted
        row["memory"] = held_bytes(prompts) / self.int8_bytes
        return row

    def method(self, method: Method) -> Row:
        executor = MethodExecutor(self.host, method)
        row = self.measure(executor)
        return {**row, "clipped": method.clipped / max(method.seen, 1)}


def held_bytes(prompts: PromptExecutor) -> int:
    """Of weight rows that stay in memory."""
    return sum(linear.rows.nbytes for linear in prompts.linears)


def by_paper(bench: Bench, pruned: float) -> dict[str, Choice]:
    """As llm.npu: most important is the largest outlier over the scale of 99.9 % of the values;
    the others' scales are of the largest value.
    """
    shadow, plain = chosen.SHADOWED[0], chosen.PLAIN[0]
    reach = {
        name: found.input.maximum / shadow.bound(found.input)
        for name, found in bench.statistics.items()
    }
    ranked = sorted(reach, key=lambda name: reach[name])
    without = set(ranked[: round(pruned * len(ranked))])
    return {name: plain if name in without else shadow for name in reach}


@dataclass(frozen=True)
class Line:
    name: str
    measure: Callable[[], Row]


def accuracy(bench: Bench) -> Iterator[Line]:
    sites = list(bench.effects)
    widest = dict.fromkeys(sites, Choice(1.0, False))
    every = chosen.choose(bench.effects, 0.0)
    default = chosen.choose(bench.effects, DEFAULT_PRUNING)

    def shadows(choices: Choices, **options: Any) -> Callable[[], Row]:
        return lambda: bench.shadows(choices, **options)

    def method(make: Callable[[], Method]) -> Callable[[], Row]:
        return lambda: bench.method(make())

    yield Line("elute, CPU", lambda: bench.measure(bench.host))
    common = (bench.host.sites, bench.weights)
    yield Line("float products, elute's head", method(lambda: Float(*common)))
    for per_channel in (True, False):
        of = "per channel" if per_channel else "per tensor"
        yield Line(
            f"weights alone, {of}",
            method(lambda p=per_channel: RoundedWeights(*common, per_channel=p)),
        )
        yield Line(f"static, largest, {of}", shadows(widest, per_channel=per_channel))
        yield Line(f"all shadows, {of}", shadows(every, per_channel=per_channel))
        yield Line(f"default shadows, {of}", shadows(default, per_channel=per_channel))
        htp = {"profile": "htp", "per_channel": per_channel}
        yield Line(f"all shadows, {of}, int8 out", shadows(every, **htp))
        yield Line(f"default shadows, {of}, int8 out", shadows(default, **htp))
        yield Line(
            f"default shadows, {of}, int8 out, not repaired",
            shadows(default, repair=False, **htp),
        )
        for alpha in ALPHAS:
            yield Line(
                f"SmoothQuant {alpha}, {of}",
                method(
                    lambda a=alpha, p=per_channel: SmoothQuant(
                        *common, bench.statistics, alpha=a, per_channel=p
                    )
                ),
            )
        yield Line(f"LLM.int8, {of}", method(lambda p=per_channel: LlmInt8(*common, per_channel=p)))
    yield Line(
        "rounded, nothing clipped, float sums",
        method(lambda: Static(*common, bench.statistics, every)),
    )


def pruning(bench: Bench) -> Iterator[Line]:
    for share in bench.shares:
        yield Line(
            f"{share:g} by effect",
            lambda s=share: bench.shadows(chosen.choose(bench.effects, s)),
        )
        if 0 < share < 1:
            yield Line(f"{share:g} by reach", lambda s=share: bench.shadows(by_paper(bench, s)))


def bounds(bench: Bench) -> Iterator[Line]:
    """For each choice that the default has a shadow for; and scales of outputs."""
    default = chosen.choose(bench.effects, DEFAULT_PRUNING)

    def with_bound(bound: Choice) -> dict[str, Choice]:
        return {name: bound if c.shadow else c for name, c in default.items()}

    for bound in chosen.SHADOWED:
        every = dict.fromkeys(default, bound)
        yield Line(f"every site at {bound}", lambda e=every: bench.shadows(e))
        yield Line(f"all shadowed at {bound}", lambda b=bound: bench.shadows(with_bound(b)))
    for share in (0.99, 0.999, 0.9999, 1.0):

        def by_output(share: float = share) -> Row:
            kept, calibration.OUTPUT_SHARE = calibration.OUTPUT_SHARE, share
            try:
                return bench.shadows(default, profile="htp")
            finally:
                calibration.OUTPUT_SHARE = kept

        yield Line(f"int8 out holds {share:g}", by_output)
    for hot in (0.005, 0.01, 0.02, 0.03):
        yield Line(f"{hot:.1%} of rows held", lambda h=hot: bench.shadows(default, hot_share=h))


def noise(bench: Bench) -> Iterator[Line]:
    half = len(bench.own) // 2
    base = chosen.choose(bench.effects, DEFAULT_PRUNING)

    def calibrated(tokens: Sequence[int]) -> Row:
        found = calibration.calibrate(bench.host, bench.weights, tokens)
        effects = {name: of.effects for name, of in found.items()}
        choices = chosen.choose(effects, DEFAULT_PRUNING)
        row = bench.shadows(choices, statistics=found)
        same = sum(base[name].shadow == choices[name].shadow for name in base)
        equal = sum(base[name] == choices[name] for name in base)
        return {**row, "same_shadow": same / len(base), "same_choice": equal / len(base)}

    yield Line("elute, CPU", lambda: bench.measure(bench.host))
    yield Line("whole text", lambda: bench.shadows(base))
    yield Line("whole text again", lambda: calibrated(bench.own))
    yield Line("first half", lambda: calibrated(bench.own[:half]))
    yield Line("second half", lambda: calibrated(bench.own[half:]))


def times(bench: Bench, tokens: Sequence[int]) -> list[Row]:
    """Of one thread each, the least of ROUNDS: other programs only add. `tokens` are a chunk's."""
    isa = bench.host.isa
    products_ms = peak_ms = 0.0
    gops = _native.multiply_gops(isa, 1)
    for site in bench.host.sites:
        for name in site.weights:
            matrix = bench.packed.matrix(name)
            n, k = matrix.shape
            x = np.random.default_rng(n + k).standard_normal((CHUNK, k)).astype(np.float32)
            seconds, *_ = _native.matmul_seconds(
                isa, 1, x, np.pad(matrix.planes, (0, PADDING))[None], matrix.scales[None],
                None if matrix.offsets is None else matrix.offsets[None], n, matrix.bits,
                matrix.group_size, matrix.zero, str(matrix.affine), ROUNDS, False,
            )  # fmt: skip
            products_ms += min(seconds) * 1e3
            peak_ms += 2e-6 * CHUNK * n * k / gops
    rows = []
    kinds = {
        "effect": lambda s: chosen.choose(bench.effects, s),
        "reach": lambda s: by_paper(bench, s),
    }
    for kind, choose in kinds.items():
        for share in bench.shares:
            rows.append(
                {"pruned": share, "by": kind}
                | chunk_times(bench, choose(share), np.asarray(tokens, np.int32))
                | {"int8_ms": products_ms, "peak_ms": peak_ms}
            )
    return rows


def chunk_times(bench: Bench, choices: Choices, tokens: I32) -> Row:
    """Milliseconds of a chunk, over all sites: the least of ROUNDS, summed. Repairs are those of a
    device with int8 outputs."""
    prompts, seen = observed(bench, choices, "sim", "add_shadow", tokens)
    sums = {"product_ms": 0.0, "shadow_ms": 0.0}
    outliers = channels = 0
    for linear, plain, (pending,) in seen:
        if pending.wanted is None:
            continue
        wanted = np.unique(pending.channels)
        rows = np.concatenate([part for _, part in linear.rows.ask(wanted).parts()])
        arguments = (pending.starts, pending.slots, pending.residuals, rows)
        outliers += pending.residuals.size
        channels += wanted.size
        sums["product_ms"] += least_ms(
            lambda a=arguments: _native.shadow_product(bench.host.isa, *a)
        )
        sums["shadow_ms"] += least_ms(
            lambda linear=linear, plain=plain, of=pending, wanted=wanted: plain(
                replace(of, wanted=linear.rows.ask(wanted))
            )
        )
    _, seen = observed(bench, choices, "htp", "_repair", tokens)
    repair_ms = sum(least_ms(lambda plain=plain, a=a: plain(*a)) for _, plain, a in seen)
    return {
        **sums,
        "repair_ms": repair_ms,
        "outliers": outliers,
        "rows": channels,
        "shadows": sum(c.shadow for c in choices.values()),
        "memory": held_bytes(prompts) / bench.int8_bytes,
    }


def observed(
    bench: Bench, choices: Choices, profile: str, method: str, tokens: I32
) -> tuple[PromptExecutor, list[tuple[StaticLinear, Callable[..., None], tuple[Any, ...]]]]:
    """A prompt, and with what each linear's method was called: (linear, the method, arguments)."""
    prompts = bench.prompts(choices, profile=profile)
    calls: list[tuple[StaticLinear, Callable[..., None], tuple[Any, ...]]] = []
    for linear in prompts.linears:
        plain = getattr(linear, method)

        def called(*a: Any, linear: StaticLinear = linear, plain: Any = plain) -> None:
            kept = tuple(replace(each) if isinstance(each, Pending) else each for each in a)
            calls.append((linear, plain, kept))
            plain(*a)

        setattr(linear, method, called)
    prompts.prompt(tokens, 0)
    return prompts, calls


def least_ms(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--table", choices=["accuracy", "pruning", "bounds", "noise", "time"], default="accuracy"
    )
    parser.add_argument("--only", action="append", help="rows whose name is like this, as of files")
    parser.add_argument("--against", type=float, help="perplexity in float")
    parser.add_argument("--shares", default="0,0.25,0.35,0.5,0.6,0.75,0.85,0.9,1")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    bench = Bench(given)
    told = {**vars(given), "text": given.text.name}
    if given.table == "time":
        rows = times(bench, bench.windows[0][:CHUNK])
        for row in rows:
            ratios = {k: row[k] / row["int8_ms"] for k in ("product_ms", "shadow_ms")}
            print(row | ratios)
        print(json.dumps({**told, "rows": rows}))
        return
    only = given.only or ["*"]
    against = given.against
    rows = []
    if against is None:
        row = bench.measure(FloatExecutor(bench.packed, context=bench.context))
        against = row["perplexity"]
        rows.append({"name": "float", **row})
    print(f"{'':<44}{'perplexity':>11}{'%':>9}{'clipped %':>11}{'seconds':>9}")
    table = {"accuracy": accuracy, "pruning": pruning, "bounds": bounds, "noise": noise}
    for line in table[given.table](bench):
        if not any(fnmatch(line.name, wanted) for wanted in only):
            continue
        row = {"name": line.name, **line.measure()}
        rows.append(row)
        more = " ".join(
            f"{key} {row[key]:.4g}" for key in row
            if key not in ("name", "perplexity", "error", "seconds", "clipped")
        )  # fmt: skip
        print(
            f"{line.name:<44}{row['perplexity']:>11.3f}"
            f"{100 * (row['perplexity'] / against - 1):>9.2f}"
            f"{100 * row.get('clipped', 0.0):>11.4f}{row['seconds']:>9.1f}  {more}",
            flush=True,
        )
    print(json.dumps({**told, "against": against, "rows": rows}))


if __name__ == "__main__":
    main()
