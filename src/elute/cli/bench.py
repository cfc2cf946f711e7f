"""`elute bench`: the group of what can be measured."""

from __future__ import annotations

from elute.cli.application import VerbGroup

command = VerbGroup(
    "bench",
    verbs={
        "model": "Measure prompt and generation speed of a model.",
        "kernels": "Measure the matmul kernels against this machine's ceilings.",
    },
    modules="elute.cli.bench_",
    help="Measure speed: of a whole model, or of the matmul kernels alone.",
)
