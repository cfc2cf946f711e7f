"""Whole models by Qualcomm's HTP, emulated, beside sim. Skips without onnxruntime-qnn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_folder import save_tiny_folder

from elute.errors import DeviceError
from elute.npu import ort
from elute.npu.assemble import static_linears
from elute.npu.choices import choose
from elute.npu.prompts import PromptExecutor
from elute.npu.sim import Keep, Sim
from elute.runtime.calibration import fingerprint, own_text
from elute.runtime.executor import Executor
from elute.runtime.npu import DEFAULT_PRUNING, measured_for_npu
from elute.runtime.store import open_packed

pytest.importorskip("onnxruntime", reason="pip install 'elute[npu]'")
pytest.importorskip("onnx", reason="pip install 'elute[npu]'")
pytest.importorskip("onnxruntime_qnn", reason="pip install 'elute[npu]'")

SEEDS = (1, 2, 3)


class Shaken:
    """A device whose int8 outputs are each a random step off: -1, 0 or 1."""

    def __init__(self, device, seed):
        self._device, self._random = device, np.random.default_rng(seed)
        self.profile = device.profile

    def load(self, graphs, *, progress=None):
        self._device.load(graphs)

    def run(self, graph, x):
        off = (y + self._random.integers(-1, 2, y.shape) for y in self._device.run(graph, x))
        return [np.clip(y, -128, 127).astype(np.int8) for y in off]

    def close(self):
        self._device.close()


def compare(model: Path, home: Path, traces: Path, *, rows: int) -> dict[str, float]:
    """Logits of a prompt of `rows` tokens in one chunk. -> root mean square and largest difference
    to sim's, and divergence from it, of the emulator's and of the least or most shaken sim's."""
    from elute.api import text_tokens
    from elute.formats.tokenizer import Tokenizer
    from elute.model.families import op_list
    from elute.runtime.flash_codes import codes_of

    try:
        device = ort.Ort("qnn", traces=traces)
    except DeviceError as error:
        pytest.skip(str(error))
    packed = open_packed(str(model), cache_dir=home)
    ops = op_list(packed.config)
    executor = Executor(ops, packed, context=min(256, ops.context))
    tokens, _ = text_tokens(Tokenizer.from_files(packed.tokenizer_files()), own_text())
    statistics = measured_for_npu(packed, executor, lambda: tokens)
    choices = choose({name: of.effects for name, of in statistics.items()}, DEFAULT_PRUNING)
    prompt = np.asarray(tokens[700 : 700 + rows], np.int32)

    def logits(of):
        linears = static_linears(
            executor.sites,
            codes_of(packed, packed, None, isa=executor.isa),
            statistics,
            choices,
            of.profile,
            chunk=rows,
            identity=fingerprint(packed),
            isa=executor.isa,
        )
        of.load([linear.graph for linear in linears])
        found = PromptExecutor(executor, linears, of, chunk=rows).prompt(prompt, 0, all_logits=True)
        of.close()
        return found.astype(np.float64)

    sim = logits(Sim("htp", keep=Keep.NOTHING))
    emulated = logits(device) - sim
    shaken = [logits(Shaken(Sim("htp", keep=Keep.NOTHING), seed)) - sim for seed in SEEDS]
    ran = ort.nodes_by_provider(traces)
    assert set(ran) == {ort.PROVIDER_NAMES["qnn"]}
    assert ran.total() >= len(executor.sites)  # and those of the self test

    def rms(off):
        return float(np.sqrt(np.square(off).mean()))

    def divergence(off):
        """Nats a token."""
        p, q = log_softmax(sim), log_softmax(sim + off)
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())

    return {
        "logits": rms(sim - sim.mean(axis=1, keepdims=True)),
        "rms": rms(emulated),
        "least shaken rms": min(map(rms, shaken)),
        "largest": float(np.abs(emulated).max()),
        "most shaken largest": max(float(np.abs(off).max()) for off in shaken),
        "divergence": divergence(emulated),
        "least shaken divergence": min(map(divergence, shaken)),
        "same best": float((sim.argmax(axis=1) == (sim + emulated).argmax(axis=1)).mean()),
        "nodes": ran.total(),
    }


def log_softmax(logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_a_small_model_by_the_htp_is_within_a_step_of_sim(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "tiny")
    found = compare(folder, tmp_path / "home", tmp_path / "traces", rows=32)
    check(found)


@pytest.mark.slow
def test_the_default_model_by_the_htp_is_within_a_step_of_sim(
    default_gguf: Path, tmp_path: Path
) -> None:
    found = compare(default_gguf, tmp_path / "home", tmp_path / "traces", rows=128)
    print(found)
    check(found)


def check(found: dict[str, float]) -> None:
    """The emulator moves the logits, and less than a step of each int8 output may."""
    assert 0 < found["rms"] <= found["least shaken rms"], found
    assert found["largest"] <= found["most shaken largest"], found
    assert found["divergence"] <= found["least shaken divergence"], found
