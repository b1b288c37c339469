# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What each query may see, the cache of keys and values it may see them in, and the kernel that looks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mesh_transformer.model.quantization import Quantized, quantize, dequantize


class KVCache(NamedTuple):
    """Keys and values of one layer, or of a stack of them; the place of a token in the cache is its position.

    Heads come before places, so that the keys of a head are one matrix and attention's products read them as they lie.
    """

    k: Float[Array, "*L B K S C"] | Quantized
    v: Float[Array, "*L B K S C"] | Quantized
    cross_attention: Any = None  # of a layer that attends to an encoder: a Cache of the encoder's places


class Masks(NamedTuple):
    """Every pair of query and key, for the kernel that forms all scores at once."""

    full: Bool[Array, "#B T S"]  # on global layers
    windowed: Bool[Array, "#B T S"]  # on local layers: visible, and within the window
    bias: Float[Array, "#B H T S"] | None  # added to scores


class EncoderOutput(NamedTuple):
    """What an encoder read, for the layers of its decoder."""

    hidden_states: Float[Array, "B S D"] | None  # None: its keys and values are in the cache
    mask: Bool[Array, "#B T S"]  # which of its places each query sees


class AttentionContext(NamedTuple):
    """What is the same for all layers."""

    kernel: str  # of model.attention_kernel, "auto" resolved
    positions: Int[Array, "B T"]  # for rotary embeddings
    segment_ids: Int[Array, "B T"] | None  # attention stays within equal ones
    masks: Masks | None  # for the kernel "dense"; the others find out block by block
    decoding: bool = False  # a text is being read or written: experts take every token
    encoder_output: EncoderOutput | None = None  # of a decoder that has an encoder


def write_kv(cache: KVCache, k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], positions: Int[Array, "B T"]) -> KVCache:
    """One layer's cache with keys and values written at `positions`; places outside the cache are dropped."""
    if positions.size == 1:
        # XLA turns a scatter of one update into a slice update and fuses that into both its readers, which copies the
        # whole cache four times a layer; writing the same values twice keeps it a scatter in place.
        k, v, positions = jnp.tile(k, (1, 2, 1, 1)), jnp.tile(v, (1, 2, 1, 1)), jnp.tile(positions, (1, 2))
    rows = jnp.arange(k.shape[0])[:, None]

    def put(kept: Any, new: Any) -> Any:
        if isinstance(kept, Quantized):
            new = quantize(new, (-1,))
        return jax.tree.map(lambda x, y: x.at[rows, :, positions].set(y.astype(x.dtype)), kept, new)

    return cache._replace(k=put(cache.k, k), v=put(cache.v, v))


def read_kv(cache: KVCache, dtype: Any) -> tuple[Float[Array, "B S K C"], Float[Array, "B S K C"]]:
    """One layer's keys and values in the type and order that attention takes."""
    return dequantize(cache.k, dtype).swapaxes(1, 2), dequantize(cache.v, dtype).swapaxes(1, 2)
