"""What a cache-aware choice of marginal channels costs and saves (elute run --cache-aware).

    python bench/cache_aware.py --text FILE [--model default] [--sparsity 0.5] [--share 0.45]
                                [--margins 0,0.25,0.5,1] [--windows 4] [--context 512]

The layers of a model in channel order get `share` of their bytes as memory, staging included. Each
window is fed token by token, as an answer is generated, from an empty KV cache and with whatever
the window before left in memory; the predictions of its second half are scored. By margin:
perplexity, the share of wanted blocks that were in memory or read ahead, the share of channels that
counted, bytes read and requests a token, tokens a second. Reads end where the disk's own cache
begins: a model that is small beside that cache is read faster than the disk could. A table, and one
JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from elute.api import text_tokens
from elute.evaluate.perplexity import text_windows
from elute.flash.banks import active_rows, channel_sizes
from elute.flash.disk import measured
from elute.flash.plan import solve_banks
from elute.flash.sparsity import thresholds
from elute.flash.weights import FlashWeights
from elute.formats.tokenizer import Tokenizer
from elute.model.families import op_list
from elute.runtime import calibration
from elute.runtime.executor import Executor
from elute.runtime.store import open_packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--share", type=float, default=0.45)
    parser.add_argument("--margins", default="0,0.25,0.5,1")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    given = parser.parse_args()

    packed = open_packed(given.model, by_channel=True)
    ops = op_list(packed.config)
    tokenizer = Tokenizer.from_files(packed.tokenizer_files())
    tokens, bos = text_tokens(tokenizer, given.text.read_text())
    windows = text_windows(tokens, context=given.context, n_windows=given.windows, bos=bos)
    scores = calibration.saved(packed, ops)
    if scores is None:
        own, _ = text_tokens(tokenizer, calibration.own_text())
        ones = calibration.importances(packed, ops)
        executor = Executor(ops, packed, context=calibration.WINDOW)
        scores = calibration.calibrate(executor, ops, ones, own)
        calibration.save(packed, scores)
    sizes = [sized.size for sized in channel_sizes(ops, packed.records, given.sparsity)]
    plan = solve_banks(int(given.share * sum(size.total for size in sizes)), {}, sizes)
    disk = measured(packed.largest_shard, folder=None)
    found: list[dict[str, Any]] = []
    print("margin  perplexity   hits  counted  MB a token  requests  tok/s", flush=True)
    for margin in (float(margin) for margin in given.margins.split(",")):
        weights = FlashWeights(
            packed, ops, plan, request_bytes=disk.request_bytes, gap_bytes=disk.gap_bytes
        )
        executor = Executor(ops, weights, context=given.context)
        executor.sparsify(thresholds(scores, given.sparsity), cache_aware=margin)
        widths = {use: entry.importance.size for use, entry in enumerate(scores.values())}
        assert weights.banks is not None
        nats, scored, counted, seconds, n_tokens = 0.0, 0, 0, 0.0, 0
        for window in windows:
            for at, token in enumerate(window[:-1]):
                started = time.perf_counter()
                logits = executor.forward(np.array([token], np.int32), at)[0].astype(np.float64)
                seconds += time.perf_counter() - started
                n_tokens += 1
                if at + 1 >= given.context // 2:
                    nats += math.log(np.exp(logits - logits.max()).sum())
                    nats -= logits[window[at + 1]] - logits.max()
                    scored += 1
                counted += sum(
                    int(active_rows(weights.banks, use, width).sum())
                    for use, width in widths.items()
                )
        told = weights.banks.figures()
        line = {
            "margin": margin,
            "perplexity": math.exp(nats / scored),
            "hits": 1 - told["missed"] / told["blocks"],
            "counted": counted / n_tokens / sum(widths.values()),
            "read_bytes": told["read_bytes"] / n_tokens,
            "requests": told["requests"] / n_tokens,
            "tok_s": n_tokens / seconds,
        }
        found.append(line)
        print(
            f"{margin:6.2f}{line['perplexity']:12.2f}{line['hits']:7.3f}{line['counted']:9.3f}"
            f"{line['read_bytes'] / 1e6:12.2f}{line['requests']:10.0f}{line['tok_s']:7.1f}",
            flush=True,
        )
        del executor, weights
    print(
        json.dumps(
            {
                "model": given.model,
                "sparsity": given.sparsity,
                "share": given.share,
                "held": plan.slot_bytes / sum(size.total for size in sizes),
                "margins": found,
            }
        )
    )


if __name__ == "__main__":
    main()
