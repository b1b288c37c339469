# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention of a layer's queries over keys and values, its own or those kept in the cache."""

from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mesh_transformer.config import ModelConfig
from mesh_transformer.mesh import target_platform
from mesh_transformer.model.linear import dropout, linear
from mesh_transformer.model.norms import HeadNorm
from mesh_transformer.model.params import Inits, param
from mesh_transformer.model.positions import rotate

MASKED = -1e30  # a finite score: a row with nothing to see gives a mean, not NaN


class Cache(NamedTuple):
    """Keys and values of one layer, or of a stack of them; the place of a token in the cache is its position.

    Heads come before places, so that the keys of a head are one matrix and attention's products read them as they lie.
    """

    k: Float[Array, "*L B K S C"]
    v: Float[Array, "*L B K S C"]


class Sight(NamedTuple):
    """What each query may see, computed once for all layers."""

    positions: Int[Array, "B T"]  # for rotary embeddings
    visible: Bool[Array, "#B T S"]  # on global layers
    near: Bool[Array, "#B T S"]  # on local layers: visible, and within the window
    bias: Float[Array, "#B H T S"] | None  # added to scores


def attend(
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
    scores = scores + jnp.where(visible, 0.0, MASKED)[:, None, None]
    scores = scores.reshape(batch, kv_heads, group * t, s)
    exps = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    weights = dropout(exps.astype(v.dtype), dropout_rate)
    mixed = jnp.einsum("bkqs,bksc->bkqc", weights, v, preferred_element_type=jnp.float32)
    mixed = (mixed / jnp.sum(exps, axis=-1, keepdims=True)).astype(v.dtype)
    return (
        mixed.reshape(batch, kv_heads, group, t, channels).transpose(0, 3, 1, 2, 4).reshape(batch, t, heads, channels)
    )


def attend_in_blocks(
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
        mixed.append(attend(q[:, rows], k[:, seen], v[:, seen], visible[:, rows, seen], own_bias, **options))
    return jnp.concatenate(mixed, axis=1)


def store(cache: Cache, k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], positions: Int[Array, "B T"]) -> Cache:
    """One layer's cache with keys and values written at `positions`; places outside the cache are dropped."""
    if positions.size == 1:
        # XLA turns a scatter of one update into a slice update and fuses that into both its readers, which copies the
        # whole cache four times a layer; writing the same values twice keeps it a scatter in place.
        k, v, positions = jnp.tile(k, (1, 2, 1, 1)), jnp.tile(v, (1, 2, 1, 1)), jnp.tile(positions, (1, 2))
    rows = jnp.arange(k.shape[0])[:, None]
    return Cache(
        cache.k.at[rows, :, positions].set(k.astype(cache.k.dtype)),
        cache.v.at[rows, :, positions].set(v.astype(cache.v.dtype)),
    )


class Attention(hk.Module):
    """Project, place, attend, project back."""

    def __init__(self, config: ModelConfig, inits: Inits, *, local: bool):
        super().__init__(name="attention")
        self.config, self.inits, self.local = config, inits, local

    def __call__(
        self, x: Float[Array, "B T D"], sight: Sight, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The layer's contribution to the residual stream, and its cache with the new keys and values added."""
        c = self.config
        q = self._project(x, "q", heads=c.n_heads)
        k = self._project(x, "k", kv_heads=c.kv_heads)
        v = self._project(x, "v", kv_heads=c.kv_heads)
        if c.qk_norm:
            q, k = HeadNorm(c, name="norm_q")(q), HeadNorm(c, name="norm_k")(k)
        if c.positions.startswith("rotary"):
            q, k = rotate(q, sight.positions, c), rotate(k, sight.positions, c)
        if cache is not None:
            cache = store(cache, k, v, sight.positions)
            k, v = cache.k.swapaxes(1, 2).astype(x.dtype), cache.v.swapaxes(1, 2).astype(x.dtype)
        options: dict[str, Any] = dict(
            scale=c.head_dim**-0.5 if c.attention_scale == "sqrt" else 1.0, dropout_rate=c.dropout
        )
        # On a CPU the work saved counts, as long as a block is long; on accelerators one large product is faster.
        n_blocks = next((n for n in (4, 2) if x.shape[1] % n == 0 and x.shape[1] >= 64 * n), 1)
        attend_all = attend
        if cache is None and n_blocks > 1 and target_platform() == "cpu":
            attend_all = partial(attend_in_blocks, n_blocks=n_blocks)
        visible = sight.near if self.local else sight.visible
        mixed = attend_all(q, k, v, visible, sight.bias, **options)
        w_o = param("w_o", self.inits.residual, heads=c.n_heads, head_dim=c.head_dim, embed=c.d_model)
        b_o = param("b_o", hk.initializers.Constant(0.0), embed=c.d_model) if c.attention_out_bias else None
        return linear(mixed, w_o, b_o, inputs=2), cache

    def _project(self, x: Float[Array, "B T D"], name: str, **heads: int) -> Float[Array, "B T N C"]:
        w = param(f"w_{name}", self.inits.inner, embed=self.config.d_model, **heads, head_dim=self.config.head_dim)
        b = None
        if self.config.qkv_bias:
            b = param(f"b_{name}", hk.initializers.Constant(0.0), **heads, head_dim=self.config.head_dim)
        return linear(x, w, b)
