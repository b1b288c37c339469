# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Dense attention, for all queries at once or in blocks of queries: the reference implementation for other kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.formulas import attention_scale, finish_scores
from mesh_transformer.model.linear import dropout

MASK_VALUE = -1e30  # finite: a query without a visible key yields the mean of the values, not NaN


def dense_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None,
    config: ModelConfig,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H V"]:
    """Return softmax(q k^T scale + bias) v over the keys where `mask` is True, with scores and softmax in float32.

    `config` gives the scale, the soft cap of the scores and the dropout rate. `sinks` are the scores of an additional key
    of each head, whose value is zero. H = K G: each key-value head serves G query heads.
    """
    batch, t, heads, channels = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    # One contiguous matrix per key-value head, so that both matmuls are batched matmuls without a transpose.
    q = (
        q.reshape(batch, t, kv_heads, group, channels)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, group * t, channels)
    )
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkqc,bksc->bkqs", q * attention_scale(config), k, preferred_element_type=jnp.float32)
    scores = finish_scores(scores.reshape(batch, kv_heads, group, t, s), config)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], kv_heads, group, t, s)
    # The mask is added to the scores instead of applied with jnp.where, and the weights are normalized after the matmul
    # with the values: this saves the backward pass two passes over the scores.
    scores = scores + jnp.where(mask, 0.0, MASK_VALUE)[:, None, None]
    scores = scores.reshape(batch, kv_heads, group * t, s)
    high = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is None:
        exps = jnp.exp(scores - jax.lax.stop_gradient(high))
        total = jnp.sum(exps, axis=-1, keepdims=True)
    else:
        sink = jnp.repeat(sinks.astype(jnp.float32).reshape(1, kv_heads, group), t, axis=-1)[..., None]
        high = jax.lax.stop_gradient(jnp.maximum(high, sink))
        exps = jnp.exp(scores - high)
        total = jnp.sum(exps, axis=-1, keepdims=True) + jnp.exp(sink - high)
    weights = dropout(exps.astype(v.dtype), config.dropout)
    out = jnp.einsum("bkqs,bksc->bkqc", weights, v, preferred_element_type=jnp.float32)
    out = (out / total).astype(v.dtype)
    return out.reshape(batch, kv_heads, group, t, -1).transpose(0, 3, 1, 2, 4).reshape(batch, t, heads, -1)


def count_blocks(length: int) -> int:
    """Return the number of query blocks for `dense_attention_in_blocks`: 4 or 2 equal blocks of 64 queries or more, or 1."""
    return next((n for n in (4, 2) if length % n == 0 and length >= 64 * n), 1)


def dense_attention_in_blocks(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K V"],
    mask: Bool[Array, "#B T T"],
    bias: Float[Array, "#B H T T"] | None,
    config: ModelConfig,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H V"]:
    """Return `dense_attention` with a causal mask, computed for one block of queries at a time.

    Each block reads only the keys up to its end, which saves about half of the work.
    """
    length = q.shape[1] // count_blocks(q.shape[1])
    outputs = []
    for start in range(0, q.shape[1], length):
        end = start + length
        block_bias = None if bias is None else bias[:, :, start:end, :end]
        block_mask = mask[:, start:end, :end]
        outputs.append(dense_attention(q[:, start:end], k[:, :end], v[:, :end], block_mask, block_bias, config, sinks))
    return jnp.concatenate(outputs, axis=1)
