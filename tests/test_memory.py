"""The promise of memory, kept by a whole process: packed files, key-value cache and 150 MB more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.kernels.kv_cache import CacheType, position_bytes

SLACK_BYTES = 150_000_000
# Half of 130 MB is layers, so that a copy of those alone breaks the promise too. Vocabulary and
# context are those of the shape: the tokenizer takes the most of what is not weights.
CONFIG = {
    **CONFIGS["llama-3.2-1b"],
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
# VmHWM and not ru_maxrss, which a child inherits.
CHILD = """
import json, sys, elute
with elute.load(sys.argv[1], cache_dir=sys.argv[2], cache_type=sys.argv[3], threads=2) as model:
    model.generate("To be or not to be", max_tokens=4, temperature=0, ignore_end=True)
    model.generate([*range(512)], max_tokens=16, temperature=0, ignore_end=True)
    status = open("/proc/self/status").read().splitlines()
    (peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    print(json.dumps([1024 * peak, model.context, len(model.engine.session.history)]))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "model"
    return random_packed(CONFIG, random_recipe(bits=8, outer_bits=8), folder)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak is read from /proc/self/status"
)
@pytest.mark.parametrize("cache_type", CacheType)
def test_peak_is_packed_size_and_cache_and_150_mb(packed, tmp_path, cache_type):
    command = [sys.executable, "-c", CHILD, str(packed.path), str(tmp_path), cache_type]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, context, positions = json.loads(done.stdout)
    assert (context, positions) == (131072, 512 + 15)  # the last token is not computed
    cached = position_bytes(cache_type, n_kv_heads=CONFIG["num_key_value_heads"], head_width=64) * (
        positions * CONFIG["num_hidden_layers"]
    )
    n_bytes = sum(file.size for file in packed.files.values())
    assert peak > packed.nbytes  # every weight was read
    assert peak <= n_bytes + cached + SLACK_BYTES, (
        f"peak {peak / 1e6:.0f} MB, packed {n_bytes / 1e6:.0f}, cache {cached / 1e6:.0f}"
    )
