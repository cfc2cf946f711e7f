"""`elute npu compile`: a model's graphs for a chip that is elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elute.cli import options

if TYPE_CHECKING:
    from elute.npu.offline import Compiled


@click.command("compile")
@click.argument("model", default="default")
@click.option("--soc", required=True, metavar="NAME", help="The chip, such as 8-gen-3 or SM8650.")
@options.npu_pruning
@options.npu_chunk
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the graphs go.  [default: npu in the cache]",
)
@options.pack_options
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: physical cores]")
@options.as_json
@options.quiet
def command(model: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Compile the graphs of MODEL's prompts for a Snapdragon, and say what to copy to it.

    They are context binaries of Qualcomm's compiler. Needs pip install 'elute[npu]' on x86-64, and
    no phone. Graphs that are there and whole are kept, so an interrupted run goes on where it was.
    """
    from elute.cli.screen import Screen, answer_json
    from elute.prepare import compile_npu

    began = time.perf_counter()
    with Screen(quiet=quiet) as screen:
        path, calibration, compiled = compile_npu(model, progress=screen, **given)
    seconds = time.perf_counter() - began
    device = f"qnn:{compiled.soc.name}"
    if as_json:
        answer_json(
            {
                "model": model,
                "path": str(path),
                "calibration": str(calibration),
                "soc": compiled.soc.name,
                "folder": str(compiled.folder),
                "manifest": str(compiled.manifest),
                "graphs": compiled.n_graphs,
                "compiled": compiled.made,
                "bytes": compiled.n_bytes,
                "maker": dict(compiled.maker),
                "npu": device,
                "seconds": round(seconds, 2),
            }
        )
        return
    click.echo(_page(path, calibration, compiled, given, seconds))


def _page(
    path: Path, calibration: Path, compiled: Compiled, given: dict[str, Any], seconds: float
) -> str:
    soc = compiled.soc
    run = f"elute run {path.name} --npu require:qnn:{soc.name}"
    for name in ("npu_pruning", "npu_chunk"):
        if given[name] is not None:
            run += f" --{name.replace('_', '-')} {given[name]:g}"
    versions = " and ".join(
        f"{name} {version}" for name, version in compiled.maker.items() if name != "form"
    )
    rows = [
        (
            "graphs",
            f"{compiled.n_graphs} for {soc.name} ({soc.part}, HTP v{soc.arch}), "
            f"{compiled.n_bytes / 1e6:.1f} MB; {compiled.made} compiled now, "
            f"{seconds:.0f} s in all",
        ),
        ("manifest", str(compiled.manifest)),
        ("copy", f"{path}/ to the phone, with {calibration.name} in it"),
        ("", f"{compiled.folder}/ to ~/.cache/elute/npu/{compiled.folder.name}/ there"),
        ("there", run),
        ("", f"with {versions}: others compile the graphs again"),
    ]
    return "\n".join(f"{name:<10}{value}" for name, value in rows)
