"""Contextual sparsity in the executor, and the measurement that it needs."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_executor import made, relative_error, some_tokens  # noqa: F401
from tiny_folder import save_tiny_folder

import elute
from elute.errors import FormatError, ShapeError
from elute.flash.sparsity import Threshold, thresholds
from elute.kernels.lut_matmul import reference as lut_matmul
from elute.model.families import op_list
from elute.model.ops import Linear
from elute.model.reference import ReferenceExecutor
from elute.prepare import calibrate
from elute.runtime import calibration
from elute.runtime.executor import CHUNK, Executor, isas
from elute.runtime.store import open_packed


def some_thresholds(ops, source, *, value=0.6):
    """Importances of the weights as floats: norms of the columns."""
    found = {}
    for op in ops.ops:
        if isinstance(op, Linear):
            rng = np.random.default_rng(len(found))
            importance = rng.uniform(0.5, 2, ops.registers[op.input]).astype(np.float32)
            found[op.weights[0]] = Threshold(importance, value)
    return found


def masked_reference(model, tokens, chosen):
    ops, source, floats = model
    inputs = {
        name: op.weights[0] for op in ops.ops if isinstance(op, Linear) for name in op.weights
    }

    def linear(x, name):
        threshold = chosen.get(inputs.get(name, ""))
        if threshold is not None:
            x = np.where(np.abs(x) * threshold.importance < threshold.value, np.float32(0), x)
        return lut_matmul.lut_matmul(x, source.matrix(name))

    executor = ReferenceExecutor(ops, floats, linear=linear, cache_type="f16")
    return executor.forward(tokens, 0, all_logits=True)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("family", ["llama", "bitnet", "gemma3_text"])
@pytest.mark.parametrize("columns", [False, True])
def test_a_sparse_forward_is_that_of_masked_inputs(isa, family, columns, made):  # noqa: F811
    model = made(family, columns=columns)
    ops, source, _ = model
    chosen = some_thresholds(ops, source)
    tokens = some_tokens(24, ops.vocabulary)
    executor = Executor(ops, source, isa=isa)
    dense = executor.forward(tokens, 0, all_logits=True)
    executor.sparsify(chosen)
    sparse = executor.forward(tokens, 0, all_logits=True)
    assert not np.array_equal(sparse, dense)
    # A score that lies on its threshold but for rounding turns a whole channel on or off, which all
    # tokens after it see; until the first such one, the two agree.
    error = relative_error(sparse, masked_reference(model, tokens, chosen))
    assert error[:3].max() < 1e-3, error
    assert error.max() < 0.1, error
    executor.sparsify({})
    assert np.array_equal(executor.forward(tokens, 0, all_logits=True), dense)


@pytest.mark.parametrize("isa", isas())
def test_cuts_and_threads_do_not_change_a_bit_of_a_sparse_forward(isa, made):  # noqa: F811
    ops, source, _ = made("llama", max_position_embeddings=400)
    tokens = some_tokens(CHUNK + 40, ops.vocabulary)

    def sparse(n_threads):
        executor = Executor(ops, source, isa=isa, n_threads=n_threads)
        executor.sparsify(some_thresholds(ops, source))
        return executor

    whole = sparse(1).forward(tokens, 0, all_logits=True)
    for n_threads, cuts in ((1, [1, 2, 70]), (2, [64, 65, 66]), (3, [3, 255, 256, 257])):
        executor, at = sparse(n_threads), 0
        for cut in [*cuts, tokens.size]:
            part = executor.forward(tokens[at:cut], at, all_logits=True)
            assert np.array_equal(part, whole[at:cut]), (n_threads, at, cut)
            at = cut


def test_a_histogram_counts_every_score_once(made):  # noqa: F811
    ops, source, _ = made("llama")
    chosen = some_thresholds(ops, source, value=0.0)
    tokens = some_tokens(24, ops.vocabulary)
    counted = []
    for n_threads in (1, 2):
        executor = Executor(ops, source, n_threads=n_threads)
        executor.sparsify(chosen)
        with executor.observed():
            executor.forward(tokens[:20], 0)
            for i in range(20, 24):
                executor.forward(tokens[i : i + 1], i)
            histograms = {name: executor.histogram(name) for name in executor.inputs}
        counted.append(histograms)
    assert list(counted[0]) == list(counted[1]) == list(chosen)
    for name, found in counted[0].items():
        assert found.sum() == tokens.size * chosen[name].importance.size
        assert np.array_equal(found, counted[1][name])


def test_sparsify_forgets_what_was_computed_otherwise(made):  # noqa: F811
    ops, source, _ = made("llama")
    executor = Executor(ops, source)
    executor.forward(some_tokens(8, ops.vocabulary), 0)
    executor.sparsify({})
    with pytest.raises(ShapeError, match="found position 8, wanted 0 to the cached 0"):
        executor.forward(some_tokens(1, ops.vocabulary), 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("calibrated") / "tiny")


@pytest.fixture
def packed(folder, tmp_path):
    return open_packed(str(folder), cache_dir=tmp_path)


def test_importances_are_the_norms_of_the_columns(packed):
    from elute.pack.quads import unpack

    ops = op_list(packed.config)
    found = calibration.importances(packed, ops, weighted=True)
    for op in ops.ops:
        if isinstance(op, Linear):
            rows = np.concatenate([unpack(packed.matrix(n)).dequantize() for n in op.weights])
            want = np.sqrt(np.square(rows.astype(np.float64)).sum(axis=0))
            assert np.allclose(found[op.weights[0]], want, rtol=1e-5)


def test_the_first_use_calibrates_and_the_second_finds_it(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "elute")
    answers = []
    for _ in range(2):
        with elute.load(folder, sparsity=0.5, cache_dir=tmp_path) as model:
            assert model.sparsity == 0.5
            answers.append(model.generate("the cat", max_tokens=8, temperature=0).tokens)
            path = calibration.calibration_file(open_packed(str(folder), cache_dir=tmp_path))
            written = path.stat().st_mtime_ns if not answers[1:] else written  # noqa: F821
    assert answers[0] == answers[1]
    assert path.stat().st_mtime_ns == written
    assert sum("measuring the model" in record.message for record in caplog.records) == 1
    assert not list(path.parent.glob("*.partial-*"))


def test_what_was_saved_is_what_was_measured(packed):
    ops = op_list(packed.config)
    executor = Executor(ops, packed, context=128)
    tokens = some_tokens(300, ops.vocabulary).tolist()
    norms = calibration.importances(packed, ops)
    scores = calibration.calibrate(executor, ops, norms, tokens)
    assert calibration.saved(packed, op_list(packed.config)) is None
    calibration.save(packed, scores)
    found = calibration.saved(packed, op_list(packed.config))
    assert list(found) == list(scores)
    for name, entry in scores.items():
        assert np.array_equal(found[name].importance, entry.importance)
        assert np.array_equal(found[name].histogram, entry.histogram)
        assert (found[name].outputs, found[name].sensitivity) == (entry.outputs, entry.sensitivity)
    for sparsity in (0.2, 0.6):
        first, second = thresholds(scores, sparsity), thresholds(found, sparsity)
        assert {n: t.value for n, t in first.items()} == {n: t.value for n, t in second.items()}


def test_a_text_too_short_to_measure_is_refused(packed):
    ops = op_list(packed.config)
    executor = Executor(ops, packed)
    norms = calibration.importances(packed, ops)
    with pytest.raises(ShapeError, match="text: found 100 tokens, wanted 128 or more"):
        calibration.calibrate(executor, ops, norms, [1] * 100)


@pytest.mark.parametrize("spoil", ["cut", "shape", "nan"])
def test_a_broken_calibration_is_one_sentence(packed, spoil):
    ops = op_list(packed.config)
    executor = Executor(ops, packed, context=128)
    tokens = some_tokens(128, ops.vocabulary).tolist()
    scores = calibration.calibrate(executor, ops, calibration.importances(packed, ops), tokens)
    calibration.save(packed, scores)
    path = calibration.calibration_file(packed)
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        arrays = load_file(path)
        name = next(key for key in arrays if key.endswith(".importance"))
        arrays[name] = arrays[name][None] if spoil == "shape" else arrays[name] * np.nan
        header = path.read_bytes()
        size = int.from_bytes(header[:8], "little")
        save_file(arrays, path, json.loads(header[8 : 8 + size])["__metadata__"])
    with pytest.raises(FormatError, match=r"wanted a calibration; remove it"):
        calibration.saved(packed, op_list(packed.config))


def test_a_calibration_of_another_model_is_made_anew(packed, tmp_path, caplog):
    ops = op_list(packed.config)
    executor = Executor(ops, packed, context=128)
    tokens = some_tokens(128, ops.vocabulary).tolist()
    scores = calibration.calibrate(executor, ops, calibration.importances(packed, ops), tokens)
    calibration.save(packed, scores)
    packed = dataclasses.replace(packed, source="another")
    assert calibration.saved(packed, op_list(packed.config)) is None
    assert "made for another model or version" in caplog.text


def test_both_orders_of_a_model_share_a_calibration(folder, tmp_path):
    """So the answer within a budget is that of the resident path, whoever measured."""
    text = "the rain in the hills fell on the dog and the cat while the mat sat on " * 20
    path, _ = calibrate(folder, text=text, weighted=True, cache_dir=tmp_path)
    with elute.load(folder, sparsity=0.6, cache_dir=tmp_path, context=128) as model:
        resident = model.executor.forward(np.arange(20, dtype=np.int32), 0, all_logits=True)
    limited = elute.load(
        folder, sparsity=0.6, cache_dir=tmp_path, context=128, memory="2G", threads=1
    )
    with limited as model:
        assert model.path != path.parent
        within = model.executor.forward(np.arange(20, dtype=np.int32), 0, all_logits=True)
    assert np.array_equal(within, resident)
    assert [found.parent for found in tmp_path.rglob(calibration.FILE)] == [path.parent]


def test_a_score_that_is_no_number_is_counted_somewhere(made):  # noqa: F811
    ops, source, _ = made("llama")
    executor = Executor(ops, source)
    found = some_thresholds(ops, source)
    huge = {name: Threshold(t.importance * np.float32(1e38), 0.0) for name, t in found.items()}
    executor.sparsify(huge)
    with executor.observed():
        executor.forward(some_tokens(8, ops.vocabulary), 0)
        assert executor.histogram(executor.inputs[0]).sum() == 8 * 64


def test_thresholds_that_are_none_are_refused(made):  # noqa: F811
    ops, source, _ = made("llama")
    executor = Executor(ops, source)
    name = executor.inputs[0]
    good = some_thresholds(ops, source)[name]
    with pytest.raises(ShapeError, match=r"wanted one of Executor\.inputs"):
        executor.sparsify({"nothing": good})
    for value in (-1.0, np.nan, np.inf):
        with pytest.raises(ShapeError, match="wanted a number from 0"):
            executor.sparsify({name: Threshold(good.importance, value)})


def test_a_context_too_short_to_measure_in_is_refused(packed):
    ops = op_list(packed.config)
    executor = Executor(ops, packed, context=64)
    with pytest.raises(ShapeError, match="context: found 64 tokens, wanted 128 or more"):
        calibration.calibrate(executor, ops, calibration.importances(packed, ops), [1] * 300)
