"""Text in, text out: load a model, generate, stream, chat, score. Knows no command line."""

from __future__ import annotations

import dataclasses
import logging
import operator
import reprlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypedDict, TypeGuard, Unpack

from elute.errors import NOTE, DeviceError, FormatError, ShapeError, UnsupportedError
from elute.flash.sparsity import check_cache_aware, check_sparsity, thresholds
from elute.flash.weights import FlashWeights
from elute.formats.chat_prompt import chat_tokens
from elute.runtime.engine import Chunk, Completion, Engine, TextStream, join
from elute.runtime.sampler import Sampling
from elute.runtime.session import Executor

if TYPE_CHECKING:
    from elute.npu.prompts import PromptExecutor
    from elute.quantize.recipe import Recipe
    from elute.types import WeightSource

__all__ = ["Chunk", "Completion", "Model", "Sampling", "Score", "load"]

log = logging.getLogger(__name__)

LIMITED_LOGITS = 2 << 20  # of a step of `score` under a budget: what the process's growth covers

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, as chat templates take them


class SamplingOptions(TypedDict, total=False):
    """The fields of Sampling, as keywords of generate, stream and chat."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logit_bias: Mapping[int, float]
    logprobs: int | None


class Tokenizer(Protocol):
    """The part of formats.tokenizer.Tokenizer that a model needs."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> Sequence[int]: ...

    @property
    def special_texts(self) -> Collection[str]: ...

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def stream(self) -> TextStream: ...


class Template(Protocol):
    """formats.chat_template.ChatTemplate."""

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any
    ) -> str: ...


@dataclass(frozen=True)
class Score:
    """How probable a model finds a text.

    logprobs   natural log of p(token | those before it); None for the first, which nothing predicts
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        """Log probability of the whole text, given its first token."""
        return sum(entry for entry in self.logprobs if entry is not None)


class Model:
    """A loaded model with one KV cache, so one generation at a time: load it once for each.

    Made by `load`; a context manager that closes it. `path` is its packed directory,
    `bits_per_weight` counts what its matrices take there, scales and zeros included; `sparsity` is
    what `load` was given; `flash` holds the weights where memory was limited; `prompts` computes
    prompts where an NPU does.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        *,
        name: str,
        path: Path,
        template: Template | None = None,
        sampling: Sampling | None = None,
        bits_per_weight: float = 0.0,
        sparsity: float = 0.0,
        flash: FlashWeights | None = None,
        prompts: PromptExecutor | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.flash = flash
        self.prompts = prompts
        self.path = path
        self.sampling = Sampling() if sampling is None else sampling
        self.bits_per_weight = bits_per_weight
        self.sparsity = sparsity
        self._template = template
        self._tokenizer = tokenizer
        self._close = close
        self._engine: Engine | None = Engine(
            executor, text_stream=tokenizer.stream, end_tokens=frozenset(tokenizer.eos_ids)
        )

    @property
    def engine(self) -> Engine:
        """Raises DeviceError once the model is closed."""
        if self._engine is None:
            raise DeviceError(f"{self.name}: the model is closed; load it again")
        return self._engine

    @property
    def executor(self) -> Executor:
        return self.engine.session.executor

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.executor.context

    @property
    def can_chat(self) -> bool:
        """Whether the model brought a chat template."""
        return self._template is not None

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, no beginning-of-text token. special: "<|im_end|>" is one token."""
        return self._tokenizer.encode(text, add_special=False, parse_special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode(tokens, skip_special=False)

    def prompt(self, prompt: str | Sequence[int] | Sequence[Message]) -> list[int]:
        """The tokens that `generate` and `stream` compute: of a text as it is, with a
        beginning-of-text token where the model wants one; of messages, through the chat
        template, which alone writes special tokens: those that a message spells are text; tokens
        as they are.

        Raises UnsupportedError for messages when the model has no chat template, ShapeError for
        anything else.
        """
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, add_special=True, parse_special=True)
        if not _are_messages(prompt):
            return _token_ids(prompt)
        if self._template is None:
            raise UnsupportedError(
                f"{self.name}: found no chat template, wanted one for messages; pass the prompt as "
                "text, or on the command line use --raw"
            )
        # The template writes the beginning-of-text token itself.
        return chat_tokens(self._template.render, self._tokenizer, prompt)

    def text_tokens(self, text: str) -> tuple[list[int], int | None]:
        """A text to measure: its tokens, special tokens read as text, and the beginning-of-text
        token that the tokenizer put before them, if it did.
        """
        return text_tokens(self._tokenizer, text)

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        ignore_end: bool = False,
        on_prompt: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generator[Chunk]:
        """The answer in chunks of whole characters; closing it leaves the model usable.

        prompt      as in `prompt`; what it shares with the last prompt and answer is not computed
                    again
        max_tokens  None goes on to the end of the context
        sampling    the model's own settings when None; `options` change single fields of it
        ignore_end  goes on past the end token
        on_prompt   called with (tokens done, tokens in all) while the prompt is computed
        cancelled   asked between tokens; True ends the answer with finish_reason "cancelled"

        Raises BudgetError for a prompt beyond the context and ShapeError for a setting out of
        range, at the call; DeviceError for non-finite logits and UnsupportedError when another
        answer was begun, while it runs.
        """
        chosen = dataclasses.replace(self.sampling if sampling is None else sampling, **options)
        return self.engine.stream(
            self.prompt(prompt),
            chosen,
            max_tokens=max_tokens,
            stop=stop,
            ignore_end=ignore_end,
            on_prompt=on_prompt,
            cancelled=cancelled,
        )

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        ignore_end: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """What follows `prompt`, as it is. Arguments and errors are those of `stream`."""
        return join(
            self.stream(
                prompt,
                max_tokens=max_tokens,
                stop=stop,
                sampling=sampling,
                ignore_end=ignore_end,
                **options,
            )
        )

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """The assistant's next message, to a text or to messages. Arguments as in `stream`."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(
            messages, max_tokens=max_tokens, stop=stop, sampling=sampling, **options
        )

    def score(self, text: str | Sequence[int]) -> Score:
        """Log probability of each token of a text, or of tokens. Raises as `stream` does."""
        tokens = self.prompt(text)
        logprobs = self.engine.session.score(tokens)
        return Score(tuple(tokens), (None, *(float(entry) for entry in logprobs)))

    def close(self) -> None:
        """Gives weights and cache back. Closing twice is fine; all other use raises DeviceError."""
        if self._engine is not None:
            self._engine.session.reset()  # ends a stream that is still open
            self._engine = None
            self.flash = self.prompts = None
            self._close()
            self._close = lambda: None  # what it closed has memory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _are_messages(prompt: Sequence[int] | Sequence[Message]) -> TypeGuard[Sequence[Message]]:
    return isinstance(prompt, Sequence) and any(isinstance(entry, Mapping) for entry in prompt)


def _token_ids(tokens: object) -> list[int]:
    """Of Python's integers or numpy's. Raises ShapeError for anything else."""
    try:
        if isinstance(tokens, bytes | Mapping):  # both would give integers or nothing
            raise TypeError
        return [operator.index(token) for token in tokens]  # type: ignore[attr-defined]
    except TypeError:
        raise ShapeError(
            f"prompt: found {reprlib.repr(tokens)}, wanted text, token ids, or messages such as "
            '[{"role": "user", "content": "..."}]'
        ) from None


def text_tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], int | None]:
    """Model.text_tokens, without a model."""
    tokens = tokenizer.encode(text, add_special=True, parse_special=False)
    starts = bool(tokens) and tokenizer.bos_id is not None and tokens[0] == tokenizer.bos_id
    return tokens, tokenizer.bos_id if starts else None


def load(
    model: str | Path = "default",
    *,
    bits: int | None = None,
    recipe: Recipe | str | Path | None = None,
    context: int | None = None,
    threads: int | None = None,
    isa: str | None = None,
    kernel: str = "auto",
    cache_type: str = "f16",
    cache_dir: str | Path | None = None,
    memory: str | int | None = None,
    sparsity: float = 0.0,
    cache_aware: float = 0.0,
    npu: str = "off",
    npu_pruning: float | None = None,
    npu_chunk: int | None = None,
    npu_hot: float | str | None = None,
    checked: bool = False,
    score_bytes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Model:
    """A model that is ready to answer; the first time it is fetched and packed into the cache.

    model     a packed folder, a GGUF file, a Hugging Face folder or id, or "default", a small model
    bits      of the linear layers, 1 to 8; a quantized checkpoint is then quantized again. Left
              out, a quantized checkpoint keeps its codes and others get 4
    recipe    instead of bits: what each tensor gets, a Recipe or the path of its file
    context   tokens of prompt and answer together; the model's own when None
    threads   default_threads() of runtime.threads when None
    isa       an instruction set of `elute doctor`; the best when None
    kernel    how weights are multiplied: "lookup", "multiply", or "auto", the faster one by a
              measurement that the first start on a machine takes; answers are the same
    cache_type  what keys and values are kept in: "f16", or "q8", half the memory with 8-bit codes
    cache_dir what is fetched, packed and measured is kept there; $ELUTE_HOME or ~/.cache/elute when
              None. Hub repositories stay in the hub's own cache
    memory    all that the process may hold, such as "1.5G": weights that do not fit are read from
              flash for every forward, with the same answers. Without a context it is then at most
              4096 tokens. Packing a model that is not packed yet does not count
    score_bytes of memory, what the logits of one step of `score` may take; more steps read weights
              from flash more often. When None, 2 MB
    sparsity  the share of the weights to leave out, 0 to 0.9: for each token, of the prompt too,
              those that matter least to it. Answers change and get worse. The first use calibrates
              the model, which is kept with it
    cache_aware  with memory and sparsity, of a model in channel order: 0 to 1, how much sooner
              weights count that are in memory already, and how much later those that would have to
              be read (flash.sparsity.Threshold.least). What is answered then depends on memory
              and on what was answered before; at 0 it does not
    checked   weights are compared with their checksums, at the start or, with memory, whenever
              they are read: damage is then a DeviceError and never a token
    npu       what multiplies prompts, in int8: "qnn", "openvino", "sim" (numpy, slow), "cpu" (ONNX
              Runtime), "auto", an NPU if there is one and it is faster, or "off"; "require:NAME"
              fails where that device does not work, else prompts stay on the CPU, and a line says
              why. Answers change a little; the first use measures the model; see docs/npu.md
    npu_pruning  the share of the inputs whose outliers are not added back, 0 to 1; the table in
              docs/npu.md says why 0.35 when None
    npu_chunk tokens that a graph of the NPU has, 1 to 256; 256 when None
    npu_hot   the weight rows of outliers that stay in memory: a share of the int8 weights' bytes, 0
              to 1, or a size such as "64M"; 0.03 when None. Others are made when they are wanted,
              and read from flash where memory is limited, with the same answers
    progress  called with (stage, done, total)

    Raises FormatError for broken files, UnsupportedError for models and types that elute lacks and
    for `checked` where the packed folder has no checksums,
    cache_aware where nothing is fetched by channel,
    BudgetError for a full disk or too little memory, DeviceError for an unknown isa or kernel, or
    weights that cannot be read.
    """
    from elute import _native
    from elute.formats.chat_template import ChatTemplate
    from elute.formats.tokenizer import Tokenizer as FileTokenizer
    from elute.model.families import op_list
    from elute.runtime import calibration
    from elute.runtime.executor import UNLIMITED_LOGITS
    from elute.runtime.executor import Executor as NativeExecutor
    from elute.runtime.limited import limited_weights, wants_channels
    from elute.runtime.store import can_reorder, has_experts, in_channel_order, open_packed

    check_sparsity(sparsity)
    check_cache_aware(cache_aware)
    if cache_aware and (memory is None or not sparsity):
        raise UnsupportedError(
            f"cache_aware: found {cache_aware} without both memory and sparsity, wanted them: it "
            "chooses among weights that are left out or read; give both, or leave it out"
        )
    folder = None if cache_dir is None else Path(cache_dir)
    packed = open_packed(
        str(model),
        bits=bits,
        recipe=recipe,
        cache_dir=folder,
        by_channel=cache_aware > 0,
        progress=progress,
    )
    files = packed.tokenizer_files()
    tokenizer = FileTokenizer.from_files(files)
    has_template = files.chat_template or files.tokenizer_config.get("chat_template")
    template = ChatTemplate.from_files(files) if has_template else None
    sampling = model_sampling(files.generation_config)
    del files  # megabytes of text
    # Reading a vocabulary of 128k takes 130 MB for a moment, which malloc would keep for ever.
    _native.return_freed_memory()
    ops = op_list(packed.config)
    if (
        memory is not None
        and sparsity
        and wants_channels(packed, ops, memory, context, cache_type, threads, sparsity)
    ):
        packed = in_channel_order(packed, str(model), cache_dir=folder, progress=progress)
    if cache_aware and not packed.banks:
        way = "elute convert --order channels makes a folder of it, or " * can_reorder(packed)
        raise UnsupportedError(
            f"{packed.path}: found weights in panel order, wanted channel order for cache_aware; "
            f"{way}leave cache_aware out"
        )
    if context is not None and context > ops.context:
        log.warning(
            "%s: context %d is beyond the %d tokens that the model was trained for; answers get "
            "worse there",
            model,
            context,
            ops.context,
        )
    if sparsity and has_experts(packed.config):
        log.log(NOTE, "sparsity: of attention alone; all weights of a picked expert count")
    scores = calibration.saved(packed, ops) if sparsity else None
    if sparsity and scores is None and memory is not None:
        score_bytes = max(score_bytes or 0, calibration.probe_bytes(ops.vocabulary))
    weights: WeightSource = packed
    kernels = None
    sums = packed.page_sums() if checked else None
    on_npu = None
    if npu != "off":
        from elute.runtime.npu import OnNpu

        on_npu = OnNpu(
            packed, ops, npu, pruning=npu_pruning, chunk=npu_chunk, hot=npu_hot, folder=folder
        )
    if memory is not None:
        if on_npu is not None:
            on_npu.choose_for_budget()
        weights, context, kernels = limited_weights(
            packed,
            ops,
            memory,
            context,
            cache_type,
            threads,
            isa,
            kernel,
            folder,
            score_bytes,
            sums,
            sparsity,
            None if on_npu is None else on_npu.needs,
        )
    elif sums is not None:
        sums.check(packed.path, progress=_stage(progress, "check"))
    executor = NativeExecutor(
        ops,
        weights,
        context=context,
        n_threads=threads,
        isa=isa,
        kernel=kernel,
        cache_type=cache_type,
        cache_dir=folder,
        kernels=kernels,
        logits_bytes=UNLIMITED_LOGITS if memory is None else score_bytes or LIMITED_LOGITS,
    )
    if sparsity and scores is None:
        log.log(NOTE, "sparsity: measuring the model on a text of elute's own, once")
        tokens, _ = text_tokens(tokenizer, calibration.own_text())
        ones = calibration.importances(packed, ops)
        scores = calibration.calibrate(executor, ops, ones, tokens, progress=progress)
        if executor.context >= min(ops.context, calibration.WINDOW):
            calibration.save(packed, scores)
        else:  # of less than others would measure: theirs should not hang on this
            log.log(NOTE, "sparsity: not kept, since a context of %d is short", executor.context)
    prompts = None
    if on_npu is not None:  # before anything is left out: its calibration is of the whole model
        prompts = on_npu.executor(
            executor,
            weights,
            lambda: text_tokens(tokenizer, calibration.own_text())[0],
            progress,
        )
        if prompts is not None and sparsity:
            log.log(NOTE, "sparsity: all weights count for prompts, which the NPU multiplies")
    if scores is not None:
        executor.sparsify(thresholds(scores, sparsity), cache_aware=cache_aware)
    if cache_aware and isinstance(weights, FlashWeights):
        if weights.plan.staging:
            told = "what is answered depends on which weights are in memory, so also on --memory"
        else:
            told = "all weights are in memory, so it changes nothing"
        log.log(NOTE, "cache_aware %g: %s", cache_aware, told)
    return Model(
        executor if prompts is None else prompts,
        tokenizer,
        name=str(model),
        path=packed.path,
        template=template,
        sampling=sampling,
        bits_per_weight=packed.bits_per_weight,
        sparsity=sparsity,
        flash=weights if isinstance(weights, FlashWeights) else None,
        prompts=prompts,
        close=lambda: None if prompts is None else prompts.close(),
    )


def _stage(
    progress: Callable[[str, int, int], None] | None, name: str
) -> Callable[[int, int], None]:
    return lambda done, total: None if progress is None else progress(name, done, total)


def model_sampling(generation_config: Mapping[str, Any]) -> Sampling:
    """Sampling as the model's authors advise; elute's own where they say nothing.

    Reads the keys of Hugging Face's generation_config.json. Raises FormatError for an impossible
    value.
    """
    if generation_config.get("do_sample") is False:
        return Sampling(temperature=0.0)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    advised = {
        name: generation_config[name] for name in names if generation_config.get(name) is not None
    }
    try:
        return Sampling(**advised)
    except ShapeError as error:
        raise FormatError(f"generation_config.json: {error}") from None
