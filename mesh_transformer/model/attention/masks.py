# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention masks, and the inputs of attention that all layers of a stack share."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Masks(NamedTuple):
    """Masks and bias of every query-key pair, for the dense kernel."""

    full: Bool[Array, "#B T S"]  # for global layers: True where the query attends to the key
    windowed: Bool[Array, "#B T S"]  # for local layers: `full` and within the attention window
    bias: Float[Array, "#B H T S"] | None  # added to the scores
    # bucket of the distance, if each layer has its own table of the T5 bias; `bias` is then None until a layer sets it
    buckets: Int[Array, "#B T S"] | None = None


class EncoderOutput(NamedTuple):
    """Encoder output that the decoder's cross-attention reads."""

    hidden_states: Float[Array, "B S D"] | None  # None: the keys and values are already in the cache
    mask: Bool[Array, "#B T S"]  # True where the query attends to the encoder position


class AttentionContext(NamedTuple):
    """Inputs of attention that are the same for all layers, and the mode of the forward pass."""

    kernel: str  # a value of model.attention_kernel other than "auto"
    positions: Int[Array, "B T"]  # for rotary embeddings and the KV cache
    segment_ids: Int[Array, "B T"] | None  # a query attends only to keys with the same ID
    masks: Masks | None  # for the "dense" kernel; other kernels compute the mask block by block
    decoding: bool = False  # prefill or decode with a KV cache: experts have no capacity limit
    training: bool = False  # experts use their training capacity, jitter and dropout
    # length of each sequence, which determines longrope frequencies (see `make_rotation`); None: largest position + 1
    reached_len: Int[Array, "B"] | None = None
    encoder_output: EncoderOutput | None = None  # for the decoder of an encoder-decoder model


def make_masks(
    distance: Int[Array, "#B T S"],
    segment_ids: Int[Array, "B T"] | None,
    bias: Float[Array, "#B H T S"] | None,
    *,
    causal: bool,
    window: int,
) -> Masks:
    """Return the masks, given `distance` = query position - key position of each pair."""
    full = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if segment_ids is not None:
        full = full & segment_mask(segment_ids, segment_ids)
    return Masks(full, full & (jnp.abs(distance) < window), bias)


def segment_mask(query_ids: Int[Array, "B T"], key_ids: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Return True where the query and the key have the same segment ID."""
    return query_ids[:, :, None] == key_ids[:, None, :]
