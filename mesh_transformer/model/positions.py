# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a token stands: rotations of queries and keys, and biases on attention scores."""

import math

import haiku as hk
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.params import param

T5_BUCKETS, T5_MAX_DISTANCE = 32, 128


def apply_rope(x: Float[Array, "B T N C"], positions: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T N C"]:
    """Rotary embedding (Su et al. 2021) of the first `rope_dim` channels of every head.

    "rope-interleaved" turns channels (2i, 2i+1) together, as GPT-J; "rope-half" channels (i, i + r/2), as GPT-NeoX and
    Llama. The two are the same function of permuted weights, so a checkpoint must say which it was trained with.
    """
    r = config.rope_dim
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)  # rounded once
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]  # [B, T, r/2]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    turning, still = x[..., :r].astype(jnp.float32), x[..., r:]
    if config.positions == "rope-interleaved":
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turning.shape)
    else:
        a, b = turning[..., : r // 2], turning[..., r // 2 :]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), still], axis=-1)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each turning pair, float64 [r/2].

    With `rope_scaling` as in Llama 3.1: those that turn less than `low` times within the trained length become slower
    by the factor, those that turn more than `high` times stay, and those between are mixed of both.
    """
    r = config.rope_dim
    frequencies = config.rope_theta ** (-np.arange(0, r, 2) / r)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    rotations = scaling.original_seq_len * frequencies / (2 * math.pi)  # within the trained length
    unscaled = np.clip(
        (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0
    )
    return frequencies * (unscaled + (1 - unscaled) / scaling.factor)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """Slope of every head (Press et al. 2021): a geometric series; other counts than powers of two interleave the next one."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-4.0 * np.arange(1, 2 * (n_heads - power), 2) / power)
    return np.concatenate([slopes, extra]).astype(np.float32)


def t5_buckets(distance: Int[Array, "*shape"], *, causal: bool = True) -> Int[Array, "*shape"]:
    """Bucket of a distance query - key (Raffel et al. 2019): each exact up to 15, then logarithmic up to 128.

    Where keys come after queries too (not `causal`), half of the buckets are theirs: exact up to 7 on either side.
    """
    count, after = T5_BUCKETS, jnp.zeros_like(distance)
    if not causal:
        count, after = count // 2, jnp.where(distance < 0, count // 2, 0)
        distance = jnp.abs(distance)
    exact, distance = count // 2, jnp.maximum(distance, 0)
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(T5_MAX_DISTANCE / exact)
    spread = exact + (ratio * (count - exact)).astype(jnp.int32)
    return after + jnp.where(distance < exact, distance, jnp.minimum(spread, count - 1))


class RelativeBias(hk.Module):
    """Bias of every head on attention scores, from the distance between query and key; one table for all layers of a stack."""

    def __init__(self, config: ModelConfig):
        super().__init__(name="relative_bias")
        self.config = config

    def __call__(self, distance: Int[Array, "B T S"]) -> Float[Array, "B H T S"] | None:
        """The bias for each distance query - key, or None where the position scheme has none (B may be 1)."""
        heads = self.config.n_heads
        match self.config.positions:
            case "t5":
                table = param("table", hk.initializers.RandomNormal(0.02), buckets=T5_BUCKETS, heads=heads)
                return jnp.moveaxis(table[t5_buckets(distance, causal=self.config.causal)], -1, 1)
            case "alibi":
                apart = jnp.abs(distance[:, None]).astype(jnp.float32)
                return -jnp.asarray(alibi_slopes(heads))[None, :, None, None] * apart
            case _:
                return None
