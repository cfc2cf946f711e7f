"""One forecast, in a process of its own: python -m elute.bench.memory_plan PACKED MEMORY CONTEXT
THREADS SPARSITY, where 0 threads are the default. The answer is one JSON object."""

from __future__ import annotations

import json
import sys

from elute.bench.budget import forecast
from elute.formats.packed import PackedModel

if __name__ == "__main__":
    path, memory, context, threads, sparsity = sys.argv[1:]
    found = forecast(
        PackedModel.open(path),
        int(memory),
        context=int(context),
        threads=int(threads) or None,
        cache_type="f16",
        sparsity=float(sparsity),
    )
    print(json.dumps(found.to_json()))
