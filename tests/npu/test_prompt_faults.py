"""A device that fails in the middle of a prompt: one sentence, and all goes on afterwards."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from tiny_npu import Tiny, plain, prompts, some_tokens, tiny

from elute.errors import DeviceError, EluteError, UnsupportedError
from elute.npu.device import Graph, Outputs, Profile, Progress
from elute.npu.prompts import PromptExecutor
from elute.npu.sim import Sim
from elute.runtime.sampler import Sampler, Sampling
from elute.runtime.session import Session

FLOATS = Profile("floats", per_channel=True, outputs=Outputs.FLOAT)
Spoil = Callable[[list[np.ndarray]], Any]


class Faulty:
    """A device whose `at`-th run from now fails or gives something else."""

    def __init__(self, inner: Sim) -> None:
        self.inner = inner
        self.at: int | None = None
        self.spoil: Spoil = lambda results: results

    @property
    def profile(self) -> Profile:
        return self.inner.profile

    def load(self, graphs: Sequence[Graph], *, progress: Progress | None = None) -> None:
        self.inner.load(graphs, progress=progress)

    def run(self, graph: str, x: np.ndarray) -> Any:
        results = self.inner.run(graph, x)
        if self.at is None:
            return results
        self.at -= 1
        return self.spoil(results) if self.at == 0 else results

    def close(self) -> None:
        self.inner.close()


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("elute-")]


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny("gemma3_text")


def fails(error: BaseException) -> Spoil:
    def spoil(results: list[np.ndarray]) -> Any:
        raise error

    return spoil


def value(bad: float) -> Spoil:
    def spoil(results: list[np.ndarray]) -> list[np.ndarray]:
        results[-1][0, 3] = bad
        return results

    return spoil


def still_works(made: PromptExecutor, model: Tiny, position: int = 0) -> None:
    """As one that never failed; what was cached before `position` is still there."""
    tokens = some_tokens(90, model.ops.vocabulary)
    fresh = plain(model, device=Sim(made._device.profile))
    if position:
        fresh.prompt(tokens[:position], 0)
        for each in (made, fresh):
            each.forward(tokens[position : position + 1], position)
    host = model.executor()
    assert np.array_equal(made.forward(tokens[:9], 0), host.forward(tokens[:9], 0))
    want = fresh.prompt(tokens, 0)
    assert np.array_equal(made.prompt(tokens, 0), want)
    assert np.array_equal(made.forward(tokens[:1], 90), fresh.forward(tokens[:1], 90))


DEVICE = [
    (fails(DeviceError("npu: the power went out")), "the power went out"),
    (lambda r: r[:-1], r"found \d outputs, wanted"),
    (lambda r: [], "found 0 outputs, wanted"),
    (lambda r: [y[:-1] for y in r], "found an output"),
    (lambda r: [y[:, :-1] for y in r], "found an output"),
    (lambda r: [y.T for y in r], "found an output"),
    (lambda r: [y.astype(np.float64) for y in r], "found an output float64"),
    (lambda r: [y.astype(np.int16) for y in r], "found an output int16"),
    (lambda r: [y[None] for y in r], "found an output"),
]


@pytest.mark.parametrize(("profile", "at"), [("sim", 1), ("htp", 20), ("floats", 20)])
@pytest.mark.parametrize(("spoil", "says"), DEVICE)
def test_what_a_device_does_wrong_is_a_sentence(
    spoil: Spoil, says: str, profile: str, at: int, model: Tiny
) -> None:
    device = Faulty(Sim(FLOATS if profile == "floats" else profile))
    made = prompts(model, device=device)
    tokens = some_tokens(90, model.ops.vocabulary)
    made.prompt(tokens[:40], 0)
    device.at, device.spoil = at, spoil
    with pytest.raises(DeviceError, match=says) as refused:
        made.prompt(tokens[40:], 40)
    assert "\n" not in str(refused.value)
    device.at = None
    still_works(made, model, 40)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_a_sentence(bad: float, model: Tiny) -> None:
    device = Faulty(Sim(FLOATS))
    made = prompts(model, device=device)
    device.at, device.spoil = 7, value(bad)
    tokens = some_tokens(90, model.ops.vocabulary)
    with pytest.raises(DeviceError, match="found values that are not finite"):
        made.prompt(tokens, 0)
    device.at = None
    still_works(made, model)


def test_strided_outputs_are_taken_as_they_are(model: Tiny) -> None:
    device = Faulty(Sim())
    made = prompts(model, device=device)
    tokens = some_tokens(20, model.ops.vocabulary)
    want = made.prompt(tokens, 0)
    device.at, device.spoil = 1, lambda r: [np.asfortranarray(y) for y in r]
    assert np.array_equal(made.prompt(tokens, 0), want)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("all gone"), OSError(5, "io")])
def test_any_exception_ends_the_prompt_alone(error: BaseException, model: Tiny) -> None:
    device = Faulty(Sim())
    made = prompts(model, device=device)
    device.at, device.spoil = 11, fails(error)
    with pytest.raises(type(error)):
        made.prompt(some_tokens(90, model.ops.vocabulary), 0)
    device.at = None
    still_works(made, model)


def test_a_slow_device_changes_no_bit(model: Tiny) -> None:
    class Slow(Sim):
        def run(self, graph: str, x: np.ndarray) -> Any:
            time.sleep(0.002)
            return super().run(graph, x)

    made = prompts(model, device=Slow())
    still_works(made, model)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """The default handler also where SIGINT is ignored, as in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_prompt_and_the_next_one_is_right(model: Tiny) -> None:
    class Hanging(Sim):
        def run(self, graph: str, x: np.ndarray) -> Any:
            if self.interrupts:
                self.interrupts = False
                _thread.interrupt_main()
                time.sleep(0.05)
            return super().run(graph, x)

        interrupts = False

    device = Hanging()
    made = prompts(model, device=device)
    tokens = some_tokens(90, model.ops.vocabulary)
    for position in (0, 40):
        made.prompt(tokens[:40], 0)
        device.interrupts = True
        with pytest.raises(KeyboardInterrupt):
            made.prompt(tokens[position:], position)
        assert not device.interrupts
        still_works(made, model, position)


def test_a_prompt_beside_another_is_refused_or_right(model: Tiny) -> None:
    made = prompts(model)
    tokens = some_tokens(64, model.ops.vocabulary)
    want, dense = made.prompt(tokens, 0), model.executor().forward(tokens, 0)
    start, outcomes = threading.Barrier(3), []

    def work(run: Callable[..., np.ndarray], right: np.ndarray) -> None:
        start.wait()
        for _ in range(6):
            try:
                outcomes.append(np.array_equal(run(tokens, 0), right))
            except UnsupportedError as error:
                outcomes.append("another thread's forward" in str(error))
            except BaseException as error:
                outcomes.append(error)

    runs = [(made.prompt, want), (made.prompt, want), (made.forward, dense)]
    threads = [threading.Thread(target=work, args=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 18
    still_works(made, model)


def test_two_models_answer_side_by_side(model: Tiny) -> None:
    tokens = some_tokens(64, model.ops.vocabulary)
    want = plain(model).prompt(tokens, 0)
    both = [prompts(model, chunk=10), prompts(model, chunk=16, n_threads=2)]
    outcomes = []

    def work(made: PromptExecutor) -> None:
        outcomes.extend(np.array_equal(made.prompt(tokens, 0), want) for _ in range(4))

    threads = [threading.Thread(target=work, args=(made,)) for made in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 8


def test_a_device_takes_one_model(model: Tiny) -> None:
    device = Sim()
    made = prompts(model, device=device)
    with pytest.raises(UnsupportedError, match="found it twice, wanted one graph of a name"):
        prompts(model, device=device)
    still_works(made, model)


def test_a_closed_device_is_a_sentence(model: Tiny) -> None:
    device = Sim()
    made = prompts(model, device=device)
    device.close()
    with pytest.raises(DeviceError, match=r"found no graph .* among the 0 loaded"):
        made.prompt(some_tokens(5, model.ops.vocabulary), 0)
    assert made.forward(some_tokens(5, model.ops.vocabulary), 0).shape[0] == 1


def greedy(session: Session, prompt: Sequence[int], n: int, **options: Any) -> list[int]:
    sampler = Sampler(
        Sampling(temperature=0), vocabulary=session.executor.vocabulary, prompt=prompt
    )
    return [c.token for c in session.generate(prompt, sampler, max_tokens=n, **options)]


def test_a_session_answers_the_same_however_its_prompt_was_cut(model: Tiny) -> None:
    prompt = some_tokens(90, model.ops.vocabulary).tolist()
    want = greedy(Session(plain(model)), prompt, 20)
    session = Session(prompts(model, chunk=5, in_flight=2))  # handed 20 tokens at a time
    assert greedy(session, prompt, 20) == want
    session.reset()
    assert greedy(session, prompt, 20) == want


def test_a_session_uses_a_shared_prefix_again(model: Tiny) -> None:
    vocabulary = model.ops.vocabulary
    shared = some_tokens(50, vocabulary).tolist()
    session = Session(prompts(model, chunk=16))
    for seed in (1, 2):
        prompt = shared + some_tokens(23, vocabulary, seed).tolist()
        assert session.reusable(prompt) == (0 if seed == 1 else 50)
        got = greedy(session, prompt, 8)
        assert got == greedy(Session(plain(model)), prompt, 8)
    # A next turn: what was decoded is reused as it is, the CPU's and not the device's.
    turn = [*prompt, *got[:-1]]
    assert session.reusable([*turn, 5]) == len(turn)


def test_a_session_scores_as_in_one_chunk(model: Tiny) -> None:
    tokens = some_tokens(120, model.ops.vocabulary).tolist()
    want = Session(plain(model)).score(tokens)
    assert np.array_equal(Session(prompts(model, chunk=11)).score(tokens), want)
    session = Session(prompts(model, chunk=11, in_flight=1))
    rows = [logits for _, logits in session.logits(tokens, 40)]
    assert sum(map(len, rows)) == 79


def test_a_session_goes_on_after_a_fault(model: Tiny) -> None:
    device = Faulty(Sim())
    session = Session(prompts(model, device=device, chunk=8, in_flight=1))
    prompt = some_tokens(90, model.ops.vocabulary).tolist()
    want = greedy(Session(plain(model)), prompt, 8)
    for at, spoil in ((70, fails(DeviceError("off"))), (100, fails(KeyboardInterrupt()))):
        session.reset()
        device.at, device.spoil = at, spoil
        with pytest.raises((DeviceError, KeyboardInterrupt)):
            greedy(session, prompt, 8)
        device.at = None
        done = len(session.history)
        assert 0 < done < 90  # whole parts of the prompt, which are not computed again
        assert session.reusable(prompt) == done
        assert greedy(session, prompt, 8) == want


def test_a_cancelled_prompt_keeps_what_it_has(model: Tiny) -> None:
    session = Session(prompts(model, chunk=8, in_flight=1))
    prompt = some_tokens(90, model.ops.vocabulary).tolist()
    asked = iter([False, False, True])
    assert greedy(session, prompt, 8, cancelled=lambda: next(asked)) == []
    assert len(session.history) == 32
    assert greedy(session, prompt, 8) == greedy(Session(plain(model)), prompt, 8)


def test_errors_of_the_model_are_sentences_of_the_linear(model: Tiny) -> None:
    """An input beyond all steps: of a bound that is far too small."""
    made = prompts(model)
    made.linears[3]._scale = np.float32(1e-12)
    with pytest.raises(EluteError, match=f"{made.linears[3].name}: x") as refused:
        made.prompt(some_tokens(40, model.ops.vocabulary), 0)
    assert "run without --npu" in str(refused.value)
