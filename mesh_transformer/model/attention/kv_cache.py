# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The KV cache: keys and values of earlier tokens, indexed by position."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mesh_transformer.model.quantization import Quantized, dequantize, quantize


class KVCache(NamedTuple):
    """Keys and values of one layer, or of a stack of layers. A token's index in the cache is its position.

    With latent attention, "keys" are latent vectors, "values" are the rotated channels of keys, and there is one head.
    The head dimension comes before the positions, so that the keys of each head form one contiguous matrix and the
    attention matmuls need no transpose.
    """

    k: Float[Array, "*L B K S C"] | Quantized
    v: Float[Array, "*L B K S V"] | Quantized
    cross_attention: Any = None  # the KVCache of the encoder's positions, in the decoder of an encoder-decoder model


def cache_axes(n_heads: int) -> tuple[str, str, str, str]:
    """Return the logical axes of one layer's keys or values [B, K, S, C]. A single head is not sharded."""
    return "batch", "replicated" if n_heads == 1 else "kv_heads", "position", "head_dim"


def write_kv(
    cache: KVCache, k: Float[Array, "B T K C"], v: Float[Array, "B T K V"], positions: Int[Array, "B T"]
) -> KVCache:
    """Return one layer's cache with `k` and `v` written at `positions`; tokens outside the cache are dropped."""
    if positions.size == 1:
        # XLA turns a scatter of a single update into a slice update and fuses it into both consumers, which copies the
        # whole cache four times per layer. Writing the same values twice keeps an in-place scatter.
        k = jnp.tile(k, (1, 2, 1, 1))
        v = jnp.tile(v, (1, 2, 1, 1))
        positions = jnp.tile(positions, (1, 2))
    batch_index = jnp.arange(k.shape[0])[:, None]

    def write(cached: Any, new: Any) -> Any:
        if isinstance(cached, Quantized):
            new = quantize(new, (-1,))
        return jax.tree.map(lambda x, y: x.at[batch_index, :, positions].set(y.astype(x.dtype)), cached, new)

    return cache._replace(k=write(cache.k, k), v=write(cache.v, v))


def read_kv(cache: KVCache, dtype: Any) -> tuple[Float[Array, "B S K C"], Float[Array, "B S K V"]]:
    """Return one layer's keys and values in `dtype`, in the dimension order of the attention kernels."""
    return dequantize(cache.k, dtype).swapaxes(1, 2), dequantize(cache.v, dtype).swapaxes(1, 2)
