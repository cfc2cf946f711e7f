"""`elute bench`: the group of what can be measured."""

from __future__ import annotations

import click

from elute.cli.application import VerbGroup


class BenchGroup(VerbGroup):
    """Options without a verb are those of `model`: elute bench --shape llama-2-7b --bits 2. The
    verb memory-sweep may be written as an option, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["--memory-sweep"]:
            args = ["memory-sweep", *args[1:]]
        if args and args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx):
            args = ["model", *args]
        return super().parse_args(ctx, args)


command = BenchGroup(
    "bench",
    verbs={
        "model": "Measure prompt and generation speed of a model.",
        "memory-sweep": "Measure speed over budgets of memory, and draw it.",
        "kernels": "Measure the matmul kernels against this machine's ceilings.",
    },
    modules="elute.cli.bench_",
    help="Measure speed: of a whole model, or of the matmul kernels alone. Options without a verb "
    "are those of model.",
)
