"""Speed under a limit of memory: elute with --memory and llama.cpp with mmap, in the same cgroup.

    python bench/memory_sweep.py PACKED [--gguf FILE] [--shares 0.4,0.65] [--tokens N] [--runs N]

PACKED is a packed folder, FILE a GGUF file with as many bytes a weight. Each limit is a share of
the packed size; every run is a process of its own in a memory control group of that size plus 5 %,
runs take turns, and the page cache is emptied before each. Wants root, for the group and the cache.
Rates are medians, in tokens/s of generation; the bound is what plan foresees from the rate of the
disk, measured each time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
CONTEXT = 512


class Group:
    """A memory control group that each command starts in."""

    def __init__(self, limit: int) -> None:
        v1 = (V1 / "memory.limit_in_bytes").exists()
        self.folder = (V1 if v1 else V2) / "elute-memory-sweep"
        self.folder.mkdir(exist_ok=True)
        (self.folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
        self._peak = self.folder / ("memory.max_usage_in_bytes" if v1 else "memory.peak")

    def run(self, command: list[str]) -> str:
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        join = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", join, "sh", *command], stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    def peak_bytes(self) -> int:
        return int(self._peak.read_text())

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.rmdir()


def elute(group: Group, packed: Path, memory: int, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "elute", "run", str(packed), "Why?", "--raw", "--json", "-q"]
    options = ["--memory", str(memory), "--context", str(CONTEXT), "--temperature", "0"]
    told = group.run([*command, *options, "--max-tokens", str(tokens)])
    answer: dict[str, Any] = json.loads(told.splitlines()[-1])
    assert answer["peak_memory_bytes"] <= memory, answer
    return answer


def llama(group: Group, gguf: Path, tokens: int, threads: int) -> float:
    """Mapped weights as they are: repacked ones are a copy, which the group has no room for."""
    command = [shutil.which("llama-bench") or "llama-bench", "-m", str(gguf), "-p", "0", "-r", "1"]
    command += ["--repack", "0", "--load-mode", "mmap"]
    told = group.run([*command, "-n", str(tokens), "-t", str(threads), "--no-warmup", "-o", "json"])
    return float(json.loads(told)[0]["avg_ts"])


def forecast(packed: Path, memory: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "elute", "plan", str(packed), "--memory", str(memory)]
    done = subprocess.run(
        [*command, "--context", str(CONTEXT), "--json", "-q"], stdout=subprocess.PIPE, text=True
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--shares", default="0.4,0.65")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--llama-tokens", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    size = sum(file.stat().st_size for file in given.packed.iterdir())
    rows = []
    for share in map(float, given.shares.split(",")):
        memory = int(share * size)
        ours, theirs, bounds, waited, peaks = [], [], [], [], []
        missed = 0
        with Group(memory * 105 // 100) as group:
            for _ in range(given.runs):
                plan = forecast(given.packed, memory)
                bounds.append(plan["tok_s"])
                missed = plan["missed_bytes"]
                told = elute(group, given.packed, memory, given.tokens)
                ours.append(told["generated_tok_s"])
                waited.append(told["flash"]["waited_s"])
                peaks.append(told["peak_memory_bytes"])
                if given.gguf is not None:
                    theirs.append(llama(group, given.gguf, given.llama_tokens, given.threads))
        row = {
            "share": share,
            "memory_bytes": memory,
            "missed_bytes": missed,
            "bound_tok_s": round(statistics.median(bounds), 3),
            "elute_tok_s": round(statistics.median(ours), 3),
            "peak_bytes": max(peaks),
            "llama_cpp_tok_s": round(statistics.median(theirs), 3) if theirs else None,
        }
        rows.append(row)
        print(
            f"{share:.0%} of {size / 1e9:.2f} GB: elute {row['elute_tok_s']} tok/s, "
            f"{row['elute_tok_s'] / row['bound_tok_s']:.0%} of the bound {row['bound_tok_s']}; "
            f"peak {max(peaks) / memory:.0%} of the limit"
            + (f"; llama.cpp {row['llama_cpp_tok_s']} tok/s" if theirs else "")
        )
    print(json.dumps({"model": given.packed.name, "runs": given.runs, "rows": rows}))


if __name__ == "__main__":
    main()
