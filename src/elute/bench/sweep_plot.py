"""The plot of a memory sweep, SVG and PNG: rates over memory, and one token's time line."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elute.bench.memory_sweep import Sweep
from elute.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (8.0, 7.0)
COLORS = {"compute": "#2a7f62", "flash": "#3465a4", "wait": "#cc4125"}


def check_matplotlib() -> None:
    """Raises UnsupportedError, before minutes of measuring, where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "memory-sweep: found no matplotlib, wanted it for the plot; pip install 'elute[report]'"
        )


def draw(sweep: Sweep, out: Path) -> tuple[Path, Path]:
    """Writes `out`.svg and `out`.png. Every series is a group of the SVG with its name as id:
    elute-sparsity-X, llama.cpp, bound, timeline-compute, timeline-flash, timeline-wait.
    """
    import matplotlib
    from matplotlib.figure import Figure

    svg, png = out.with_name(f"{out.name}.svg"), out.with_name(f"{out.name}.png")
    # Text stays text, and equal data gives equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "elute"}):
        figure = Figure(SIZE_INCHES, layout="constrained")
        rates, line = figure.subplots(2, 1, height_ratios=[3, 1])
        _draw_rates(rates, sweep)
        _draw_timeline(line, sweep)
        figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png, dpi=150)
    return svg, png


def _draw_rates(axes: Axes, sweep: Sweep) -> None:
    memory = [point.memory_bytes / 1e9 for point in sweep.points]

    def curve(name: str, values: Sequence[float | None], label: str, style: str) -> None:
        pairs = [(x, y) for x, y in zip(memory, values, strict=True) if y is not None]
        if pairs:
            (drawn,) = axes.plot(*zip(*pairs, strict=True), style, label=label)
            drawn.set_gid(name)

    for i, row in enumerate(sweep.points[0].elute):
        name = f"sparsity {row['sparsity']:g}"
        rates = [point.elute[i]["tok_s"] for point in sweep.points]
        curve(f"elute-{name.replace(' ', '-')}", rates, f"elute, {name}", "o-")
    theirs = [point.llama_cpp_tok_s for point in sweep.points]
    curve("llama.cpp", theirs, "llama.cpp, mapped file", "s-")
    curve("bound", [point.bound_tok_s for point in sweep.points], "bound: disk and memory", "k--")
    axes.set(title=sweep.model, xlabel="memory, GB", ylabel="tokens/s", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_timeline(axes: Axes, sweep: Sweep) -> None:
    line = sweep.timeline
    axes.set(xlabel="one token, ms", yticks=[0, 1, 2], yticklabels=["wait", "flash", "compute"])
    if line is None:
        axes.text(0.5, 1, "all weights fit: nothing is read", ha="center")
        return
    for at, kind in enumerate(("wait", "flash", "compute")):
        spans = [(1e3 * start, 1e3 * (end - start)) for start, end in line[kind]]
        drawn = axes.broken_barh(spans, (at - 0.35, 0.7), color=COLORS[kind])
        drawn.set_gid(f"timeline-{kind}")
    axes.set_xlim(0, 1e3 * line["seconds"])
