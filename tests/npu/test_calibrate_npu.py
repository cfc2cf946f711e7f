"""What a calibration measures, against numpy on the values that pass through the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_executor import InMemory
from tiny_npu import CONTEXT, MIXTURES, Tiny, some_tokens, tiny

from elute.errors import ShapeError
from elute.npu import calibrate as module
from elute.npu.calibrate import MIN_TOKENS, MOST_WINDOWS, WINDOW, calibrate
from elute.npu.choices import CHOICES, PLAIN, SHADOWED, choose
from elute.runtime.executor import Executor


def inputs_and_outputs(model: Tiny, tokens: np.ndarray) -> dict[str, tuple[np.ndarray, list]]:
    host = model.executor()
    found = {}
    with host.cut(host.sites) as segments:
        for i, site in enumerate(host.sites):
            segments.run(i, tokens, 0, whole=True)
            x = segments.register(site.input)[: tokens.size].copy()
            found[site.name] = x, [segments.register(o)[: tokens.size].copy() for o in site.outputs]
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmoe"])
def test_ranges_and_outliers_are_those_of_the_values(family: str) -> None:
    model = tiny(family, family not in MIXTURES)
    tokens = some_tokens(300, model.ops.vocabulary)
    told = []
    statistics = calibrate(
        model.executor(),
        model.floats.__getitem__,
        tokens.tolist(),
        progress=lambda *each: told.append(each),
    )
    assert {stage for stage, _, _ in told} == {"npu: ranges", "npu: outliers", "npu: effects"}
    assert all(done < total for _, done, total in told)
    values = inputs_and_outputs(model, tokens[:WINDOW])  # a second window would not be whole
    assert list(statistics) == list(values)
    for site in model.executor().sites:
        found, (x, ys) = statistics[site.name], values[site.name]
        assert found.tokens == WINDOW
        assert np.array_equal(found.input.channels, np.abs(x).max(axis=0))
        assert found.input.histogram.sum() == x.size
        for name, y, output, peaks in zip(
            site.weights, ys, found.outputs, found.peaks, strict=True
        ):
            assert np.array_equal(output.channels, np.abs(y).max(axis=0))
            assert np.array_equal(peaks, np.abs(model.floats[name]).max(axis=1))
        for choice, counts in found.outliers.items():
            beyond = np.abs(x) > np.float32(choice.bound(found.input))
            assert np.array_equal(counts, beyond.sum(axis=0)), choice
            assert 0 < beyond.mean() <= 1 - choice.share + 1 / x.size
        assert set(found.outliers) == set(SHADOWED)
        assert set(found.effects) == set(CHOICES)
        assert all(np.isfinite(e) and e >= 0 for e in found.effects.values())
        assert all(s > 0 for s in found.output_scales)


def test_a_calibration_repeats_bit_for_bit() -> None:
    model = tiny("llama", True)
    tokens = some_tokens(300, model.ops.vocabulary).tolist()
    host = model.executor(n_threads=2)
    host.forward(np.arange(50, dtype=np.int32), 0)
    for _ in range(2):
        again = calibrate(host, model.floats.__getitem__, tokens)
        for name, want in model.statistics.items():
            assert again[name].effects == want.effects
            assert np.array_equal(again[name].input.histogram, want.input.histogram)
    # and the host is as new
    fresh = model.executor().forward(np.arange(9, dtype=np.int32), 0)
    assert np.array_equal(host.forward(np.arange(9, dtype=np.int32), 0), fresh)
    with pytest.raises(ShapeError, match="position 300"):
        host.forward(np.arange(9, dtype=np.int32), 300)


def test_windows_are_as_many_as_the_text_has() -> None:
    for n, context, sizes in [
        (MIN_TOKENS, CONTEXT, [MIN_TOKENS]),
        (WINDOW - 1, CONTEXT, [WINDOW - 1]),
        (WINDOW, CONTEXT, [WINDOW]),
        (2 * WINDOW - 1, CONTEXT, [WINDOW]),
        (2 * WINDOW, CONTEXT, [WINDOW] * 2),
        (1000, MIN_TOKENS, [MIN_TOKENS] * 7),
        (WINDOW * 40, CONTEXT, [WINDOW] * MOST_WINDOWS),
    ]:
        windows = module._windows(range(n), context)
        assert [w.size for w in windows] == sizes
        assert np.array_equal(np.concatenate(windows), np.arange(sum(sizes)))


@pytest.mark.parametrize("n", [0, 1, MIN_TOKENS - 1])
def test_a_short_text_or_context_is_a_sentence(n: int) -> None:
    model = tiny("llama")
    host = model.executor()
    with pytest.raises(ShapeError) as refused:
        calibrate(host, model.floats.__getitem__, list(range(n)))
    told = f": found {n} tokens, wanted {MIN_TOKENS} or more to measure what --npu needs; use a"
    assert str(refused.value) == f"text{told} longer text"
    if n:
        short = model.executor(context=n)
        with pytest.raises(ShapeError) as refused:
            calibrate(short, model.floats.__getitem__, list(range(200)))
        assert str(refused.value) == f"context{told} longer context"
        short.forward(np.zeros(1, np.int32), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["q_proj", "down_proj", "lm_head", "embed_tokens", "norm"])
def test_a_model_that_is_not_finite_is_a_sentence(part: str, bad: float) -> None:
    model = tiny("llama")
    source = InMemory({}, dict(model.source._vectors))
    source._packed = dict(model.source._packed)
    if part == "norm":
        name = "model.layers.1.input_layernorm.weight"
        values = source.vector(name).copy()
        values[5] = bad
        source._vectors[name] = values
    else:
        name = next(n for n in reversed(model.ops.matrices()) if part in n)
        packed = source.matrix(name)
        scales = packed.scales.copy()
        scales[...] = bad
        source._packed[name] = replace(packed, scales=scales)
    executor = Executor(model.ops, source, n_threads=1)
    tokens = some_tokens(200, model.ops.vocabulary)
    with pytest.raises(ShapeError, match="calibrate: found a value that is not finite at"):
        calibrate(executor, model.floats.__getitem__, tokens.tolist())
    assert executor.forward(tokens[:3], 0).shape[0] == 1  # and it is free again


def test_interrupted_calibrations_leave_the_host_free() -> None:
    model = tiny("llama")
    host = model.executor()
    tokens = some_tokens(300, model.ops.vocabulary)
    for stage in ("npu: ranges", "npu: outliers", "npu: effects"):

        def stop(at: str, done: int, total: int, stage: str = stage) -> None:
            if at == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(host, model.floats.__getitem__, tokens.tolist(), progress=stop)
        want = model.executor().forward(tokens[:20], 0)
        assert np.array_equal(host.forward(tokens[:20], 0), want)


def test_a_site_that_clips_does_more_harm_than_its_shadow() -> None:
    """An input with one channel far beyond the others: rounded with one scale it is lost."""
    model = tiny("llama")
    source = InMemory({}, dict(model.source._vectors))
    source._packed = model.source._packed
    name = "model.layers.1.input_layernorm.weight"
    values = source.vector(name).copy()
    values[7] *= 300
    source._vectors[name] = values
    executor = Executor(model.ops, source, n_threads=1)
    tokens = some_tokens(300, model.ops.vocabulary)
    statistics = calibrate(executor, model.floats.__getitem__, tokens.tolist())
    site = next(s.name for s in executor.sites if "layers.1.self_attn.q" in s.name)
    found = statistics[site]
    assert int(np.argmax(found.outliers[SHADOWED[0]])) == 7
    assert min(found.effects[c] for c in SHADOWED) < min(found.effects[c] for c in PLAIN)
    effects = {n: s.effects for n, s in statistics.items()}
    assert choose(effects, 0.5)[site].shadow
