"""Whether a run under a budget reads less by channel, and what `load` does with the answer."""

from types import SimpleNamespace

import pytest

import elute
from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.errors import NOTE, BudgetError
from elute.model.families import op_list
from elute.runtime import calibration
from elute.runtime.executor import Executor
from elute.runtime.memory import channels_read_less

SHORT = {
    **CONFIGS["llama-3.2-1b"],
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
}
WIDE = {**SHORT, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("channels", "panels", "less"),
    [(5, 9, True), (9, 5, False), (0, 0, True), (None, 9, False), (9, None, True)],
)
def test_the_order_that_reads_less_is_wanted(channels, panels, less):
    def fitted(*, by_channel):
        missed = channels if by_channel else panels
        if missed is None:
            raise BudgetError("memory: found 1 MB, wanted at least 2")
        return SimpleNamespace(plan=SimpleNamespace(missed=missed))

    assert channels_read_less(fitted) is less


@pytest.mark.parametrize(
    ("shape", "bits", "more", "by_channel"), [(SHORT, 2, 2, False), (WIDE, 8, 22, True)]
)
def test_load_takes_the_order_that_reads_less(shape, bits, more, by_channel, tmp_path, caplog):
    cache = tmp_path / "cache"
    packed = random_packed(
        shape, random_recipe(bits=bits, outer_bits=8), cache / "packed" / "model"
    )
    ops = op_list(packed.config)
    executor = Executor(ops, packed, context=128, n_threads=2)
    tokens = [7 * i % 1024 for i in range(128)]
    ones = calibration.importances(packed, ops)
    calibration.save(packed, calibration.calibrate(executor, ops, ones, tokens))
    del executor
    options = {"cache_dir": cache, "context": 128, "threads": 2, "sparsity": 0.7}
    with elute.load(packed.path, **options) as free:
        want = free.generate([1, 2, 3], max_tokens=6, temperature=0, ignore_end=True).tokens
    with pytest.raises(BudgetError, match="wanted at least") as refused:
        elute.load(packed.path, memory="1M", **options)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    caplog.clear()
    caplog.set_level(NOTE, "elute")
    with elute.load(packed.path, memory=f"{least + more}M", **options) as model:
        assert bool(model.flash.packed.banks) is by_channel
        got = model.generate([1, 2, 3], max_tokens=6, temperature=0, ignore_end=True).tokens
    assert got == want
    told = [record.getMessage() for record in caplog.records]
    assert any("by channel its short rows" in line for line in told) is not by_channel
