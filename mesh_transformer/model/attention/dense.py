# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention with all scores at once, or those of some rows: every other kernel equals this one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mesh_transformer.model.linear import dropout

MASK_VALUE = -1e30  # a finite score: a row with nothing to see gives a mean, not NaN


def dense_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    visible: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None,
    *,
    scale: float,
    dropout_rate: float = 0.0,
) -> Float[Array, "B T H C"]:
    """softmax(q k' scale + bias) v over the visible keys; scores and softmax in float32. H = K G query heads share K keys."""
    batch, t, heads, channels = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    # One contiguous matrix for each key-value head, so that both products are plain batched ones.
    q = (
        q.reshape(batch, t, kv_heads, group, channels)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, group * t, channels)
    )
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkqc,bksc->bkqs", q * scale, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, t, s)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], kv_heads, group, t, s)
    # Added, not selected, and divided by after the product: the gradient then passes over the scores twice less.
    scores = scores + jnp.where(visible, 0.0, MASK_VALUE)[:, None, None]
    scores = scores.reshape(batch, kv_heads, group * t, s)
    exps = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    weights = dropout(exps.astype(v.dtype), dropout_rate)
    mixed = jnp.einsum("bkqs,bksc->bkqc", weights, v, preferred_element_type=jnp.float32)
    mixed = (mixed / jnp.sum(exps, axis=-1, keepdims=True)).astype(v.dtype)
    return (
        mixed.reshape(batch, kv_heads, group, t, channels).transpose(0, 3, 1, 2, 4).reshape(batch, t, heads, channels)
    )


def dense_attention_in_blocks(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    visible: Bool[Array, "#B T T"],
    bias: Float[Array, "#B H T T"] | None,
    *,
    n_blocks: int,
    **options: float,
) -> Float[Array, "B T H C"]:
    """`attend` where no query sees a later key: each block of queries reads the keys up to its end, about half the work."""
    length = q.shape[1] // n_blocks
    mixed = []
    for start in range(0, q.shape[1], length):
        rows, seen = slice(start, start + length), slice(start + length)
        own_bias = None if bias is None else bias[:, :, rows, seen]
        mixed.append(dense_attention(q[:, rows], k[:, seen], v[:, seen], visible[:, rows, seen], own_bias, **options))
    return jnp.concatenate(mixed, axis=1)
