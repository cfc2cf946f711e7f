"""One forecast, in a process of its own: python -m elute.bench.memory_plan PACKED MEMORY CONTEXT
THREADS SPARSITY, where 0 threads are the default. The answer is one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from elute.bench.budget import forecast, process_before_weights
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.runtime.limited import wants_channels
from elute.runtime.store import in_channel_order

if __name__ == "__main__":
    path, memory, context, threads, sparsity = sys.argv[1:]
    packed, n_threads = PackedModel.open(Path(path)), int(threads) or None
    if float(sparsity) and wants_channels(
        packed,
        op_list(packed.config),
        int(memory),
        int(context),
        "f16",
        n_threads,
        float(sparsity),
        process=process_before_weights(packed, sparsity=float(sparsity)),
    ):
        packed = in_channel_order(packed, path)  # as load does
    found = forecast(
        packed,
        int(memory),
        context=int(context),
        threads=n_threads,
        cache_type="f16",
        sparsity=float(sparsity),
    )
    print(json.dumps(found.to_json()))
