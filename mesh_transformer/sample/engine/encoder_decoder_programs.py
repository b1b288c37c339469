# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compiled programs of encoder-decoder models: encoding of prompts, and decoding of the next token of every output.

The encoder's keys and values are cached, so that a token costs one pass through the decoder.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout, constrain
from mesh_transformer.sample.engine.programs import CompiledModel, constrain_caches
from mesh_transformer.sample.engine.weights import stack_layers, unstack_layers
from mesh_transformer.sample.sampling import Sampled, SamplingOptions, position_keys, sample


class EncoderDecoderState(NamedTuple):
    """On-device state of a batch of outputs."""

    caches: Any  # from init_cache, but with a separate array [B, K, S, C] for every layer; includes cross-attention
    segment_ids: Int[Array, "B S"]  # of the encoder's input: 1 for tokens, 0 for padding
    token: Int[Array, "B"]  # last sampled token, not in the KV cache yet
    position: Int[Array, ""]  # position of `token`, the same in every output
    counts: Int[Array, "B V"]  # how often each token was generated
    options: SamplingOptions
    keys: Key[Array, "B"]


class EncoderDecoderPrograms(CompiledModel):
    """Programs of an encoder-decoder model, which donate the states passed to them."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        layout: MeshLayout | None,
        *,
        weight_dtype: str = "saved",
        kv_cache_dtype: str = "model",
    ):
        """See CompiledModel."""
        if config.encoder is None:
            raise ConfigError(
                "model.n_encoder_layers is not set, and EncoderDecoderEngine requires it; use DecoderOnlyEngine for this model"
            )
        super().__init__(config, params, layout, weight_dtype=weight_dtype, kv_cache_dtype=kv_cache_dtype)
        self.make_state = self._program("make_state", self.empty_state, static_argnums=(3, 4))
        self._encode_program = self._program("encode", self._step, donate_argnums=(1,))
        self._decode_program = self._program("decode", self._step, donate_argnums=(1,))

    def encode(
        self, state: EncoderDecoderState, encoder_tokens: Int[Array, "B S"]
    ) -> tuple[EncoderDecoderState, Sampled]:
        """Run the encoder on `encoder_tokens` and sample the first token of every output."""
        return self._encode_program(self.weights, state, encoder_tokens)

    def decode(self, state: EncoderDecoderState) -> tuple[EncoderDecoderState, Sampled]:
        """Sample the next token of every output."""
        return self._decode_program(self.weights, state)

    def lower_encode(self, state: EncoderDecoderState, encoder_tokens: Any) -> Any:
        """Lower the program of `encode` for arguments given as shapes, without compiling it."""
        return self._encode_program.lower(self.weights, state, encoder_tokens)

    def lower_decode(self, state: EncoderDecoderState) -> Any:
        """Lower the program of `decode` for a state given as shapes, without compiling it."""
        return self._decode_program.lower(self.weights, state)

    def shard_batch(self, values: Any) -> Int[Array, "B S"]:
        """Return host values [B, S] on the devices, sharded over the batch."""
        array = jnp.asarray(values)
        if not self.layout:
            return array
        sharding = self.layout.sharding(("batch", "activation_embed"), array.shape, "encoder tokens")
        return jax.device_put(array, sharding)

    def empty_state(
        self,
        segment_ids: Int[Array, "B S"],
        options: SamplingOptions,
        keys: Key[Array, "B"],
        start: int,
        cache_len: int,
    ) -> EncoderDecoderState:
        """Return the state before the encoder runs; outputs begin with token `start` and have up to `cache_len` tokens."""
        batch_size, encoder_len = segment_ids.shape
        token = jnp.full((batch_size,), start, jnp.int32)
        counts = jnp.zeros((batch_size, self.config.n_vocab), jnp.int32)
        caches = self._empty_caches(batch_size, cache_len, encoder_len)
        return _constrain(EncoderDecoderState(caches, segment_ids, token, jnp.int32(0), counts, options, keys))

    def _step(
        self, weights: Any, state: EncoderDecoderState, encoder_tokens: Int[Array, "B S"] | None = None
    ) -> tuple[EncoderDecoderState, Sampled]:
        token = state.token
        positions = jnp.broadcast_to(state.position, token.shape)
        logits, caches = self._model.apply(
            stack_layers(weights),
            token[:, None],
            positions=positions[:, None],
            cache=stack_layers(state.caches),
            encoder_tokens=encoder_tokens,
            encoder_segment_ids=state.segment_ids,
        )
        logits = constrain(logits, "batch", "sequence", "activation_embed")
        sampled = sample(logits[:, 0], state.options, state.counts, position_keys(state.keys, positions))
        updated = state._replace(
            caches=unstack_layers(caches),
            token=sampled.token,
            position=state.position + 1,
            counts=state.counts.at[jnp.arange(token.size), sampled.token].add(1),
        )
        return _constrain(updated), sampled


def _constrain(state: EncoderDecoderState) -> EncoderDecoderState:
    caches = constrain_caches(state.caches)
    others = jax.tree.map(
        lambda x: constrain(x, *("batch", "activation_embed")[: x.ndim]),
        state._replace(caches=None),
    )
    return others._replace(caches=caches)
