"""What `elute info` and `elute doctor` show of the choice between lookup and multiply."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def kernels_json(isa: str | None, widths: Iterable[int], kernel: str) -> dict[str, Any]:
    """Keys of --json here and in doctor: what multiplies each bit width, and why."""
    from elute.kernels import registry
    from elute.runtime.executor import chosen_isa

    isa = chosen_isa(isa)
    file = registry.cache_file()
    return {
        "isa": isa,
        "kernels": [
            {
                "bits": choice.bits,
                "one_token": choice.one_row.value,
                "lookup_tokens": choice.most_lookup_rows,
                "lookup_over_multiply": dict(zip(registry.RACE_ROWS, choice.ratios, strict=False)),
                "reason": choice.reason,
            }
            for choice in registry.choose(isa, widths, kernel).values()
        ],
        "kernels_file": str(file) if file is not None and file.exists() else None,
    }


def kernel_lines(told: dict[str, Any]) -> list[str]:
    """kernels_json for people: a line a bit width, and where the measurements are."""
    lines = []
    for choice in told["kernels"]:
        most = choice["lookup_tokens"]
        if most is None:
            what = "lookup of any number of tokens"
        elif most == 0:
            what = "multiply of any number of tokens"
        else:
            what = f"lookup of 1 to {most} tokens, multiply of more"
        bits = "1 bit" if choice["bits"] == 1 else f"{choice['bits']} bits"
        lines.append(f"{bits}: {what} ({choice['reason']})")
    kept = told["kernels_file"] or "no file, so each start measures"
    return [*lines, f"{told['isa']}; measurements in {kept}"]
