# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The one forward pass: tokens -> logits, for training, prefill and decoding alike."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import constrain, target_platform
from mesh_transformer.model.attention.kernels import choose_kernel
from mesh_transformer.model.attention.layer import Attention, CrossAttention
from mesh_transformer.model.attention.masks import AttentionContext, KVCache, Masks, EncoderOutput
from mesh_transformer.model.attention.ring import from_zigzag, to_zigzag
from mesh_transformer.model.embedding import embed_tokens
from mesh_transformer.model.feed_forward import FeedForward
from mesh_transformer.model.linear import dropout, linear
from mesh_transformer.model.moe.layer import Experts
from mesh_transformer.model.moe.router import RoutingStats
from mesh_transformer.model.norms import Norm
from mesh_transformer.model.params import STACK, ParamInfo, Params, describe, make_inits, param
from mesh_transformer.model.positions import RelativeBias
from mesh_transformer.model.quantization import Quantized

NarrowParams = Mapping[str, Mapping[str, Array | Quantized]]  # Params, of which sampling may have narrowed some
Caches = tuple[KVCache, ...]  # of every block in a period of the pattern, stacked over the periods as parameters are
POLICIES = jax.checkpoint_policies
REMAT = {
    "full": POLICIES.nothing_saveable,
    "dots": POLICIES.dots_with_no_batch_dims_saveable,
    "offload": POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual_stream"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Block(hk.Module):
    """One layer: attention (to an encoder too) and feed-forward around the stream, one after the other or side by side."""

    def __init__(self, config: ModelConfig, *, local: bool, has_experts: bool, name: str):
        super().__init__(name=name)
        self.config, self.local, self.has_experts = config, local, has_experts

    def __call__(
        self, x: Float[Array, "B T D"], sight: AttentionContext, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None, RoutingStats | None]:
        """The stream after this layer, the cache with its keys and values, and what a router did."""
        c, routing = self.config, None
        inits = make_inits(c)
        attention, dense = Attention(c, inits, local=self.local), FeedForward(c, inits)
        experts = Experts(c, inits) if self.has_experts else None

        def feed_forward(x: Array) -> Array:
            nonlocal routing
            if experts is None:
                return dense(x)
            y, routing = experts(x, decoding=sight.decoding)
            return y + dense(x) if c.experts and c.experts.shared_expert else y

        normed = _enter(Norm(c, name="norm_1")(x))
        mixed, cache = attention(normed, sight, cache)
        mixed = dropout(_leave(mixed), c.dropout)
        match c.residual:
            case "serial":
                x = x + mixed
                if c.encoder is not None:
                    normed = _enter(Norm(c, name="norm_cross")(x))
                    mixed, cache = CrossAttention(c, inits)(normed, sight, cache)
                    x = x + dropout(_leave(mixed), c.dropout)
                x = x + dropout(_leave(feed_forward(_enter(Norm(c, name="norm_2")(x)))), c.dropout)
            case "parallel":  # GPT-J: both read the same norm
                x = x + mixed + dropout(_leave(feed_forward(normed)), c.dropout)
            case "parallel-two-norms":  # GPT-NeoX
                x = x + mixed + dropout(_leave(feed_forward(_enter(Norm(c, name="norm_2")(x)))), c.dropout)
        return constrain(x, "batch", "activation_seq", "activation_embed"), cache, routing


# Where the stream is cut along `tensor` too, it is gathered on its way into products and reduced on its way out. Said
# twice: in one step from partial sums to the finer cut, the partitioner gathers the sequence over `context` as well.
def _enter(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return constrain(
        constrain(x, "batch", "activation_seq", "activation_embed"), "batch", "sequence", "activation_embed"
    )


def _leave(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return constrain(
        constrain(x, "batch", "sequence", "activation_embed"), "batch", "activation_seq", "activation_embed"
    )


class Transformer(hk.Module):
    """Embed, apply the layers, normalise, score every vocabulary entry."""

    def __init__(self, config: ModelConfig, name: str = "transformer"):
        super().__init__(name=name)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segments: Int[Array, "B T"] | None,
        cache: Caches | None,
        logits_at: Int[Array, "B"] | None,
        sources: Int[Array, "B S"] | None = None,
        source_segments: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B U V"], Caches | None]:
        """Logits in float32 (U = T, or 1 with `logits_at`) and the cache, updated."""
        c, inits = self.config, make_inits(self.config)
        x, cache, _ = self.hidden(tokens, positions, segments, cache, sources, source_segments)
        if cache is None:
            x = from_zigzag(x)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        if c.tied_embeddings:
            w_head = param("w_tokens", inits.embedding, vocab=c.n_vocab, embed=c.d_model)
        else:
            w_head = param("w_head", inits.input, embed=c.d_model, vocab=c.n_vocab)
        logits = linear(x, w_head, flipped=c.tied_embeddings, dtype="float32")
        if c.head_bias:
            logits = logits + param("b_head", hk.initializers.Constant(0.0), vocab=c.n_vocab)[None, None]
        return logits, cache

    @hk.experimental.name_like("__call__")  # keeps "~hidden" out of the arrays' names
    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segments: Int[Array, "B T"] | None,
        cache: Caches | None,
        sources: Int[Array, "B S"] | None = None,
        source_segments: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches | None, RoutingStats | None]:
        """What the head scores: the normalised stream, in ring order without a cache; the cache, updated; the routing.

        With an encoder that of both, the encoder's layers first.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if cache is None:
            tokens, positions = to_zigzag(tokens), to_zigzag(positions)
            segments = None if segments is None else to_zigzag(segments)
        sight = self.see(positions, segments, cache)
        memory, read = self.read(sources, source_segments, sight, cache)
        x, cache, routing = self.run_layers(self.embed(tokens, positions), sight._replace(memory=memory), cache)
        if read is not None and routing is not None:
            routing = jax.tree.map(lambda *of: jnp.concatenate(of), read, routing)
        return self.normalise(x), cache, routing

    @hk.experimental.name_like("__call__")
    def read(
        self,
        sources: Int[Array, "B S"] | None,
        segments: Int[Array, "B S"] | None,
        sight: AttentionContext,
        cache: Caches | None,
    ) -> tuple[EncoderOutput | None, RoutingStats | None]:
        """What the encoder makes of `sources`, or that it has read them before into the cache; None without an encoder.

        A token sees those of its own segment; where only one of both sides has segments, the other's are all 1.
        """
        encoder = self.config.encoder
        if encoder is None:
            if sources is not None:
                raise ConfigError(
                    "sources are for a model with an encoder; set model.n_encoder_layers, or leave them out"
                )
            return None, None
        if sources is None and cache is None:
            raise ConfigError(
                f"model.n_encoder_layers={encoder.n_layers}: the encoder has nothing to read; give sources"
            )
        length = cache[0].cross_attention.k.shape[-2] if sources is None else sources.shape[1]  # type: ignore[index]
        visible = jnp.ones((1, sight.positions.shape[1], length), bool)
        if segments is not None or sight.segment_ids is not None:
            own = jnp.ones_like(sight.positions) if sight.segment_ids is None else sight.segment_ids
            there = jnp.ones((own.shape[0], length), jnp.int32) if segments is None else segments
            visible = own[:, :, None] == there[:, None, :]
        if sources is None:
            return EncoderOutput(None, visible), None
        stack = Transformer(encoder, name="encoder")
        positions = jnp.broadcast_to(jnp.arange(length), sources.shape)
        seen = stack.see(positions, segments, None)._replace(sampling=sight.decoding)
        x, _, routing = stack.run_layers(self.embed(sources, positions), seen, None)
        return EncoderOutput(dropout(stack.normalise(x), encoder.dropout), visible), routing

    @hk.experimental.name_like("__call__")
    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The stream before the first layer."""
        c, inits = self.config, make_inits(self.config)
        table = param("w_tokens", inits.embedding, vocab=c.n_vocab, embed=c.d_model)
        x = embed_tokens(table, tokens, c.dtype)
        if c.positions == "learned":
            w_positions = param("w_positions", inits.position, position=c.seq_len, embed=c.d_model)
            x = x + constrain(w_positions, "position", "activation_embed")[positions].astype(c.dtype)
        return constrain(dropout(x, c.dropout), "batch", "activation_seq", "activation_embed")

    @hk.experimental.name_like("__call__")
    def normalise(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The stream after the last layer, as the head reads it: whole along `tensor`, whose devices score other tokens."""
        x = _enter(Norm(self.config, name="norm_out")(x))
        return x * self.config.d_model**-0.5 if self.config.logit_scale == "rsqrt_d_model" else x

    @hk.experimental.name_like("__call__")
    def see(
        self, positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None, cache: Caches | None
    ) -> AttentionContext:
        """Causality is by place in the sequence; with a cache, place and position are the same."""
        c, length, sampling = self.config, positions.shape[1], cache is not None
        if sampling and not c.causal:
            raise ConfigError(
                "model.causal=false: an encoder sees all of a text at once and writes none; use it without a cache"
            )
        kernel = "dense"  # while arrays are made, at no particular length
        if not hk.running_init():
            kernel = choose_kernel(c, length, has_segments=segments is not None, cached=cache is not None)
        if kernel != "dense":
            return AttentionContext(kernel, positions, segments, None, sampling)
        if cache is None:
            query = key = to_zigzag(jnp.arange(length)[None])
        else:
            query, key = positions, jnp.arange(cache[0].k.shape[-2])[None]
        distance = query[:, :, None] - key[:, None, :]
        visible = distance >= 0 if c.causal else jnp.ones_like(distance, bool)
        if segments is not None:
            visible = visible & (segments[:, :, None] == segments[:, None, :])
        near = visible & (jnp.abs(distance) < c.attention_window)
        return AttentionContext(kernel, positions, segments, Masks(visible, near, RelativeBias(c)(distance)), sampling)

    @hk.experimental.name_like("__call__")
    def run_layers(
        self, x: Float[Array, "B T D"], sight: AttentionContext, caches: Caches | None
    ) -> tuple[Float[Array, "B T D"], Caches | None, RoutingStats | None]:
        """All layers, as a scan over periods of the pattern; what routers did, by layer that has one."""
        c, pattern = self.config, self.config.pattern

        def period(x: Array, caches: Caches | None) -> tuple[Array, tuple[Caches | None, list[RoutingStats]]]:
            x, updated, routings = checkpoint_name(x, "residual_stream"), [], []
            for i, (local, has_experts) in enumerate(pattern):
                block = Block(c, local=local, has_experts=has_experts, name=f"block_{i}")
                x, own, routing = block(x, sight, None if caches is None else caches[i])
                updated.append(own)
                routings += [] if routing is None else [routing]
            return x, (None if caches is None else tuple(updated), routings)

        if c.remat in REMAT and caches is None:
            if c.remat == "offload" and target_platform() == "cpu":
                raise ConfigError('model.remat = "offload" needs a GPU or TPU with a host beside it; use "full"')
            period = hk.remat(period, policy=REMAT[c.remat])
        n_periods = c.n_layers // len(pattern)
        stack = hk.experimental.layer_stack(
            n_periods, with_per_layer_inputs=True, unroll=min(c.scan_unroll, n_periods), name=STACK
        )
        x, (caches, routings) = stack(period)(x, caches)
        if not routings:
            return x, caches, None
        by_layer = jax.tree.map(lambda *of: jnp.stack(of, 1).reshape(-1, *of[0].shape[1:]), *routings)
        return x, caches, by_layer


class Head(NamedTuple):
    """What scores the vocabulary."""

    w: Float[Array, "D V"]
    b: Float[Array, "V"] | None


class Model(NamedTuple):
    """A transformer as pure functions."""

    init: Callable[[PRNGKeyArray], Params]
    apply: Callable[..., tuple[Float[Array, "B U V"], Caches | None]]
    hidden: Callable[..., tuple[Float[Array, "B T D"], RoutingStats | None]]


def make_model(config: ModelConfig) -> Model:
    """`init(key) -> params` and `apply(params, tokens, ...) -> logits, cache` for one configuration.

    apply takes tokens [B, T] and, by keyword: `positions` [B, T] (default 0..T-1), `segments` [B, T] (attention stays
    within equal ones), `cache` (keys and values are stored at `positions` and all earlier ones are seen), `logits_at`
    [B] (score only this place of each row), `dropout_key` (in training: for dropout and routers; none: not training).
    With an encoder, `sources` [B, S], which it reads, and `source_segments` [B, S] (as segments; 0 for padding): where
    there is a cache the sources are given once, their segments every time.
    `hidden`, with all of these but cache and logits_at, gives what the head scores (see `head_of`) in ring order, to be
    compared with `to_ring_order(targets)`, and what the routers did.
    """

    def forward(tokens, positions=None, segments=None, cache=None, logits_at=None, sources=None, source_segments=None):
        return Transformer(config)(tokens, positions, segments, cache, logits_at, sources, source_segments)

    def forward_hidden(tokens, positions=None, segments=None, sources=None, source_segments=None):
        x, _, routing = Transformer(config).hidden(tokens, positions, segments, None, sources, source_segments)
        return x, routing

    transformed, transformed_hidden = hk.transform(forward), hk.transform(forward_hidden)

    def init(key: PRNGKeyArray) -> Params:
        one = jnp.zeros((1, 1), jnp.int32)
        sources = {} if config.encoder is None else {"sources": one}
        return transformed.init(key, one, **sources)  # type: ignore[return-value]

    def apply(params: NarrowParams, tokens: Int[Array, "B T"], *, dropout_key: PRNGKeyArray | None = None, **inputs):
        return transformed.apply(params, dropout_key, tokens, **inputs)  # type: ignore[arg-type]

    def hidden(params: Params, tokens: Int[Array, "B T"], *, dropout_key: PRNGKeyArray | None = None, **inputs):
        return transformed_hidden.apply(params, dropout_key, tokens, **inputs)

    return Model(init, apply, hidden)


def head_of(params: Params, config: ModelConfig) -> Head:
    """The weights that `apply` scores with."""
    own = params["transformer"]
    return Head(own["w_tokens"].T if config.tied_embeddings else own["w_head"], own.get("b_head"))


@functools.lru_cache(maxsize=64)  # a trace of the model takes half a second, and half the house asks
def describe_params(config: ModelConfig) -> dict[str, dict[str, ParamInfo]]:
    """Shape and logical axes of every learned array, as {module: {name: info}}; nothing is allocated."""
    return describe(make_model(config).init)


def count_params(config: ModelConfig) -> int:
    """Number of learned values, by abstract evaluation."""
    import math

    return sum(math.prod(info.shape) for arrays in describe_params(config).values() for info in arrays.values())


def init_cache(
    config: ModelConfig, batch_size: int, cache_len: int, dtype: str | None = None, *, source_len: int = 0
) -> Caches:
    """An empty cache for `batch_size` rows of `cache_len` tokens, in `dtype` (default: that of the activations).

    "int8" keeps a float32 scale beside the values of each token and head. With an encoder, which reads `source_len` tokens,
    there is room for its keys and values.
    """
    pattern = config.pattern

    def empty(length: int) -> Array | Quantized:
        shape = (config.n_layers // len(pattern), batch_size, config.kv_heads, length, config.head_dim)
        values = jnp.zeros(shape, dtype or config.dtype)
        return Quantized(values, jnp.zeros((*shape[:-1], 1), jnp.float32)) if dtype == "int8" else values

    def memory() -> KVCache | None:
        return None if config.encoder is None else KVCache(empty(source_len), empty(source_len))

    return tuple(KVCache(empty(cache_len), empty(cache_len), memory()) for _ in pattern)
