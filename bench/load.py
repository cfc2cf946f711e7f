"""How long `elute.load` takes and how much memory a model takes, in fresh processes.

    python bench/load.py [--models default,llama-3.2-1b] [--bits 4] [--runs 7]

A model is anything that `elute.load` takes, or a shape of `elute bench --shape`: random weights of
that shape with `--bits` bits, head and embedding at 8, packed once into the cache folder's bench/.
A first run that does not count fetches, packs and reads all pages into the system's cache.

Seconds count from the call of `elute.load` in a process that has imported elute: until it returns,
and until the first token of an answer to a short prompt. Then the process computes a prompt of
PROMPT_TOKENS and ANSWER_TOKENS more. Its peak is VmHWM, all of the process: Python, libraries and
the mapped pages of the weights included. Beside it stands what is promised: packed files, the cache
of the positions that were used, and SLACK_BYTES. Figures are medians over the runs. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHORT_PROMPT = "Why is the sky blue?"
PROMPT_TOKENS = 512
ANSWER_TOKENS = 16
SLACK_BYTES = 150_000_000
LOAD_GOAL_S = 1.0
STATUS = Path("/proc/self/status")


def run_once(path: str) -> dict[str, float]:
    """In the process that is measured."""
    import elute

    started = time.perf_counter()
    with elute.load(path) as model:
        loaded = time.perf_counter()
        next(model.stream(SHORT_PROMPT, temperature=0))
        first = time.perf_counter()
        prompt = [5 + i % 250 for i in range(PROMPT_TOKENS)]
        model.generate(prompt, max_tokens=ANSWER_TOKENS, temperature=0, ignore_end=True)
        positions = len(model.engine.session.history)
    return {
        "load_s": loaded - started,
        "first_token_s": first - started,
        "peak_bytes": peak_bytes(),
        "positions": positions,
    }


def peak_bytes() -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def packed_path(model: str, bits: int) -> Path:
    """Where it is; a model is fetched and packed first, the weights of a shape are written."""
    from elute.bench.random_packed import random_packed
    from elute.bench.random_weights import random_recipe
    from elute.bench.shapes import CONFIGS, shape_config
    from elute.formats.sources import cache_dir
    from elute.runtime.store import is_packed, open_packed

    if model not in CONFIGS:
        return open_packed(model).path
    path = cache_dir() / "bench" / f"{model}-{bits}-bit-packed"
    if not is_packed(path):
        random_packed(shape_config(model), random_recipe(bits=bits, outer_bits=8), path)
    return path


def measure(path: Path, runs: int) -> dict[str, Any]:
    from elute.formats.packed import PackedModel
    from elute.kernels.kv_cache import CacheType, position_bytes
    from elute.model.families import op_list

    command = [sys.executable, __file__, "--child", str(path)]
    told = []
    for _ in range(runs + 1):
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        told.append(json.loads(done.stdout))
    counted = told[1:]
    packed = PackedModel.open(path)
    ops = op_list(packed.config)
    cached = position_bytes(CacheType.F16, n_kv_heads=ops.n_kv_heads, head_width=ops.head_width) * (
        ops.n_layers * counted[0]["positions"]
    )
    packed_bytes = sum(file.size for file in packed.files.values())
    middle = {key: statistics.median(run[key] for run in counted) for key in counted[0]}
    return {
        "load_s": round(middle["load_s"], 3),
        "first_token_s": round(middle["first_token_s"], 3),
        "packed_bytes": packed_bytes,
        "cache_bytes": cached,
        "peak_bytes": middle["peak_bytes"],
        "beyond_bytes": middle["peak_bytes"] - packed_bytes - cached,
        "context": ops.context,
        "vocabulary": ops.vocabulary,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="default,llama-3.2-1b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(run_once(given.child)))
        return
    if not STATUS.exists():
        parser.error(f"found no {STATUS}, wanted Linux: peaks are read there")
    told = {}
    for model in given.models.split(","):
        found = told[model] = measure(packed_path(model, given.bits), given.runs)
        print(
            f"{model}, vocabulary {found['vocabulary']}, context {found['context']}:\n"
            f"  load {found['load_s']:.2f} s, first token {found['first_token_s']:.2f} s "
            f"(promised: load within {LOAD_GOAL_S:.0f} s)\n"
            f"  peak {found['peak_bytes'] / 1e6:.0f} MB = packed {found['packed_bytes'] / 1e6:.0f}"
            f" + cache {found['cache_bytes'] / 1e6:.0f} + {found['beyond_bytes'] / 1e6:.0f} "
            f"(promised: + {SLACK_BYTES / 1e6:.0f})"
        )
    print(json.dumps({"runs": given.runs, "models": told}))


if __name__ == "__main__":
    main()
