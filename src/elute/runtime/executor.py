"""Hands an op list and its weights to the native executor: one call a token or prompt chunk."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from elute import _native
from elute.errors import BudgetError, DeviceError, ShapeError, UnsupportedError
from elute.flash.banks import BankUse, bank_uses, resident_banks
from elute.flash.sparsity import Threshold, check_cache_aware
from elute.flash.weights import FlashWeights, Streamed
from elute.formats.packed import PackedModel
from elute.kernels import kv_cache, registry
from elute.model.ops import (
    Add,
    Attention,
    Embed,
    Experts,
    Gate,
    Head,
    Linear,
    OpList,
    RmsNorm,
    Rope,
    Router,
)
from elute.model.weights import check_shape, weight_shapes
from elute.npu.sites import Site
from elute.runtime.threads import default_threads
from elute.types import F32, I32, I64, InBank, PackedMatrix, WeightSource

CHUNK = 256  # tokens a native call: the panels of a matrix are dequantized once for all of them
UNLIMITED_LOGITS = 1 << 62
MAX_CONTEXT = 1 << 24  # the last position that is exact in f32, as rotary angles need it


class Executor:
    """Runs the model; its key-value cache is its only state. A forked child may use its copy.

    context    positions of the cache; memory is taken as they are first used
    n_threads  default_threads() when None
    isa        one of isas(); the best when None
    kernel     a registry.Kernel: what multiplies the weights; none changes a bit
    cache_type a kv_cache.CacheType: how keys and values are rounded
    logits_bytes  what callers should ask for at most in one forward with all logits
    kernels    what was chosen, by bit width; given, when the race would not fit beside the weights
    cache_dir  where the measurement behind that choice is kept; formats.sources.cache_dir() when
               None

    Raises FormatError for a missing weight, ShapeError for one that the op list does not fit or an
    unknown cache type, UnsupportedError for heads that the cache cannot hold, DeviceError for an
    instruction set that this CPU lacks, an unknown kernel or threads that cannot be started,
    BudgetError for a cache beyond the address space.
    """

    def __init__(
        self,
        ops: OpList,
        weights: WeightSource,
        *,
        context: int | None = None,
        n_threads: int | None = None,
        isa: str | None = None,
        kernel: str = registry.Kernel.AUTO,
        cache_type: str = kv_cache.CacheType.F16,
        cache_dir: Path | None = None,
        kernels: Mapping[int, registry.Choice] | None = None,
        logits_bytes: int = UNLIMITED_LOGITS,
    ) -> None:
        self.logits_bytes = logits_bytes
        self.isa = chosen_isa(isa)
        self.n_threads = default_threads() if n_threads is None else n_threads
        if not 1 <= self.n_threads <= 512:
            raise ShapeError(
                f"threads: found {self.n_threads}, wanted 1 to 512; try {default_threads()}"
            )
        self.context = ops.context if context is None else context
        if not 1 <= self.context <= MAX_CONTEXT:
            raise ShapeError(
                f"context: found {self.context}, wanted 1 to {MAX_CONTEXT} positions; use as "
                "many as your longest prompt and its answer take"
            )
        self.cache_type = kv_cache.cache_type(cache_type, head_width=ops.head_width)
        self.vocabulary = ops.vocabulary
        try:
            native = _native.Executor(
                self.isa,
                self.n_threads,
                self.context,
                CHUNK,
                ops.n_layers,
                ops.n_kv_heads,
                ops.head_width,
                str(self.cache_type),
            )
            builder = _Builder(native, ops, weights)
            builder.build()
            self.kernels = (
                registry.choose(self.isa, builder.widths(), kernel, folder=cache_dir)
                if kernels is None
                else kernels
            )
            native.finish(
                [self.kernels[b].lookup_rows if b in self.kernels else 0 for b in registry.WIDTHS]
            )
            if isinstance(weights, Streamed):
                weights.attach(native, builder.matrix_names())
        except MemoryError:
            raise BudgetError(
                f"context: the cache of {self.context} positions does not fit the address space; "
                "use a smaller context"
            ) from None
        except RuntimeError as error:
            raise DeviceError(str(error)) from None
        self._native = native
        self._masks = builder.masks
        self.cache_aware = 0.0  # as sparsify set it
        self.sites: Sequence[Site] = tuple(builder.sites)
        self.n_registers = len(ops.registers)
        self._cached = 0  # positions in the cache
        self._turn = threading.Lock()

    def forward(self, tokens: I32, position: int, *, all_logits: bool = False) -> F32:
        """tokens i32 [M] at positions position .. position+M-1 -> logits f32 [1 or M, vocabulary].

        The cache forgets what it held from `position` on. How tokens are cut into calls does not
        change a bit. Raises BudgetError beyond the context, ShapeError for token ids that the model
        does not have or a position beyond what the cache holds, UnsupportedError while another
        thread's forward runs, DeviceError when weights cannot be read or a forked child's threads
        not be started.
        """
        if not self._turn.acquire(blocking=False):
            raise _busy()
        try:
            return self._forward(self.checked(tokens, position), position, all_logits)
        except RuntimeError as error:
            raise DeviceError(str(error)) from None
        finally:
            self._turn.release()

    @contextmanager
    def cut(self, sites: Sequence[Site], n_chunks: int = 1) -> Generator[Segments]:
        """Forwards in parts, cut at the products of `sites`, which are in the order of use; up to
        n_chunks chunks of tokens may be under way. Nobody else can use the executor meanwhile.

        Raises UnsupportedError while a forward runs in another thread.
        """
        if not self._turn.acquire(blocking=False):
            raise _busy()
        try:
            self._native.cut([site.index for site in sites], n_chunks)
            yield Segments(self, self._native, len(sites) + 1)
        finally:
            self._turn.release()

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the inputs that `sparsify` takes: the first weight that reads each of them."""
        return tuple(self._masks)

    def sparsify(self, thresholds: Mapping[str, Threshold], *, cache_aware: float = 0.0) -> None:
        """From the next forward on, channels of these inputs count only from their threshold on.

        cache_aware  see Threshold.active: for tokens that are computed alone, of weights that are
                     fetched by channel; a forward of several reads all channels anyway

        Inputs that are left out count whole. Forgets what is cached: it was computed otherwise.
        """
        check_cache_aware(cache_aware)
        for name, threshold in thresholds.items():
            if name not in self._masks:
                raise ShapeError(f"sparsity: found input {name!r}, wanted one of Executor.inputs")
            if not 0 <= threshold.value < np.inf:
                raise ShapeError(
                    f"sparsity: {name} has threshold {threshold.value}, wanted a number from 0"
                )
        with self._turn:
            for name, mask in self._masks.items():
                found = thresholds.get(name)
                importance = [] if found is None else found.importance.tolist()
                self._native.set_mask(mask, importance, 0.0 if found is None else found.value)
            self._native.set_cache_aware(cache_aware)
            self.cache_aware = cache_aware
            self._cached = 0

    @contextmanager
    def observed(self) -> Generator[None]:
        """Counts scores of the inputs that sparsify() was told of, for `histogram`."""
        self._native.observe(True)
        try:
            yield
        finally:
            self._native.observe(False)

    def histogram(self, name: str) -> I64:
        """Scores of an input's channels, counted while it was observed; see flash.sparsity."""
        return self._native.histogram(self._masks[name])

    def checked(self, tokens: I32, position: int) -> I32:
        """What can be appended at `position`, as i32 [M]. Raises as `forward` does."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ShapeError(
                f"tokens: found shape {list(tokens.shape)}, wanted [M] with M of at least 1"
            )
        if tokens.dtype.kind not in "iu":
            raise ShapeError(f"tokens: found type {tokens.dtype}, wanted whole numbers")
        if position < 0 or position + tokens.size > self.context:
            raise BudgetError(
                f"tokens: positions {position} to {position + tokens.size - 1} do not fit a "
                f"context of {self.context}; use a context of {position + tokens.size} or more"
            )
        ids = tokens.tolist()  # its min and max cost a lone token less than two numpy calls
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocabulary:
            raise ShapeError(
                f"tokens: found id {low if low < 0 else high}, wanted 0 to {self.vocabulary - 1}"
            )
        if position > self._cached:
            raise ShapeError(
                f"tokens: found position {position}, wanted 0 to the cached {self._cached}; run "
                "the tokens before it first"
            )
        return np.ascontiguousarray(tokens, np.int32)

    def _forward(self, tokens: I32, position: int, all_logits: bool) -> F32:
        rows: list[F32] = []
        self._cached = position  # an interrupted forward leaves the chunks that are done
        for start in range(0, tokens.size, CHUNK):
            chunk = tokens[start : start + CHUNK]
            wanted = all_logits or start + CHUNK >= tokens.size
            logits = self._native.forward(
                chunk, position + start, all_logits=all_logits, want_logits=wanted
            )
            self._cached = position + start + chunk.size
            if logits is not None:
                rows.append(logits)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)


class Segments:
    """The parts of forwards that an executor was cut into; see Executor.cut.

    A segment ends where a product is to be made: its input is then in its register. The next one
    takes the outputs from theirs, bias included. Or, `whole`, a segment makes that product itself.
    Whoever uses it takes chunks through all segments in order, a chunk after those before it where
    a segment has attention.
    """

    def __init__(self, executor: Executor, native: _native.Executor, n: int) -> None:
        self._executor = executor
        self._native = native
        self.n = n

    def run(
        self,
        segment: int,
        tokens: I32,
        position: int,
        *,
        chunk: int = 0,
        whole: bool = False,
        all_logits: bool = False,
        want_logits: bool = False,
    ) -> F32 | None:
        """tokens i32 [M] with M of at most CHUNK, checked; logits as in forward, of the last
        segment. Raises DeviceError when weights cannot be read.
        """
        try:
            return self._native.run_segment(
                segment, whole, chunk, tokens, position, all_logits, want_logits
            )
        except RuntimeError as error:
            raise DeviceError(str(error)) from None

    def register(self, index: int, *, chunk: int = 0) -> F32:
        """-> f32 [CHUNK, width], the executor's own: row i is of the i-th token of the chunk."""
        return self._native.register_of(chunk, index)

    def cached(self, positions: int) -> None:
        """What the key-value cache now holds."""
        self._executor._cached = positions


def _busy() -> UnsupportedError:
    return UnsupportedError(
        "forward: found another thread's forward running on the same cache, wanted one at a time; "
        "take turns, or give each thread an Executor of its own (weights are shared)"
    )


class _Builder:
    """Adds an op list to a native executor, names turned into indices."""

    def __init__(self, native: _native.Executor, ops: OpList, weights: WeightSource) -> None:
        self._native = native
        self._ops = ops
        self._weights = weights
        self._shapes = weight_shapes(ops)
        self._registers = {
            name: native.add_register(width) for name, width in ops.registers.items()
        }
        self._tables = {
            name: native.add_rope_table([float(f) for f in table.inverse_frequencies], table.factor)
            for name, table in ops.rope_tables.items()
        }
        self._matrices: dict[str, tuple[int, PackedMatrix]] = {}
        self.masks: dict[str, int] = {}
        self.sites: list[Site] = []
        self._attends = False  # since the last site
        self._in_banks: dict[str, int] = {}  # index of a matrix in channel order
        self._banks, self._bank_index = _open_banks(ops, weights)
        self._next_use = 0

    def build(self) -> None:
        for op in self._ops.ops:
            match op:
                case Embed():
                    index, packed = self._matrix(op.weight)
                    if packed.columns is not None:
                        raise UnsupportedError(
                            f"{op.weight}: an embedding with reordered columns (act-order) is not "
                            "implemented; use a checkpoint without act-order there"
                        )
                    self._native.embed(index, self._registers[op.output], op.scale)
                case RmsNorm():
                    self._rms_norm(op)
                case Linear():
                    self._linear(op)
                case Rope():
                    self._native.rope(
                        self._registers[op.register], op.head_width, self._tables[op.table]
                    )
                case Attention():
                    self._attends = True
                    self._native.attention(
                        self._registers[op.query],
                        self._registers[op.key],
                        self._registers[op.value],
                        self._registers[op.output],
                        op.layer,
                        op.n_heads,
                        op.n_kv_heads,
                        op.head_width,
                        op.scale,
                        op.window or 0,
                        op.softcap or 0.0,
                    )
                case Gate():
                    self._native.gate(
                        self._registers[op.gate],
                        self._registers[op.up],
                        self._registers[op.output],
                        str(op.activation),
                    )
                case Router():
                    weight = np.ascontiguousarray(self._vector(op.weight))
                    self._native.router(
                        self._registers[op.input], weight, self._registers[op.output]
                    )
                case Experts():
                    self._experts(op)
                case Add():
                    self._native.add(self._registers[op.input], self._registers[op.output])
                case Head():
                    index, packed = self._matrix(op.weight)
                    self._native.head(
                        self._registers[op.input], index, _columns(packed), op.softcap or 0.0
                    )

    def widths(self) -> set[int]:
        """Bits a code of the matrices that were added."""
        return {packed.bits for _, packed in self._matrices.values()}

    def matrix_names(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._matrices)

    def _matrix(self, name: str) -> tuple[int, PackedMatrix]:
        if name not in self._matrices:
            packed = self._weights.matrix(name)
            check_shape(name, packed.shape, self._shapes[name], where="weights")
            index = self._native.add_matrix(
                packed.planes,
                packed.scales,
                packed.offsets,
                *packed.shape,
                packed.bits,
                packed.group_size,
                packed.zero,
                str(packed.affine),
            )
            self._matrices[name] = (index, packed)
        return self._matrices[name]

    def _vector(self, name: str) -> F32:
        values = self._weights.vector(name).astype(np.float32)
        check_shape(name, values.shape, self._shapes[name], where="weights")
        return values

    def _rms_norm(self, op: RmsNorm) -> None:
        weight = self._vector(op.weight) + np.float32(op.weight_offset)
        self._native.rms_norm(
            self._registers[op.input],
            self._registers[op.output],
            weight.tolist(),
            self._ops.registers[op.input] // weight.size,
            op.eps,
        )

    def _linear(self, op: Linear) -> None:
        """Weights that want the same column order share one quantization and its tables."""
        mask = self._native.add_mask(self._ops.registers[op.input])
        self.masks[op.weights[0]] = mask
        whole = range(len(op.weights))
        if self._banks is not None and self._in_bank(op.weights[0]) is not None:
            self._native.linear(
                self._registers[op.input],
                [self._channel_matrix(name) for name in op.weights],
                [self._registers[output] for output in op.outputs],
                [self._bias(bias) for bias in op.biases],
                [],
                mask,
                self._next_use,
            )
            self._next_use += 1
            self._add_site(op, whole, None)
            return
        by_order: dict[bytes, list[int]] = {}
        for i, name in enumerate(op.weights):
            _, packed = self._matrix(name)
            order = b"" if packed.columns is None else packed.columns.tobytes()
            by_order.setdefault(order, []).append(i)
        for members in by_order.values():
            self._native.linear(
                self._registers[op.input],
                [self._matrix(op.weights[i])[0] for i in members],
                [self._registers[op.outputs[i]] for i in members],
                [self._bias(op.biases[i]) for i in members],
                _columns(self._matrix(op.weights[members[0]])[1]),
                mask,
            )
            self._add_site(op, members, self._matrix(op.weights[members[0]])[1].columns)

    def _add_site(self, op: Linear, members: Sequence[int], columns: I32 | None) -> None:
        biases = [op.biases[i] for i in members]
        self.sites.append(
            Site(
                len(self.sites),
                self._registers[op.input],
                tuple(self._registers[op.outputs[i]] for i in members),
                tuple(op.weights[i] for i in members),
                tuple(None if bias is None else self._vector(bias) for bias in biases),
                columns,
                self._attends,
            )
        )
        self._attends = False

    def _experts(self, op: Experts) -> None:
        def indices(names: tuple[str, ...]) -> list[int]:
            return [self._matrix(name)[0] for name in names]

        for name in op.matrices():
            if self._matrix(name)[1].columns is not None:
                raise UnsupportedError(
                    f"{name}: an expert with reordered columns (act-order) is not implemented; "
                    "use a checkpoint without act-order there"
                )
        self._native.experts(
            self._registers[op.input],
            self._registers[op.logits],
            self._registers[op.output],
            indices(op.gates),
            indices(op.ups),
            indices(op.downs),
            op.top_k,
            op.normalized,
            str(op.activation),
            *self._use_of(op),
        )

    def _use_of(self, op: Experts) -> tuple[int, _native.BankCache | None, F32 | None]:
        """Of banks, where experts are fetched when they are picked; and the router that tells
        which ones the next layer will probably pick."""
        if self._banks is None or op.gates[0] not in self._bank_index:
            return -1, None, None
        self._next_use += 1
        later = self._ops.ops[self._ops.ops.index(op) :]
        router = next((after for after in later if isinstance(after, Router)), None)
        ahead = None if router is None else np.ascontiguousarray(self._vector(router.weight))
        return self._next_use - 1, self._banks, ahead

    def _in_bank(self, name: str) -> InBank | None:
        source = self._weights
        return source.in_bank(name) if isinstance(source, PackedModel | FlashWeights) else None

    def _channel_matrix(self, name: str) -> int:
        matrix = self._in_bank(name)
        assert matrix is not None
        assert self._banks is not None
        check_shape(name, matrix.shape, self._shapes[name], where="weights")
        if name not in self._in_banks:
            self._in_banks[name] = self._native.add_channel_matrix(
                self._banks,
                self._bank_index[matrix.bank],
                matrix.offset,
                matrix.scales,
                matrix.offsets,
                *matrix.shape,
                matrix.bits,
                matrix.group_size,
                matrix.zero,
                str(matrix.affine),
            )
        return self._in_banks[name]

    def _bias(self, name: str | None) -> list[float]:
        return [] if name is None else self._vector(name).tolist()


def _open_banks(
    ops: OpList, weights: WeightSource
) -> tuple[_native.BankCache | None, dict[str, int]]:
    """The banks of a model in channel order, and their indices by name."""
    if isinstance(weights, FlashWeights) and weights.has_expert_banks():
        layers = [op.gates[0] for op in ops.ops if isinstance(op, Experts)]
        opened = weights.open_banks([BankUse(name, i) for i, name in enumerate(layers)])
        return opened, {name: i for i, name in enumerate(layers)}
    packed = weights.packed if isinstance(weights, FlashWeights) else weights
    if not isinstance(packed, PackedModel) or not packed.banks:
        return None, {}
    uses = bank_uses(ops, packed.records)
    opened = (
        weights.open_banks(uses)
        if isinstance(weights, FlashWeights)
        else resident_banks(packed, uses)
    )
    return opened, {name: i for i, name in enumerate(packed.banks)}


def _columns(packed: PackedMatrix) -> list[int]:
    return [] if packed.columns is None else packed.columns.tolist()


def chosen_isa(isa: str | None = None) -> str:
    """The one that was asked for, or the best. Raises DeviceError when this CPU lacks it."""
    if isa is None:
        return str(_native.best_isa())
    if isa not in isas():
        raise DeviceError(f"isa: found {isa!r}, wanted one that this CPU runs: {', '.join(isas())}")
    return isa


def isas() -> Sequence[str]:
    """Instruction-set levels that this CPU runs, slowest first."""
    return tuple(_native.isas())
