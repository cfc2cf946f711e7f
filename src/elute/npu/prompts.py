"""Prompts through a device: chunks of tokens, whose int8 products and float work run side by side.

Scales are static and rows do not meet in a product, so a token's result is its own: however a
prompt is cut, padded or scheduled, the logits are the same bits. Decoding goes on from the same
key-value cache, with the executor's own products.

Source: llm.npu (arXiv 2407.05858), sections 3.2 and 3.4.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from elute.errors import ShapeError
from elute.npu import checks, schedule
from elute.npu.device import Device
from elute.npu.linear import Counts, Pending, StaticLinear
from elute.npu.policies import CriticalPath, quickest
from elute.npu.run import run
from elute.npu.schedule import Graph, Kind, Policy, Schedule, Stage, Task, Times, Worker
from elute.npu.sites import Host, Segments
from elute.types import F32, I32

IN_FLIGHT = 4  # chunks under way: registers of 256 rows each
# Of the bound: mostly one of the first rules is, and trying all takes 40 ms (2 chunks) to 300 (8).
NEAR_ENOUGH = 1.01


@dataclass(frozen=True)
class Figures:
    """Of the prompts so far.

    wanted, found  weight rows that shadows wanted, and of those the ones that were in memory
    read_bytes     from flash, for the others
    hot_bytes      of rows that stay in memory
    """

    tokens: int
    counts: Counts
    wanted: int
    found: int
    read_bytes: int
    hot_bytes: int

    @property
    def clipped_share(self) -> float | None:
        """Of the values of all inputs; None before the first."""
        return self.counts.clipped / self.counts.inputs if self.counts.inputs else None

    @property
    def hit_rate(self) -> float | None:
        """None where no row was wanted."""
        return self.found / self.wanted if self.wanted else None


class PromptExecutor:
    """An executor for sessions: `prompt` by the device, `forward` by the host.

    linears  of the host's sites, in their order; the host makes the other products itself
    chunk    tokens a graph of the device has
    policy   when what runs; changes no bit. None: from the second prompt on, that which is quickest
             in simulation
    """

    def __init__(
        self,
        host: Host,
        linears: Sequence[StaticLinear],
        device: Device,
        *,
        chunk: int,
        policy: Policy | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        if in_flight < 1:
            raise ShapeError(f"npu: found {in_flight} chunks in flight, wanted 1 or more")
        self.host = host
        self.linears = tuple(linears)
        self.chunk = chunk
        self.context = host.context
        self.vocabulary = host.vocabulary
        self.logits_bytes = host.logits_bytes
        self.prompt_tokens = chunk * 2 * in_flight  # what a session should hand over at a time
        self.last: Schedule | None = None  # of the prompt before
        self._device = device
        self._policy = policy
        self._rules: dict[int, Policy] = {}  # by number of chunks
        self._in_flight = in_flight
        self._stages = _stages(self.linears)
        self._seconds = _guess(self.linears)
        self._tokens = 0

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        """By the host alone; see runtime.executor.Executor."""
        return self.host.forward(tokens, position, all_logits=all_logits)

    def prompt(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        """As forward, with the device's products. Raises DeviceError where it fails, too."""
        tokens = self.host.checked(tokens, position)
        cuts = range(0, tokens.size, self.chunk)
        chunks = [(tokens[at : at + self.chunk], position + at) for at in cuts]
        graph = schedule.tasks(
            self._stages, len(chunks), in_flight=min(self._in_flight, len(chunks))
        )
        sites = [linear.site for linear in self.linears]
        with self.host.cut(sites, graph.in_flight) as segments:
            segments.cached(position)  # an interrupted prompt leaves no mixture
            work = _Work(self.linears, self._device, segments, chunks, graph.in_flight, all_logits)
            times = {task: self._seconds[task.stage, task.worker] for task in graph.tasks}
            try:
                self.last = run(graph, self._rule(graph, times), times, work)
            finally:
                work.close()
            segments.cached(position + tokens.size)
        self._remember()
        self._tokens += tokens.size
        return np.concatenate(work.logits) if len(work.logits) > 1 else work.logits[0]

    @property
    def device(self) -> str:
        """The name of what it is."""
        return self._device.profile.name

    @contextmanager
    def scheduled(self, policy: Policy) -> Generator[None]:
        """Prompts meanwhile go by this policy."""
        before, self._policy = self._policy, policy
        try:
            yield
        finally:
            self._policy = before

    def close(self) -> None:
        """Gives the device back; `forward` still works."""
        self._device.close()

    def figures(self) -> Figures:
        counts = Counts()
        for linear in self.linears:
            counts.inputs += linear.counts.inputs
            counts.clipped += linear.counts.clipped
            counts.outputs += linear.counts.outputs
            counts.saturated += linear.counts.saturated
        wanted = sum(linear.rows.wanted for linear in self.linears)
        found = sum(linear.rows.found for linear in self.linears)
        read_bytes = sum(linear.rows.read_bytes for linear in self.linears)
        hot_bytes = sum(linear.rows.nbytes for linear in self.linears)
        return Figures(self._tokens, counts, wanted, found, read_bytes, hot_bytes)

    def _rule(self, graph: Graph, times: Times) -> Policy:
        if self._policy is not None:
            return self._policy
        if self.last is None or graph.n_chunks == 1:  # nothing is known, or there is no choice
            return CriticalPath()
        if graph.n_chunks not in self._rules:
            self._rules[graph.n_chunks] = quickest(graph, times, near=NEAR_ENOUGH)
        return self._rules[graph.n_chunks]

    def _remember(self) -> None:
        """How long stages take, for the next prompt's order."""
        assert self.last is not None
        sums: dict[tuple[int, Worker], list[float]] = {}
        for task, seconds in self.last.times().items():
            sums.setdefault((task.stage, task.worker), []).append(seconds)
        self._seconds.update({key: sum(all_) / len(all_) for key, all_ in sums.items()})


class _Work:
    """What the tasks of one prompt do. Tasks of one chunk come in order, two of them at a time."""

    def __init__(
        self,
        linears: Sequence[StaticLinear],
        device: Device,
        segments: Segments,
        chunks: Sequence[tuple[I32, int]],
        in_flight: int,
        all_logits: bool,
    ) -> None:
        self._linears = linears
        self._device = device
        self._segments = segments
        self._chunks = chunks
        self._all_logits = all_logits
        self._pending: list[Pending | None] = [None] * len(chunks)
        self._logits: dict[int, F32] = {}
        # Registers of a chunk from its first float stage to its last; those are of one thread.
        self._free = list(range(in_flight))
        self._place: dict[int, int] = {}

    @property
    def logits(self) -> list[F32]:
        return [self._logits[chunk] for chunk in sorted(self._logits)]

    def close(self) -> None:
        """Nothing is under way any more, whatever it left behind."""
        for pending in self._pending:
            if pending is not None:
                pending.close()

    def __call__(self, task: Task) -> None:
        site, is_product = divmod(task.stage, 2)
        if not is_product:
            self._float(task.chunk, site)
            return
        pending = self._pending[task.chunk]
        assert pending is not None
        linear = self._linears[site]
        if task.worker is Worker.NPU:
            profile = self._device.profile
            results = self._device.run(linear.name, pending.q)
            pending.results = checks.check_outputs(linear.graph, profile, results, profile.name)
        else:
            linear.add_shadow(pending)

    def _float(self, chunk: int, site: int) -> None:
        """From the product before `site` to its input."""
        tokens, position = self._chunks[chunk]
        pending = self._pending[chunk]
        if site == 0:
            self._place[chunk] = self._free.pop()
        place = self._place[chunk]
        if pending is not None:
            before = self._linears[site - 1]
            registers = [self._segments.register(o, chunk=place) for o in before.site.outputs]
            before.finish(pending, registers)
            self._pending[chunk] = None
        last = site == len(self._linears)
        logits = self._segments.run(
            site,
            tokens,
            position,
            chunk=place,
            all_logits=self._all_logits,
            want_logits=last and (self._all_logits or chunk == len(self._chunks) - 1),
        )
        if logits is not None:
            self._logits[chunk] = logits
        if last:
            self._free.append(self._place.pop(chunk))
        else:
            linear = self._linears[site]
            x = self._segments.register(linear.site.input, chunk=place)[: tokens.size]
            self._pending[chunk] = linear.split(x)


def _stages(linears: Sequence[StaticLinear]) -> list[Stage]:
    found = []
    for linear in linears:
        found.append(Stage(Kind.FLOAT, attention=linear.site.attention))
        found.append(Stage(Kind.PRODUCT, shadow=linear.shadow))
    return [*found, Stage(Kind.FLOAT)]


def _guess(linears: Sequence[StaticLinear]) -> dict[tuple[int, Worker], float]:
    """Before anything was measured: products by their size, float work a third of that."""
    seconds: dict[tuple[int, Worker], float] = {}
    for i, linear in enumerate(linears):
        macs = sum(n * k for n, k in (p.shape for p in linear.graph.products))
        seconds[2 * i + 1, Worker.NPU] = macs * 1e-9
        seconds[2 * i + 1, Worker.CPU] = macs * 1e-10
        seconds[2 * i, Worker.CPU] = macs * 3e-10
    seconds[2 * len(linears), Worker.CPU] = 1e-3
    return seconds
