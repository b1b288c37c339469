# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of a model with an encoder: read texts, and write the next token of every answer.

The encoder's keys and values are in the cache once they were made, so that a token costs one pass through the decoder.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout, constrain
from mesh_transformer.sample.engine.compiled_model import CompiledModel, constrain_caches
from mesh_transformer.sample.engine.weights import unstack_layers, stack_layers
from mesh_transformer.sample.sampling import Sampled, SamplingOptions, position_keys, sample


class EncoderDecoderState(NamedTuple):
    """Answers that are being written together, as they lie on the devices."""

    caches: Any  # as init_cache, every layer an array [B, K, S, C] of its own, of the encoder's places too
    segments: Int[Array, "B S"]  # of what is read: 1, and 0 for padding
    token: Int[Array, "B"]  # the last one, not in the cache yet
    place: Int[Array, ""]  # of `token` in every answer
    counts: Int[Array, "B V"]  # how often each token was drawn
    options: SamplingOptions
    keys: Key[Array, "B"]


class EncoderDecoderPrograms(CompiledModel):
    """What RewritingEngine calls: jitted functions of one model, its weights bound."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        layout: MeshLayout | None,
        *,
        weights: str = "saved",
        cache: str = "model",
    ):
        """See Engine; of weights given as shapes, programs can only be lowered."""
        if config.encoder is None:
            raise ConfigError("model.n_encoder_layers is not set: a decoder alone continues prompts with Engine")
        super().__init__(config, params, layout, weights=weights, cache=cache)
        self.begin = self._program("begin", self.empty_writing, static_argnums=(3, 4))
        self._read = self._program("read", self._draw, donate_argnums=(1,))
        self._write = self._program("write", self._draw, donate_argnums=(1,))

    def read(self, writing: EncoderDecoderState, sources: Int[Array, "B S"]) -> tuple[EncoderDecoderState, Sampled]:
        """The first token of every row, once the encoder has read `sources`; the `writing` that goes in is gone."""
        return self._read(self.weights, writing, sources)

    def write(self, writing: EncoderDecoderState) -> tuple[EncoderDecoderState, Sampled]:
        """The next token of every row; the `writing` that goes in is gone."""
        return self._write(self.weights, writing)

    def lower_read(self, writing: EncoderDecoderState, sources: Any) -> Any:
        """The program of `read` for arguments given as shapes, lowered and not compiled; weights may be shapes as well."""
        return self._read.lower(self.weights, writing, sources)

    def lower_write(self, writing: EncoderDecoderState) -> Any:
        """The program of `write`, as lower_read."""
        return self._write.lower(self.weights, writing)

    def place(self, rows: Any) -> Int[Array, "B S"]:
        """`rows` of the host on the devices, cut along the batch."""
        axes, array = ("batch", "activation_embed"), jnp.asarray(rows)
        return array if not self.layout else jax.device_put(array, self.layout.sharding(axes, array.shape, "sources"))

    def empty_writing(
        self, segments: Int[Array, "B S"], options: SamplingOptions, keys: Key[Array, "B"], start: int, room: int
    ) -> EncoderDecoderState:
        """Answers of at most `room` tokens behind `start`, of which nothing is written and whose texts are not read."""
        rows, source_len = segments.shape
        token, place = jnp.full((rows,), start, jnp.int32), jnp.int32(0)
        counts = jnp.zeros((rows, self.config.n_vocab), jnp.int32)
        caches = self._empty_caches(rows, room, source_len)
        return _constrain(EncoderDecoderState(caches, segments, token, place, counts, options, keys))

    def _draw(self, params: Any, writing: EncoderDecoderState, sources: Int[Array, "B S"] | None = None) -> tuple[EncoderDecoderState, Sampled]:
        token, places = writing.token, jnp.broadcast_to(writing.place, writing.token.shape)
        logits, caches = self._model.apply(
            stack_layers(params),
            token[:, None],
            positions=places[:, None],
            cache=stack_layers(writing.caches),
            sources=sources,
            source_segments=writing.segments,
        )
        logits = constrain(logits, "batch", "sequence", "activation_embed")
        drawn = sample(logits[:, 0], writing.options, writing.counts, position_keys(writing.keys, places))
        written = writing._replace(
            caches=unstack_layers(caches),
            token=drawn.token,
            place=writing.place + 1,
            counts=writing.counts.at[jnp.arange(token.size), drawn.token].add(1),
        )
        return _constrain(written), drawn


def _constrain(writing: EncoderDecoderState) -> EncoderDecoderState:
    caches = constrain_caches(writing.caches)
    rows = jax.tree.map(
        lambda x: constrain(x, *("batch", "activation_embed")[: x.ndim]),
        writing._replace(caches=None),
    )
    return rows._replace(caches=caches)
