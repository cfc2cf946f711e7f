"""The decoder that all families share, and the data in which they differ. Knows no family.

One layer, with [ ] around what only some families have:

    normed = norm(hidden);  query, key, value = linear(normed);  [query, key = norm per head];  rope
    query = [norm](attention);  normed = [norm](linear(query));  hidden += normed
    normed = norm(hidden);  gate, up = linear(normed);  gate = [norm](activation(gate) * up)
    normed = [norm](linear(gate));  hidden += normed

or, in the last two lines, [logits = router(normed);  normed = experts(normed, logits)].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from elute.model.config import Config, shown
from elute.model.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    Experts,
    Gate,
    Head,
    Linear,
    Op,
    OpList,
    RmsNorm,
    Rope,
    RopeTable,
    Router,
)

# The deepest published models have about 130; a hostile config must not build ops for hours.
MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 16  # of all layers: the largest published models have about 23 thousand
# How other families of experts call what the ones here do not have.
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size")

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
UNTIED_HEAD = "lm_head.weight"

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The widths and counts of a model, checked to fit together."""

    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    vocabulary: int
    context: int


def read_sizes(
    config: Config,
    *,
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    head_width: int | None = None,
    vocabulary: int | None = None,
    context: int | None = None,
) -> Sizes:
    """Sizes from the usual keys; the arguments are a family's defaults for keys left out.

    Without a default, num_key_value_heads is num_attention_heads and head_dim is
    hidden_size / num_attention_heads. Raises FormatError when a size is missing, is not a whole
    number above 0, or does not fit the others.
    """
    hidden = config.count("hidden_size")
    n_heads = config.count("num_attention_heads", n_heads)
    n_kv_heads = config.count("num_key_value_heads", n_kv_heads or n_heads)
    if n_heads % n_kv_heads:
        wanted = f"a multiple of num_key_value_heads ({n_kv_heads})"
        raise config.misfit(f"num_attention_heads is {n_heads}", wanted)
    if head_width is None and not config.has("head_dim"):
        if hidden % n_heads:
            wanted = f"head_dim, or a multiple of num_attention_heads ({n_heads})"
            raise config.misfit(f"hidden_size is {hidden}", wanted)
        head_width = hidden // n_heads
    head_width = config.count("head_dim", head_width)
    if head_width % 2:
        found = f"head_dim (or hidden_size / num_attention_heads) is {head_width}"
        raise config.misfit(found, "an even number for rotary positions")
    return Sizes(
        hidden=hidden,
        intermediate=config.count("intermediate_size"),
        n_layers=config.count("num_hidden_layers", at_most=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_width=head_width,
        vocabulary=config.count("vocab_size", vocabulary),
        context=config.count("max_position_embeddings", context),
    )


def read_layer_types(config: Config, default: tuple[str, ...]) -> tuple[str, ...]:
    """`layer_types` of the config, or `default`, which is as long as the model is deep."""
    types = config.texts("layer_types") or default
    if len(types) != len(default):
        found = f"layer_types has {len(types)} entries"
        raise config.misfit(found, f"num_hidden_layers = {len(default)}")
    for layer, kind in enumerate(types):
        if kind not in (FULL_ATTENTION, SLIDING_ATTENTION):
            wanted = f"{FULL_ATTENTION} or {SLIDING_ATTENTION}"
            raise config.misfit(f"layer_types[{layer}] is {shown(kind)}", wanted)
    return types


def windows_of(
    config: Config, types: tuple[str, ...], window: int | None
) -> tuple[int | None, ...]:
    """The window of each layer. Raises FormatError when a layer slides and there is no window."""
    if window is None and SLIDING_ATTENTION in types:
        found = f"layer_types[{types.index(SLIDING_ATTENTION)}] is {SLIDING_ATTENTION}"
        raise config.misfit(f"{found} but no sliding_window is in force", "a sliding_window")
    return tuple(window if kind == SLIDING_ATTENTION else None for kind in types)


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Names of a layer's norms, below "model.layers.N."; None where the family has none."""

    before_attention: str = "input_layernorm"
    query: str | None = None
    key: str | None = None
    whole: bool = False  # these two are over all heads at once, not per head
    before_output: str | None = None  # between attention and o_proj
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    before_down: str | None = None
    after_mlp: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Experts in place of a layer's mlp, and their names below "model.layers.N.".

    layers      whether each layer has them
    width       of an expert: rows of its gate and up
    normalized  shares of the picked ones add up to 1
    """

    n_experts: int
    top_k: int
    width: int
    normalized: bool
    layers: tuple[bool, ...]
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def read_mixture_sizes(config: Config, keys: tuple[str, ...], n_layers: int) -> tuple[int, int]:
    """-> (n_experts, top_k). keys: what the number of experts is called, the usual name first.

    Raises FormatError when a number is missing or does not fit the other, UnsupportedError for
    experts that all tokens share.
    """
    for shared in SHARED_EXPERTS:
        if config.has(shared) and config.values[shared]:
            found = f"{shared} is {shown(config.values[shared])}"
            raise config.unsupported(found, "experts that a router picks, none that all share")
    key = next((key for key in keys if config.has(key)), keys[0])
    n_experts = config.count(key, at_most=MAX_EXPERTS // n_layers)
    return n_experts, config.count("num_experts_per_tok", at_most=n_experts)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Everything that distinguishes one decoder from another.

    windows     the window of each layer, None for full attention
    ropes       the rope table of each layer, a key of rope_tables
    norm_offset added to every norm's weight
    """

    sizes: Sizes
    activation: Activation
    eps: float
    tied: bool
    windows: tuple[int | None, ...]
    ropes: tuple[str, ...]
    rope_tables: Mapping[str, RopeTable]
    attention_scale: float
    norms: Norms = field(default_factory=Norms)
    mixture: Mixture | None = None
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    def op_list(self) -> OpList:
        sizes = self.sizes
        ops: list[Op] = [Embed(EMBEDDING, "hidden", self.embed_scale)]
        for layer in range(sizes.n_layers):
            ops += self._attention(layer)
            ops += self._mixture(layer) if self._mixes(layer) else self._mlp(layer)
        ops.append(RmsNorm("hidden", FINAL_NORM, "normed", self.eps, None, self.norm_offset))
        ops.append(Head("normed", EMBEDDING if self.tied else UNTIED_HEAD, self.logit_softcap))
        return OpList(
            ops=tuple(ops),
            # As few as can be: each is 256 rows of floats. What is read for the last time, the next
            # result of that width replaces.
            registers={
                "hidden": sizes.hidden,
                "normed": sizes.hidden,
                "query": sizes.n_heads * sizes.head_width,
                "key": sizes.n_kv_heads * sizes.head_width,
                "value": sizes.n_kv_heads * sizes.head_width,
                **self._mlp_registers(),
            },
            n_layers=sizes.n_layers,
            n_kv_heads=sizes.n_kv_heads,
            head_width=sizes.head_width,
            vocabulary=sizes.vocabulary,
            context=sizes.context,
            rope_tables=self.rope_tables,
        )

    def _mixes(self, layer: int) -> bool:
        return self.mixture is not None and self.mixture.layers[layer]

    def _mlp_registers(self) -> dict[str, int]:
        mixes = [self._mixes(layer) for layer in range(self.sizes.n_layers)]
        width = self.sizes.intermediate
        dense = {} if all(mixes) else {"gate": width, "up": width}
        return dense | ({"logits": self.mixture.n_experts} if self.mixture and any(mixes) else {})

    def _attention(self, layer: int) -> Iterator[Op]:
        sizes, norms = self.sizes, self.norms
        yield self._norm(layer, norms.before_attention, "hidden", "normed")
        yield self._linear(
            layer, "self_attn", "normed", {"q": "query", "k": "key", "v": "value"}, self.qkv_bias
        )
        for register, norm in (("query", norms.query), ("key", norms.key)):
            if norm is not None:
                width = None if norms.whole else sizes.head_width
                yield self._norm(layer, norm, register, register, head_width=width)
        for register in ("query", "key"):
            yield Rope(register, sizes.head_width, self.ropes[layer])
        yield Attention(
            query="query",
            key="key",
            value="value",
            output="query",
            layer=layer,
            n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_kv_heads,
            head_width=sizes.head_width,
            scale=self.attention_scale,
            window=self.windows[layer],
            softcap=self.attention_softcap,
        )
        if norms.before_output is not None:
            yield self._norm(layer, norms.before_output, "query", "query")
        yield self._linear(layer, "self_attn", "query", {"o": "normed"}, self.output_bias)
        if norms.after_attention is not None:
            yield self._norm(layer, norms.after_attention, "normed", "normed")
        yield Add("normed", "hidden")

    def _mlp(self, layer: int) -> Iterator[Op]:
        norms = self.norms
        yield self._norm(layer, norms.before_mlp, "hidden", "normed")
        yield self._linear(layer, "mlp", "normed", {"gate": "gate", "up": "up"}, self.mlp_bias)
        yield Gate("gate", "up", "gate", self.activation)
        if norms.before_down is not None:
            yield self._norm(layer, norms.before_down, "gate", "gate")
        yield self._linear(layer, "mlp", "gate", {"down": "normed"}, self.mlp_bias)
        if norms.after_mlp is not None:
            yield self._norm(layer, norms.after_mlp, "normed", "normed")
        yield Add("normed", "hidden")

    def _mixture(self, layer: int) -> Iterator[Op]:
        mixture, norms = self.mixture, self.norms
        assert mixture is not None
        path = f"model.layers.{layer}.{mixture.block}"

        def of_all(name: str) -> tuple[str, ...]:
            return tuple(f"{path}.experts.{e}.{name}.weight" for e in range(mixture.n_experts))

        yield self._norm(layer, norms.before_mlp, "hidden", "normed")
        yield Router("normed", f"{path}.gate.weight", "logits")
        yield Experts(
            input="normed",
            logits="logits",
            output="normed",
            gates=of_all(mixture.gate),
            ups=of_all(mixture.up),
            downs=of_all(mixture.down),
            width=mixture.width,
            top_k=mixture.top_k,
            normalized=mixture.normalized,
            activation=self.activation,
        )
        yield Add("normed", "hidden")

    def _norm(
        self, layer: int, name: str, source: str, target: str, *, head_width: int | None = None
    ) -> RmsNorm:
        weight = f"model.layers.{layer}.{name}.weight"
        return RmsNorm(source, weight, target, self.eps, head_width, self.norm_offset)

    def _linear(
        self, layer: int, block: str, source: str, outputs: Mapping[str, str], bias: bool
    ) -> Linear:
        """One op for projections of one input; `outputs` maps the "q" of "q_proj" to a register."""
        paths = [f"model.layers.{layer}.{block}.{name}_proj" for name in outputs]
        return Linear(
            input=source,
            weights=tuple(f"{path}.weight" for path in paths),
            outputs=tuple(outputs.values()),
            biases=tuple(f"{path}.bias" if bias else None for path in paths),
        )
