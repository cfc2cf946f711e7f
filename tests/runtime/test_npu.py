"""Models that elute.load puts on a device, from files to tokens: what works, and what is told."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from tiny_folder import save_tiny_folder

import elute
from elute.cli.application import application
from elute.errors import DeviceError, EluteError, FormatError, ShapeError, UnsupportedError
from elute.npu import find, saved
from elute.npu.prompts import PromptExecutor
from elute.npu.sim import Sim
from elute.runtime import npu
from elute.runtime.executor import Executor

PROMPT = "the cat and the dog sat on the mat while the rain in the hills "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("npu") / "model")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load(folder: Path, cache: Path):
    def load(**options: Any) -> elute.Model:
        return elute.load(folder, **{"cache_dir": cache, "threads": 1, **options})

    return load


def tokens_of(model: elute.Model, n: int = 10) -> tuple[int, ...]:
    with model:
        return model.generate(PROMPT, max_tokens=n, temperature=0, ignore_end=True).tokens


def calibration(cache: Path) -> Path:
    (found,) = (p for p in (cache / "packed").iterdir() if not p.name.endswith("-channels"))
    return found / saved.FILE


def measured(cache: Path) -> str:
    """The checksum of the calibration; a file's metadata are in any order."""
    with safe_open(calibration(cache), "numpy") as file:
        return str(file.metadata()["sha256"])


@pytest.fixture(scope="module")
def answer(folder: Path, cache: Path) -> tuple[int, ...]:
    return tokens_of(elute.load(folder, cache_dir=cache, threads=1, npu="sim"))


def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "options",
    [
        {"npu": "require:sim"},
        {"npu": "sim", "npu_chunk": 1},
        {"npu": "sim", "npu_chunk": 7, "threads": 2},
        {"npu": "sim", "checked": True},
        {"npu": "sim", "memory": "2G"},
        {"npu": "sim", "memory": "2G", "checked": True},
        {"npu": "sim", "kernel": "lookup"},
    ],
    ids=str,
)
def test_options_that_change_no_bit_change_no_token(
    load, answer, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(**options)
    assert isinstance(model.executor, PromptExecutor)
    assert tokens_of(model) == answer
    assert "npu: measuring" not in told(caplog)


@pytest.mark.parametrize("options", [{"cache_type": "q8"}, {"npu_pruning": 0}, {"npu_pruning": 1}])
def test_options_that_change_answers_work(load, answer, options: dict[str, Any]) -> None:
    model = load(npu="sim", **options)
    assert isinstance(model.executor, PromptExecutor)
    assert len(tokens_of(model)) == 10


def test_the_device_answers_nearly_as_the_cpu_scores(load) -> None:
    with load() as cpu, load(npu="sim", npu_pruning=0) as device:
        want, got = (np.array(m.score(PROMPT).logprobs[1:], float) for m in (cpu, device))
        assert not np.array_equal(want, got)
        assert np.abs(want - got).mean() < 0.1, (want, got)
        figures = device.executor.figures()
        assert figures.tokens == len(got)
        assert 0 < figures.counts.clipped < 0.05 * figures.counts.inputs


def test_a_reused_prefix_and_a_chat_answer_as_from_scratch(load) -> None:
    with load(npu="sim") as model:
        model.generate(PROMPT + "on", max_tokens=3, temperature=0)
        reused = model.generate(PROMPT + "the", max_tokens=8, temperature=0)
        assert reused.figures.reused_tokens > 20
        stream = model.stream(PROMPT, max_tokens=8, temperature=0)
        next(stream)
        stream.close()
        assert model.chat("the cat", max_tokens=4, temperature=0).tokens
    with load(npu="sim") as fresh:
        assert fresh.generate(PROMPT + "the", max_tokens=8, temperature=0).tokens == reused.tokens


def test_a_closed_model_is_closed(load) -> None:
    model = load(npu="sim")
    model.close()
    model.close()
    with pytest.raises(DeviceError, match="the model is closed"):
        model.generate("the")


@pytest.mark.parametrize("name", ["x", "SIM", "", "require:", "require:x", "require:off"])
def test_unknown_names_are_refused(load, name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"--npu: found {name}, wanted one of auto, sim, "):
        load(npu=name)


@pytest.mark.parametrize("chunk", [0, -1, 257])
def test_chunks_out_of_bounds_are_refused(load, chunk: int) -> None:
    with pytest.raises(ShapeError, match=f"--npu-chunk: found {chunk}, wanted 1 to 256 tokens"):
        load(npu="sim", npu_chunk=chunk)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ShapeError, match=f"pruning: found {share}, wanted 0 to 1"):
        elute.load(folder, cache_dir=tmp_path, npu="sim", npu_pruning=share)
    assert "npu: measuring" not in told(caplog)
    assert not calibration(tmp_path).exists()


def missing(name: str) -> find.Found:
    return find.Found(name, False, False, f"{name} is not installed", "")


@pytest.fixture
def without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    finders = {name: lambda name=name: missing(name) for name in find._FINDERS}
    monkeypatch.setattr(find, "_FINDERS", finders)


def test_a_missing_device_leaves_prompts_to_the_cpu_or_fails(
    load, without_devices: None, caplog: pytest.LogCaptureFixture
) -> None:
    want = tokens_of(load())
    with caplog.at_level(logging.INFO):
        model = load(npu="qnn")
    assert isinstance(model.executor, Executor)
    assert tokens_of(model) == want
    assert "--npu qnn: qnn is not installed; prompts run on the CPU" in told(caplog)
    assert isinstance(load(npu="auto").executor, Executor)
    for name in ("qnn", "auto"):
        with pytest.raises(DeviceError, match=f"--npu require:{name}: .*; use --npu off"):
            load(npu=f"require:{name}")


class Broken(Sim):
    """Fails at `when`: "load", or the n-th run."""

    closed = False

    def __init__(self, when: str | int) -> None:
        super().__init__()
        self.when = when

    def load(self, graphs: Any, **options: Any) -> None:
        if self.when == "load":
            raise UnsupportedError("npu: found graphs, wanted none")
        super().load(graphs, **options)

    def run(self, graph: str, x: np.ndarray) -> Any:
        if isinstance(self.when, int):
            self.when -= 1
            if self.when <= 0:
                raise DeviceError("npu: the power went out")
        return super().run(graph, x)

    def close(self) -> None:
        self.closed = True
        super().close()


def with_device(monkeypatch: pytest.MonkeyPatch, device: Sim) -> None:
    found = find.Found("qnn", True, False, "an NPU", "1")
    monkeypatch.setattr(find, "_FINDERS", {"qnn": lambda: found})
    monkeypatch.setattr(find, "_opener", lambda *_: lambda *, lean=False: device)


def test_a_device_that_refuses_the_graphs_leaves_prompts_to_the_cpu_or_fails(
    load, answer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("qnn", "auto"):
        device = Broken("load")
        with_device(monkeypatch, device)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert isinstance(load(npu=name).executor, Executor)
        assert "npu: npu: found graphs, wanted none; prompts run on the CPU" in told(caplog)
        assert device.closed
    device = Broken("load")
    with_device(monkeypatch, device)
    with pytest.raises(UnsupportedError, match="found graphs, wanted none"):
        load(npu="require:qnn")
    assert device.closed


def test_a_device_that_fails_in_its_trial_leaves_prompts_to_the_cpu(
    load, answer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = Broken(5)
    with_device(monkeypatch, device)
    want = tokens_of(load())
    with caplog.at_level(logging.INFO):
        model = load(npu="auto")
    assert isinstance(model.executor, Executor)
    assert "the power went out; prompts run on the CPU" in told(caplog)
    assert device.closed
    assert tokens_of(model) == want


def test_a_slow_device_is_not_taken_by_itself(
    load, answer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = Broken(10**9)
    with_device(monkeypatch, device)
    monkeypatch.setattr(npu, "_is_faster", lambda *_: False)
    assert isinstance(load(npu="auto").executor, Executor)
    assert device.closed
    monkeypatch.setattr(npu, "_is_faster", lambda *_: True)
    with_device(monkeypatch, Broken(10**9))
    assert tokens_of(load(npu="auto")) == answer


def test_a_broken_calibration_is_a_sentence_and_made_again_when_removed(
    load, answer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = calibration(cache)
    content, before = path.read_bytes(), measured(cache)
    try:
        path.write_bytes(content[:1000])
        with pytest.raises(FormatError, match="wanted a calibration; remove it, and it is made"):
            load(npu="sim")
        path.unlink()
        with caplog.at_level(logging.INFO):
            assert tokens_of(load(npu="sim")) == answer
        assert "npu: measuring the model on a text of elute's own, once" in told(caplog)
        assert measured(cache) == before
    finally:
        path.write_bytes(content)


def test_a_calibration_of_another_model_is_made_anew(
    cache: Path, answer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_tiny_folder(tmp_path / "model", seed=5)
    elute.load(other, cache_dir=tmp_path).close()
    path = calibration(tmp_path)
    shutil.copy(calibration(cache), path)
    with caplog.at_level(logging.INFO):
        first = tokens_of(elute.load(other, cache_dir=tmp_path, npu="sim"))
    assert f"{path}: was made for another model or version; made anew" in told(caplog)
    assert "npu: measuring" in told(caplog)
    path.unlink()
    assert tokens_of(elute.load(other, cache_dir=tmp_path, npu="sim")) == first


def test_a_calibration_is_of_the_whole_model(
    folder: Path, cache: Path, answer, tmp_path: Path
) -> None:
    """Not of one that leaves out weights, and then the first start would decide for all."""
    with elute.load(folder, cache_dir=tmp_path, npu="sim", sparsity=0.5) as model:
        assert isinstance(model.executor, PromptExecutor)
        model.generate(PROMPT, max_tokens=3, temperature=0)
        score = model.score(PROMPT).total
    assert measured(tmp_path) == measured(cache)
    with elute.load(folder, cache_dir=cache, npu="sim") as model:
        assert model.score(PROMPT).total == score  # prompts take all weights


def test_a_short_context_is_a_sentence_or_takes_what_there_is(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((folder / "config.json").read_text())
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    with pytest.raises(ShapeError, match="context: found 100 tokens, wanted 128 or more to meas"):
        elute.load(model, cache_dir=tmp_path, npu="sim", context=100)
    with caplog.at_level(logging.INFO):
        tokens_of(elute.load(model, cache_dir=tmp_path, npu="sim", context=200))
    assert "npu: not kept, since a context of 200 is short" in told(caplog)
    assert not calibration(tmp_path).exists()
    tokens_of(elute.load(model, cache_dir=tmp_path, npu="sim", context=256))
    assert calibration(tmp_path).exists()
    tokens_of(elute.load(model, cache_dir=tmp_path, npu="sim", context=100))


def test_channel_order_and_a_budget_change_no_answer(load, answer) -> None:
    want = tokens_of(load(npu="sim", sparsity=0.3))
    model = load(npu="require:sim", sparsity=0.3, memory="2G")
    assert isinstance(model.executor, PromptExecutor)
    assert tokens_of(model) == want


def command(cache: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setenv("ELUTE_HOME", str(cache))
    return CliRunner().invoke(application, [str(each) for each in arguments])


def test_run_answers_by_the_device(
    folder: Path, cache: Path, answer, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = None
    for extra in ((), ("--memory", "2G"), ("--npu-chunk", "3"), ("--checked",)):
        done = command(
            cache, monkeypatch, "run", folder, "--npu", "sim", *extra, "--temperature", "0",
            "--max-tokens", "10", "--quiet", PROMPT,
        )  # fmt: skip
        assert done.exit_code == 0, (extra, done.output, done.exception)
        want = done.stdout if want is None else want
        assert done.stdout == want, extra


def test_run_reports_a_budget_beside_a_device(
    folder: Path, cache: Path, answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report asks the executor for its threads, which is the host's to say."""
    done = command(
        cache, monkeypatch, "run", folder, "--npu", "sim", "--memory", "2G", "--temperature", "0",
        "--max-tokens", "4", PROMPT,
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert "memory" in done.stderr


@pytest.mark.parametrize("extra", [(), ("--memory", "2G"), ("--sparsity", "0.3")], ids=str)
def test_eval_scores_by_the_device(
    folder: Path, cache: Path, answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(PROMPT * 12)
    perplexities = []
    for device in ("off", "sim"):
        done = command(
            cache, monkeypatch, "eval", folder, "--npu", device, *extra, "--json", "--quiet",
            "--context", "128", "--text", text,
        )  # fmt: skip
        assert done.exit_code == 0, (done.output, done.exception)
        perplexities.append(json.loads(done.stdout.splitlines()[-1])["perplexity"])
    cpu, device_s = perplexities
    assert device_s == pytest.approx(cpu, rel=0.3)
    assert device_s != cpu


@pytest.mark.parametrize(
    "bad",
    [("--npu", "x"), ("--npu", "sim", "--npu-chunk", "0"), ("--npu", "sim", "--npu-pruning", "2")],
    ids=str,
)
def test_bad_options_are_a_sentence(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, bad: tuple[str, ...]
) -> None:
    done = command(cache, monkeypatch, "run", folder, *bad, PROMPT)
    assert done.exit_code != 0
    assert isinstance(done.exception, EluteError | SystemExit)
