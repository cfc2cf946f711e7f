"""`elute npu`: the group of what prepares prompts for an NPU."""

from __future__ import annotations

from elute.cli.application import VerbGroup

command = VerbGroup(
    "npu",
    verbs={
        "calibrate": "Measure what static int8 scales do to a model.",
        "compile": "Compile a model for a Snapdragon, which need not be here.",
        "schedule": "Show how an NPU and this CPU would share a prompt.",
    },
    modules="elute.cli.npu_",
    help="Prepare a model for NPUs, which multiply prompts in int8; run, chat and eval use them "
    "with --npu, and doctor shows those of this machine.",
)
