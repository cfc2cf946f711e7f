"""One run under a budget, in a process of its own: python -m elute.bench.memory_run JSON

JSON has the model's packed folder and what elute.load takes; the answer is one JSON object with the
rate of generation after the first token, what was read and waited for, and a token's time line.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

PROMPT_TOKENS = 8


def measure(
    packed: str, *, memory: int, context: int, tokens: int, threads: int | None, sparsity: float
) -> dict[str, Any]:
    """tokens: of which the first, that comes with the prompt, is not timed; at least 2."""
    import elute
    from elute.bench.machine import peak_memory_bytes
    from elute.flash.page_cache import cached_bytes
    from elute.flash.timeline import token_timeline
    from elute.runtime.sampler import Sampler, Sampling

    more: dict[str, Any] = {"sparsity": sparsity} if sparsity else {}
    with elute.load(packed, memory=memory, context=context, threads=threads, **more) as model:
        assert model.flash is not None
        prompt = [token % model.executor.vocabulary for token in range(1, PROMPT_TOKENS + 1)]
        session, marks = model.engine.session, []
        sampler = Sampler(
            Sampling(temperature=0), vocabulary=model.executor.vocabulary, prompt=prompt
        )
        for _ in session.generate(prompt, sampler, max_tokens=tokens):
            marks.append((time.perf_counter(), *model.flash.figures()))
        (start, read, waited), (end, read_end, waited_end) = marks[0], marks[-1]
        pieces = model.flash.pieces
        line = token_timeline(model.flash.events(), pieces) if pieces else None
        timed = len(marks) - 1
        return {
            "tok_s": timed / (end - start),
            "read_bytes_per_token": (read_end - read) / timed,
            "waited_s": waited_end - waited,
            "missed_bytes": model.flash.plan.missed,
            "peak_bytes": peak_memory_bytes(),
            "page_cache_bytes": cached_bytes(sorted(model.path.glob("*.safetensors"))),
            "timeline": None if line is None else line.to_json(),
        }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(measure(given.pop("packed"), **given)))
