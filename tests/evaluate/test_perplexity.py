import math

import numpy as np
import pytest
from fakes import VOCABULARY, FakeExecutor

from elute.errors import BudgetError, ShapeError
from elute.evaluate.kl import divergence, kl_rows
from elute.evaluate.perplexity import perplexity, text_windows

TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, VOCABULARY, 100)]


def by_definition(windows):
    """Loss by loss: of a window of n tokens, those at n/2 + 1 .. n - 1."""
    losses = []
    for window in windows:
        logits = FakeExecutor().forward(np.array(window, np.int32), 0, all_logits=True)
        for at in range(len(window) // 2, len(window) - 1):
            row = logits[at].astype(np.float64)
            losses.append(np.log(np.exp(row).sum()) - row[window[at + 1]])
    return np.array(losses)


def test_windows_are_whole_and_the_rest_is_dropped():
    windows = text_windows(TOKENS, context=32)
    assert [len(window) for window in windows] == [32, 32, 32]
    assert [t for window in windows for t in window] == TOKENS[:96]
    assert text_windows(TOKENS, context=32, n_windows=2) == windows[:2]


def test_every_window_begins_with_the_bos_token_of_the_tokenizer():
    windows = text_windows(TOKENS, context=32, bos=7)
    assert [window[0] for window in windows] == [7, 7, 7]
    assert windows[1][1:] == TOKENS[33:64]


@pytest.mark.parametrize("context", [32, 33])
def test_perplexity_scores_the_second_half_of_each_window_alone(context):
    windows = text_windows(TOKENS, context=context)
    losses = by_definition(windows)
    result = perplexity(FakeExecutor(), windows)
    assert result.n_scored == losses.size == len(windows) * (context - 1 - context // 2)
    assert result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    error = losses.std() / math.sqrt(losses.size - 1) * result.perplexity
    assert result.standard_error == pytest.approx(error, rel=1e-4)


def test_a_window_of_512_has_255_scored_tokens():
    tokens = TOKENS * 6
    result = perplexity(FakeExecutor(context=512), text_windows(tokens, context=512))
    assert (result.n_windows, result.n_scored) == (1, 255)


def test_progress_counts_windows():
    seen = []
    windows = text_windows(TOKENS, context=32)
    perplexity(FakeExecutor(), windows, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_text_that_is_too_short_is_refused_with_the_numbers():
    with pytest.raises(ShapeError, match=r"100 tokens make 3 windows of 32, wanted 4"):
        text_windows(TOKENS, context=32, n_windows=4)
    with pytest.raises(ShapeError, match=r"100 tokens make 0 windows of 512, wanted 1"):
        text_windows(TOKENS, context=512)
    with pytest.raises(ShapeError, match="context: found 3"):
        text_windows(TOKENS, context=3)


def test_a_window_beyond_the_model_is_refused():
    with pytest.raises(BudgetError, match="found 32 tokens, but the model's context is 16"):
        perplexity(FakeExecutor(context=16), text_windows(TOKENS, context=32))


def test_divergence_from_itself_is_zero():
    windows = text_windows(TOKENS, context=32)
    result = divergence(FakeExecutor(), FakeExecutor(), windows)
    assert (result.mean, result.maximum, result.same_top) == (0, 0, 1)
    assert result.n_scored == 45


def test_divergence_of_known_distributions():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    found = kl_rows(np.log(p).astype(np.float32), np.log(q).astype(np.float32))
    assert found == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2)], rel=1e-6)


def test_divergence_sees_another_model():
    class Blurred(FakeExecutor):
        def forward(self, tokens, position, *, all_logits=False):
            return super().forward(tokens, position, all_logits=all_logits) * np.float32(0.5)

    result = divergence(FakeExecutor(), Blurred(), text_windows(TOKENS, context=32))
    assert 0 < result.median <= result.percentile_99 <= result.maximum
    assert result.same_top == 1


def test_divergence_tells_the_perplexity_of_the_model_without_another_forward():
    windows = text_windows(TOKENS, context=32)
    executor = FakeExecutor()
    result = divergence(FakeExecutor(), executor, windows)
    assert result.perplexity == perplexity(FakeExecutor(), windows)
    assert sum(n for _, n in executor.calls) == len(windows) * 31


def test_divergence_needs_one_vocabulary():
    with pytest.raises(ShapeError, match="found 300 and 257"):
        divergence(FakeExecutor(), FakeExecutor(vocabulary=300), [])
