"""`elute npu schedule`: what an NPU and this CPU would do when, simulated from measured times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from elute.cli import options

if TYPE_CHECKING:
    from elute.bench.npu_schedule import Measured, Outcome
    from elute.npu.schedule import Task


@click.command("schedule")
@click.argument("model", default="default")
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Of the prompt.",
)
@click.option(
    "--npu",
    default="sim",
    metavar="DEVICE",
    show_default=True,
    help="What multiplies while it is measured; see run.",
)
@click.option(
    "--npu-speed",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Simulate an NPU X times as fast as this CPU's own int8 kernels, instead of as fast as "
    "DEVICE was.",
)
@click.option(
    "--crossing",
    "crossing_ms",
    type=click.FloatRange(0),
    default=0.0,
    metavar="MS",
    help="What handing a product to the NPU and back takes more.  [default: 0]",
)
@options.npu_pruning
@options.npu_chunk
@options.pack_options
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: physical cores]")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@options.as_json
@options.quiet
def command(
    model: str,
    n_tokens: int,
    npu: str,
    npu_speed: float | None,
    crossing_ms: float,
    repeats: int,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Simulate a prompt of MODEL on an NPU and this CPU, with each rule of what runs when.

    Every part of the prompt is timed alone; what counts is the least of --repeats. Bubbles are the
    share of the NPU's time, from its first product to the end of its last, in which it waits.
    No schedule is shorter than the bound. Rules with a parameter are shown by the best of it.
    """
    from elute.api import load
    from elute.bench.machine import cpu_name
    from elute.bench.npu_schedule import measure, outcomes, repeated
    from elute.cli.screen import Screen, answer_json
    from elute.npu.calibrate import WINDOW
    from elute.npu.find import REQUIRE
    from elute.npu.prompts import PromptExecutor
    from elute.runtime.calibration import own_text
    from elute.runtime.threads import default_threads

    if npu.removeprefix(REQUIRE) in ("off", "auto"):
        raise click.UsageError(f"found --npu {npu}, wanted a device to measure with")
    with Screen(quiet=quiet) as screen:
        loaded = load(
            model,
            context=None if n_tokens < WINDOW else n_tokens,  # room for a calibration
            npu=REQUIRE + npu.removeprefix(REQUIRE),
            progress=screen,
            **given,
        )
        prompts = loaded.executor
        if not isinstance(prompts, PromptExecutor):
            raise click.UsageError(f"{model}: has no products for an NPU")
        tokens = repeated(loaded.text_tokens(own_text())[0], n_tokens)
        found = measure(
            prompts,
            tokens,
            repeats=repeats,
            progress=lambda done, total: screen("measure", done, total),
        )
    times = found.times if npu_speed is None else found.imagined(npu_speed)
    results = outcomes(found.graph, times, crossing_s=crossing_ms / 1e3)
    told = {
        "model": model,
        "tokens": n_tokens,
        "chunk": prompts.chunk,
        "chunks": found.graph.n_chunks,
        "in_flight": found.graph.in_flight,
        "cpu": cpu_name(),
        "threads": given["threads"] or default_threads(),
        "device": prompts.device,
        "npu_speed": npu_speed,
        "crossing_ms": crossing_ms,
        "ms_a_chunk": _milliseconds(found, times),
        "bound_ms": round(1e3 * results[0].schedule.bound_s, 3),
        "rules": [_figures(each) for each in results],
    }
    if as_json:
        answer_json(told)
    else:
        click.echo(_page(told, results[-1]))


def _milliseconds(found: Measured, times: dict[Task, float]) -> dict[str, float]:
    """Of a chunk: as simulated, and what the device and this CPU's kernels took for products."""
    simulated = found.a_chunk(times)
    by_device = found.a_chunk(found.times)["product"]
    told = {**simulated, "product_by_device": by_device, "product_by_cpu": sum(found.kernels)}
    return {name: round(1e3 * seconds, 3) for name, seconds in told.items()}


def _figures(outcome: Outcome) -> dict[str, Any]:
    schedule = outcome.schedule
    return {
        "rule": outcome.name,
        "policy": repr(outcome.rule),
        "ms": round(1e3 * schedule.makespan_s, 3),
        "over_bound": round(schedule.makespan_s / schedule.bound_s - 1, 5),
        "npu_busy": round(schedule.npu_share, 5),
        "bubbles": round(schedule.bubbles, 5),
    }


def _page(told: dict[str, Any], quickest: Outcome) -> str:
    from elute.npu.schedule import describe

    ms = told["ms_a_chunk"]
    speed = told["npu_speed"]
    npu = f"as fast as {told['device']}" if speed is None else f"{speed:g} times this CPU's kernels"
    crossing = f", {told['crossing_ms']:g} ms more for each" if told["crossing_ms"] else ""
    lines = [
        f"{told['tokens']} tokens in {told['chunks']} chunks of {told['chunk']}, "
        f"{told['in_flight']} in flight; {told['cpu']}, {told['threads']} threads",
        f"measured a chunk: float work {ms['float']:.1f} ms, shadows {ms['shadow']:.1f}, products "
        f"{ms['product_by_device']:.1f} by {told['device']}, {ms['product_by_cpu']:.1f} by this "
        "CPU's int8 kernels",
        f"simulated NPU: {npu}, {ms['product']:.1f} ms of products a chunk{crossing}",
        "",
        f"{'rule':<26}{'ms':>9}{'over bound':>12}{'NPU busy':>10}{'bubbles':>9}",
    ]
    for each in told["rules"]:
        lines.append(
            f"{each['rule']:<26}{each['ms']:>9.1f}{each['over_bound']:>12.1%}"
            f"{each['npu_busy']:>10.1%}{each['bubbles']:>9.2%}"
        )
    lines += [
        f"{'bound':<26}{told['bound_ms']:>9.1f}",
        "",
        f"quickest, {quickest.rule}:",
        describe(quickest.schedule),
    ]
    return "\n".join(lines)
