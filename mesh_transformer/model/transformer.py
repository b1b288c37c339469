# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The forward pass from tokens to logits, used by training, prefill and decoding, and by encoders."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.config.layers import LayerKind, LayerStack
from mesh_transformer.mesh import constrain, target_platform
from mesh_transformer.model.attention.kernels import choose_kernel
from mesh_transformer.model.attention.kv_cache import KVCache
from mesh_transformer.model.attention.latent import LatentAttention
from mesh_transformer.model.attention.layer import Attention, CrossAttention
from mesh_transformer.model.attention.masks import AttentionContext, EncoderOutput, make_masks, segment_mask
from mesh_transformer.model.attention.ring import from_zigzag, to_zigzag
from mesh_transformer.model.embedding import default_positions, embed_tokens, position_rows
from mesh_transformer.model.encoder_heads import Classifier, Encoding, MaskedLMTransform, Pooler
from mesh_transformer.model.feed_forward import FeedForward
from mesh_transformer.model.formulas import Branches, apply_branches, input_embeddings, scale_hidden_states
from mesh_transformer.model.linear import dropout, linear
from mesh_transformer.model.lm_head import LMHead, lm_logits
from mesh_transformer.model.moe.layer import MoELayer
from mesh_transformer.model.moe.router import RoutingStats
from mesh_transformer.model.norms import Norm
from mesh_transformer.model.params import Params, describe_repeat, describing, make_inits, param
from mesh_transformer.model.positions import RelativeBias, t5_buckets
from mesh_transformer.model.quantization import Quantized

InferenceParams = Mapping[str, Mapping[str, Array | Quantized]]  # like Params; some arrays may be quantized
# One KVCache per block of the pattern of each layer stack, stacked over the iterations of its scan.
KVCaches = tuple[KVCache, ...]
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
    """One layer: self-attention, cross-attention to an encoder, and feed-forward, with residual connections."""

    def __init__(self, config: ModelConfig, kind: LayerKind, name: str):
        super().__init__(name=name)
        self.config = config
        self.kind = kind

    def __call__(
        self, x: Float[Array, "B T D"], context: AttentionContext, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None, RoutingStats | None]:
        """Return the residual stream after this layer, the updated cache, and the router's statistics."""
        c = self.config
        inits = make_inits(c)
        routing: RoutingStats | None = None
        attention_class = Attention if c.latent_attention is None else LatentAttention
        self_attention = attention_class(c, inits, self.kind)
        dense = FeedForward(c, inits, shared=self.kind.has_experts)
        experts = MoELayer(c, inits) if self.kind.has_experts else None

        def norm(name: str, x: Array) -> Array:
            return gather_sequence(Norm(c, name=name)(x))

        def attention(x: Array) -> Array:
            nonlocal cache
            x = gather_sequence(x) if c.residual == "reordered-norm" else x  # otherwise `norm` has gathered it
            y, cache = self_attention(x, context, cache)
            return dropout(scatter_sequence(y), c.dropout)

        def cross_attention(x: Array) -> Array:
            nonlocal cache
            y, cache = CrossAttention(c, inits)(x, context, cache)
            return dropout(scatter_sequence(y), c.dropout)

        def feed_forward(x: Array) -> Array:
            nonlocal routing
            x = gather_sequence(x) if c.residual == "reordered-norm" else x
            if experts is None:
                y = dense(x)
            else:
                y, routing = experts(x, training=context.training, decoding=context.decoding)
                y = y + dense(x) if c.experts and c.experts.shared_expert else y
            return dropout(scatter_sequence(y), c.dropout)

        branches = Branches(norm, attention, feed_forward, None if c.encoder is None else cross_attention)
        x = apply_branches(x, branches, c)
        return constrain(x, "batch", "activation_seq", "activation_embed"), cache, routing


# With sequence parallelism the residual stream is sharded along `tensor` too: it is gathered before the matmuls of a layer
# and reduce-scattered after them. Each function applies two constraints: with only the constraint of the finer sharding
# on partial sums, XLA would gather the sequence over `context` as well.
def gather_sequence(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return `x` with the sharding used inside a layer: the sequence is sharded over the mesh axes of "sequence" only."""
    x = constrain(x, "batch", "activation_seq", "activation_embed")
    return constrain(x, "batch", "sequence", "activation_embed")


def scatter_sequence(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return `x` with the sharding of the residual stream between layers."""
    x = constrain(x, "batch", "sequence", "activation_embed")
    return constrain(x, "batch", "activation_seq", "activation_embed")


class Transformer(hk.Module):
    """Token embeddings, the layers, the final norm, and the language-model head."""

    def __init__(self, config: ModelConfig, name: str = "transformer"):
        super().__init__(name=name)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCaches | None = None,
        logits_at: Int[Array, "B"] | None = None,
        **inputs: Any,
    ) -> tuple[Float[Array, "B U V"], KVCaches | None]:
        """Return float32 logits (U = T, or 1 with `logits_at`) and the updated cache. See `make_model`."""
        if self.config.head == "none":
            raise ConfigError('model.head="none" has no vocabulary logits; use Model.encode')
        x, cache, _ = self.hidden_states(tokens, positions, segment_ids, cache, **inputs)
        if cache is None:
            x = from_zigzag(x)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        return lm_logits(x, self._lm_head(), self.config), cache

    @hk.experimental.name_like("__call__")  # keeps the method's name out of the parameter names
    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCaches | None = None,
        **inputs: Any,
    ) -> tuple[Float[Array, "B T E"], KVCaches | None, RoutingStats | None]:
        """Return the input of the head, the updated cache, and routing statistics (the encoder's layers first).

        Without a cache, the hidden states are in zigzag order.
        """
        x, cache, routing = self.run(tokens, positions, segment_ids, cache, **inputs)
        return self.head_input(x), cache, routing

    @hk.experimental.name_like("__call__")
    def encoding(self, tokens: Int[Array, "B T"], **inputs: Any) -> Encoding:
        """Return the hidden states after the last layer in natural order, with the outputs of pooler and classifier."""
        x, _, _ = self.run(tokens, **inputs)
        return self.pool(from_zigzag(self.final_norm(x)))

    @hk.experimental.name_like("__call__")
    def pool(self, x: Float[Array, "B T D"]) -> Encoding:
        """Return hidden states with the outputs of the pooler and the classifier, which read the first token."""
        c = self.config
        inits = make_inits(c)
        pooled = Pooler(c, inits)(x[:, 0]) if c.pooler else None
        return Encoding(x, pooled, None if pooled is None or c.n_labels is None else Classifier(c, inits)(pooled))

    @hk.experimental.name_like("__call__")
    def run(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCaches | None = None,
        *,
        encoder_tokens: Int[Array, "B S"] | None = None,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        training: bool = False,
        reached_len: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCaches | None, RoutingStats | None]:
        """Return the residual stream after the last layer, the updated cache, and routing statistics; see `hidden_states`."""
        if positions is None:
            positions = default_positions(tokens, self.config)
        if cache is None:
            token_types = None if token_types is None else to_zigzag(token_types)
            tokens = to_zigzag(tokens)
            positions = to_zigzag(positions)
            segment_ids = None if segment_ids is None else to_zigzag(segment_ids)
        context = self.attention_context(positions, segment_ids, cache, training=training)
        context = context._replace(reached_len=reached_len)
        encoder_output, encoder_routing = self.encode(encoder_tokens, encoder_segment_ids, context, cache)
        x = self.embed(tokens, positions, token_types)
        x, cache, routing = self.run_layers(x, context._replace(encoder_output=encoder_output), cache)
        if encoder_routing is not None and routing is not None:
            routing = jax.tree.map(lambda *stats: jnp.concatenate(stats), encoder_routing, routing)
        return x, cache, routing

    @hk.experimental.name_like("__call__")
    def encode(
        self,
        tokens: Int[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        context: AttentionContext,
        cache: KVCaches | None,
    ) -> tuple[EncoderOutput | None, RoutingStats | None]:
        """Return the encoder output, and the routing statistics of its layers; None without an encoder.

        Without `tokens`, the keys and values of an earlier call are read from `cache`. Decoder tokens attend to encoder
        tokens with the same segment ID. If only one side has segment IDs, the segment IDs of the other side are 1.
        """
        encoder = self.config.encoder
        if encoder is None:
            if tokens is not None:
                raise ConfigError(
                    "encoder_tokens were given, but model.n_encoder_layers is not set; set it, or omit encoder_tokens"
                )
            return None, None
        if tokens is None and cache is None:
            raise ConfigError(
                f"model.n_encoder_layers={encoder.n_layers}: an encoder-decoder model needs encoder_tokens; pass the input tokens"
            )
        length = cache[0].cross_attention.k.shape[-2] if tokens is None else tokens.shape[1]  # type: ignore[index]
        mask = jnp.ones((1, context.positions.shape[1], length), bool)
        if segment_ids is not None or context.segment_ids is not None:
            query_ids = jnp.ones_like(context.positions) if context.segment_ids is None else context.segment_ids
            key_ids = jnp.ones((query_ids.shape[0], length), jnp.int32) if segment_ids is None else segment_ids
            mask = segment_mask(query_ids, key_ids)
        if tokens is None:
            return EncoderOutput(None, mask), None
        stack = Transformer(encoder, name="encoder")
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        encoder_context = stack.attention_context(positions, segment_ids, None, training=context.training)
        encoder_context = encoder_context._replace(decoding=context.decoding)
        x, _, routing = stack.run_layers(self.embed(tokens, positions), encoder_context, None)
        output = scale_hidden_states(stack.final_norm(x), encoder)
        return EncoderOutput(dropout(output, encoder.dropout), mask), routing

    @hk.experimental.name_like("__call__")
    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], token_types: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Return the residual stream before the first layer. Token types are 0 unless they are given."""
        c = self.config
        inits = make_inits(c)
        w_tokens = param("w_tokens", inits.embedding, vocab=c.n_vocab, embed=c.token_embedding_dim)
        x = embed_tokens(w_tokens, tokens, c.dtype)
        learned = None
        if c.positions == "learned":
            w_positions = param(
                "w_positions", inits.position, position=c.seq_len + c.position_offset, embed=c.embedding_dim
            )
            rows = position_rows(positions, tokens, c)
            learned = constrain(w_positions, "position", "activation_embed")[rows].astype(c.dtype)
        return self.combine_embeddings(x, learned, token_types)

    @hk.experimental.name_like("__call__")
    def combine_embeddings(
        self,
        tokens: Float[Array, "B T F"],
        positions: Float[Array, "*B T E"] | None,
        token_types: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Return the residual stream before the first layer, given the embeddings of tokens and learned positions.

        F is `token_embedding_dim` of the config and E is `embedding_dim`; F = E unless `d_token_embedding` is set.
        """
        c = self.config
        if c.d_token_embedding is not None:
            w = param("w_project_in", make_inits(c).input, embedding=c.d_token_embedding, embed=c.d_model)
            tokens = linear(tokens, w)
        x = input_embeddings(tokens, positions, c)
        if c.n_token_types is not None:
            w = param("w_token_types", make_inits(c).embedding, token_type=c.n_token_types, embed=c.embedding_dim)
            w = constrain(w, "token_type", "activation_embed")
            x = x + w[jnp.zeros(x.shape[:2], jnp.int32) if token_types is None else token_types].astype(c.dtype)
        elif token_types is not None:
            raise ConfigError("token_types were given, but model.n_token_types is not set; set it, or omit token_types")
        if c.embedding_norm:
            x = Norm(c, name="norm_embedding", dim=c.embedding_dim)(x)
        x = dropout(x, c.dropout)
        if c.d_embedding is not None:
            w = param("w_embedding", make_inits(c).input, embedding=c.d_embedding, embed=c.d_model)
            x = linear(x, w, param("b_embedding", hk.initializers.Constant(0.0), embed=c.d_model))
        return constrain(x, "batch", "activation_seq", "activation_embed")

    @hk.experimental.name_like("__call__")
    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normalized hidden states, gathered along `tensor`, because the vocabulary is sharded over it."""
        return gather_sequence(x if self.config.residual == "post-norm" else Norm(self.config, name="norm_out")(x))

    @hk.experimental.name_like("__call__")
    def head_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Return the input of the head's matmul, given the residual stream after the last layer."""
        x = self.final_norm(x)
        if self.config.head == "masked-lm":
            x = MaskedLMTransform(self.config, make_inits(self.config))(x)
        if (size := self.config.d_token_embedding) is not None:
            inits = make_inits(self.config)
            x = linear(x, param("w_project_out", inits.input, embed=self.config.d_model, embedding=size))
        return scale_hidden_states(x, self.config)

    @hk.experimental.name_like("__call__")
    def attention_context(
        self,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        cache: KVCaches | None,
        *,
        training: bool = False,
    ) -> AttentionContext:
        """Return the context of this stack's layers, without an encoder output.

        In a causal model, a query attends to keys up to its index in the sequence; with a cache, up to its position.
        """
        c = self.config
        length = positions.shape[1]
        decoding = cache is not None
        if decoding and not c.causal:
            raise ConfigError("model.causal=false: an encoder-only model cannot decode; call it without a cache")
        kernel = "dense"  # during initialization, where the length is arbitrary
        if not hk.running_init():
            kernel = choose_kernel(c, length, has_segments=segment_ids is not None, cached=cache is not None)
        if kernel != "dense":
            return AttentionContext(kernel, positions, segment_ids, None, decoding, training)
        if cache is None:
            # Broadcast to all sequences before the reordering, because a batch of one cannot be sharded.
            query = key = to_zigzag(jnp.broadcast_to(jnp.arange(length), positions.shape))[:1]
            key_positions = positions
        else:
            query = positions
            key = key_positions = jnp.arange(cache[0].k.shape[-2])[None]
        distance = query[:, :, None] - key[:, None, :]
        bias = RelativeBias(c)(distance, key_positions)
        masks = make_masks(distance, segment_ids, bias, causal=c.causal, window=c.attention_window)
        if not c.t5_shared_bias:
            masks = masks._replace(buckets=t5_buckets(distance, c))
        return AttentionContext(kernel, positions, segment_ids, masks, decoding, training)

    @hk.experimental.name_like("__call__")
    def run_layers(
        self, x: Float[Array, "B T D"], context: AttentionContext, caches: KVCaches | None
    ) -> tuple[Float[Array, "B T D"], KVCaches | None, RoutingStats | None]:
        """Run all layers, each stack as a scan over repetitions of its pattern.

        Return the residual stream, the updated caches, and the routing statistics [n_moe_layers, ...].
        """
        c = self.config
        routings: list[RoutingStats] = []
        updated: list[KVCache] = []
        for stack in c.layer_stacks:
            stack_caches = None if caches is None else caches[len(updated) : len(updated) + len(stack.pattern)]
            x, stack_caches, stats = self.run_stack(x, context, stack_caches, stack)
            updated += stack_caches or ()
            routings += stats
        routing = jax.tree.map(lambda *stats: jnp.concatenate(stats), *routings) if routings else None
        return x, None if caches is None else tuple(updated), routing

    @hk.experimental.name_like("__call__")
    def run_stack(
        self, x: Float[Array, "B T D"], context: AttentionContext, caches: KVCaches | None, layers: LayerStack
    ) -> tuple[Float[Array, "B T D"], KVCaches | None, list[RoutingStats]]:
        """Run one stack of layers as a scan. The list of routing statistics is empty for a stack without experts."""
        c = self.config

        n_stored = 1 if c.shared_layers else layers.n_repeats

        def make_pattern() -> Callable[..., tuple[Array, tuple[KVCaches | None, list[RoutingStats]]]]:
            blocks = [Block(c, kind, name=f"block_{i}") for i, kind in enumerate(layers.pattern)]

            def run_pattern(x: Array, caches: KVCaches | None) -> tuple[Array, tuple]:
                x = checkpoint_name(x, "residual_stream")
                updated = []
                routings = []
                for i, block in enumerate(blocks):
                    x, cache, routing = block(x, context, None if caches is None else caches[i])
                    updated.append(cache)
                    routings += [] if routing is None else [routing]
                return x, (None if caches is None else tuple(updated), routings)

            if c.remat not in REMAT or caches is not None:
                return run_pattern
            return hk.remat(run_pattern, policy=REMAT[c.remat])

        def run_repeat(x: Array, caches: KVCaches | None) -> tuple[Array, tuple[KVCaches | None, list[RoutingStats]]]:
            run_pattern = make_pattern()
            if not c.shared_layers:
                return run_pattern(x, caches)
            x, _ = hk.scan(lambda x, _: (run_pattern(x, None)[0], None), x, None, length=layers.n_repeats)
            return x, (None, [])

        if c.remat == "offload" and caches is None and target_platform() == "cpu":
            raise ConfigError(
                'model.remat = "offload" needs a GPU or TPU with separate host memory; on a CPU use "full"'
            )
        if describing():
            with describe_repeat(layers.name, n_stored):
                return run_repeat(x, caches)[0], caches, []
        stack = hk.experimental.layer_stack(
            n_stored, with_per_layer_inputs=True, unroll=min(c.scan_unroll, n_stored), name=layers.name
        )
        x, (caches, routings) = stack(run_repeat)(x, caches)
        if not routings:
            return x, caches, []
        # From [n_repeats, ...] for each layer of the pattern to [n_moe_layers, ...] in the order of the layers.
        routing = jax.tree.map(lambda *stats: jnp.stack(stats, 1).reshape(-1, *stats[0].shape[1:]), *routings)
        return x, caches, [routing]

    @hk.experimental.name_like("__call__")
    def _lm_head(self) -> LMHead:
        c = self.config
        inits = make_inits(c)
        if c.tied_embeddings:
            w = param("w_tokens", inits.embedding, vocab=c.n_vocab, embed=c.token_embedding_dim)
        else:
            w = param("w_head", inits.input, embed=c.token_embedding_dim, vocab=c.n_vocab)
        b = param("b_head", hk.initializers.Constant(0.0), vocab=c.n_vocab) if c.head_bias else None
        return LMHead(w, b)


class Model(NamedTuple):
    """A transformer as pure functions. See `make_model`."""

    init: Callable[[PRNGKeyArray], Params]
    apply: Callable[..., tuple[Float[Array, "B U V"], KVCaches | None]]
    hidden_states: Callable[..., tuple[Float[Array, "B T E"], RoutingStats | None]]
    encode: Callable[..., Encoding]


def make_model(config: ModelConfig) -> Model:
    """Return `init(key) -> params`, `apply(params, tokens, ...) -> (logits, cache)`, `hidden_states` and `encode`.

    `apply` takes tokens [B, T] and these keyword arguments:

    positions [B, T]            default: 0 ... T-1
    segment_ids [B, T]          a token attends only to tokens with the same segment ID
    cache                       keys and values are written at `positions`; tokens attend to all earlier positions
    logits_at [B]               index of the only token of each sequence whose logits are returned
    reached_len [B]             length of each sequence, if not its largest position + 1 (see `make_rotation`)
    encoder_tokens [B, S]       input of the encoder; with a cache, in the first call only
    encoder_segment_ids [B, S]  like `segment_ids`, 0 for padding; with a cache, in every call
    token_types [B, T]          with model.n_token_types; default: 0
    training                    experts use their training capacity, jitter and dropout
    dropout_key                 random key of dropout and router jitter; default: neither is applied

    `hidden_states(params, tokens, ...)` takes the same arguments except `cache` and `logits_at`. It returns the input of the
    head in zigzag order, to be compared with `to_zigzag(targets)`, and the routing statistics.

    `encode(params, tokens, ...)` takes the arguments of `hidden_states`. It returns the hidden states after the last layer
    in natural order, before the head, with the outputs of the pooler and the classifier.
    """

    def forward(tokens, positions=None, segment_ids=None, cache=None, logits_at=None, **inputs):
        return Transformer(config)(tokens, positions, segment_ids, cache, logits_at, **inputs)

    def forward_hidden(tokens, positions=None, segment_ids=None, **inputs):
        x, _, routing = Transformer(config).hidden_states(tokens, positions, segment_ids, None, **inputs)
        return x, routing

    def forward_encoding(tokens, positions=None, segment_ids=None, **inputs):
        return Transformer(config).encoding(tokens, positions=positions, segment_ids=segment_ids, **inputs)

    def forward_init(tokens, **inputs):
        transformer = Transformer(config)
        if config.head != "none":
            transformer(tokens, **inputs)
        if config.head == "none" or config.pooler:
            transformer.encoding(tokens, **inputs)

    transformed = hk.transform(forward)
    transformed_init = hk.transform(forward_init)
    transformed_encoding = hk.transform(forward_encoding)
    transformed_hidden = hk.transform(forward_hidden)

    def init(key: PRNGKeyArray) -> Params:
        one_token = jnp.zeros((1, 1), jnp.int32)
        inputs = {} if config.encoder is None else {"encoder_tokens": one_token}
        return transformed_init.init(key, one_token, **inputs)  # type: ignore[return-value]

    def apply(params: InferenceParams, tokens: Int[Array, "B T"], *, dropout_key: PRNGKeyArray | None = None, **inputs):
        return transformed.apply(params, dropout_key, tokens, **inputs)  # type: ignore[arg-type]

    def hidden_states(params: Params, tokens: Int[Array, "B T"], *, dropout_key: PRNGKeyArray | None = None, **inputs):
        return transformed_hidden.apply(params, dropout_key, tokens, **inputs)

    def encode(params: Params, tokens: Int[Array, "B T"], *, dropout_key: PRNGKeyArray | None = None, **inputs):
        return transformed_encoding.apply(params, dropout_key, tokens, **inputs)

    return Model(init, apply, hidden_states, encode)
