# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Position encodings: rotary embeddings of queries and keys, and biases on attention scores."""

import math

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.params import param


def apply_rope(
    x: Float[Array, "B T N C"], positions: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T N C"]:
    """Return `x` with rotary embeddings (Su et al. 2021) applied to the first `rope_dim` channels of every head.

    "rope-interleaved" rotates the channels (2i, 2i+1) as a pair, as in GPT-J. "rope-half" rotates (i, i + r/2), as in
    GPT-NeoX and Llama. Both are the same function with permuted weights, so a checkpoint must state which one it uses.
    """
    r = config.rope_dim
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]  # [B, T, r/2]
    cos = jnp.cos(angles)[:, :, None, :]
    sin = jnp.sin(angles)[:, :, None, :]
    rotary = x[..., :r].astype(jnp.float32)
    if config.positions == "rope-interleaved":
        a = rotary[..., 0::2]
        b = rotary[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(rotary.shape)
    else:
        a = rotary[..., : r // 2]
        b = rotary[..., r // 2 :]
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., r:]], axis=-1)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the angle per position of each channel pair, in radians, float64 [r/2].

    With `rope_scaling` (Llama 3.1), pairs with fewer than `low_freq_factor` rotations within the original sequence length
    are slowed down by `factor`, those with more than `high_freq_factor` stay, and those between are interpolated.
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
    """Return the ALiBi slope of every head (Press et al. 2021), a geometric series.

    For a number of heads that is not a power of two, the series is interleaved with that of the next power of two.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-4.0 * np.arange(1, 2 * (n_heads - power), 2) / power)
    return np.concatenate([slopes, extra]).astype(np.float32)


def falcon_alibi(key_positions: Int[Array, "B S"], config: ModelConfig) -> Float[Array, "B H S"]:
    """Return the bias on all scores of each key: its position times the slope of the head, scaled as the scores.

    Slopes, positions and products are rounded to bfloat16, as in Falcon's code. Without the rounding, softmax would not
    distinguish this from `alibi`: the bias of a query's own position is the same for all of its keys.
    """
    slopes = jnp.asarray(alibi_slopes(config.n_heads))[None, :, None]
    positions = key_positions.astype(jnp.float32)[:, None]
    return _round_to_bfloat16(_round_to_bfloat16(slopes) * _round_to_bfloat16(positions)) * config.head_dim**-0.5


def _round_to_bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA may remove a pair of casts


def t5_buckets(distance: Int[Array, "*shape"], config: ModelConfig) -> Int[Array, "*shape"]:
    """Return the bucket of each distance = query position - key position (Raffel et al. 2019).

    Causal, with 32 buckets up to a distance of 128: one bucket per distance up to 15, then logarithmic buckets. Not causal:
    half of the buckets are for keys after the query, and distances are exact up to 7 on either side.
    """
    count = config.t5_buckets
    offset = jnp.zeros_like(distance)
    if not config.causal:
        count //= 2
        offset = jnp.where(distance < 0, count, 0)
        distance = jnp.abs(distance)
    exact = count // 2
    distance = jnp.maximum(distance, 0)
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(config.t5_max_distance / exact)
    logarithmic = exact + (ratio * (count - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(logarithmic, count - 1))


class RelativeBias(hk.Module):
    """Bias on the attention scores of each head by the distance of query and key. All layers of a stack share it."""

    def __init__(self, config: ModelConfig):
        super().__init__(name="relative_bias")
        self.config = config

    def __call__(
        self, distance: Int[Array, "B T S"], key_positions: Int[Array, "K S"]
    ) -> Float[Array, "N H T S"] | None:
        """Return the bias for each distance = query - key, or None for position encodings without a bias. B or K may be 1."""
        c = self.config
        heads = c.n_heads
        match c.positions:
            case "t5":
                table = param("table", hk.initializers.RandomNormal(0.02), buckets=c.t5_buckets, heads=heads)
                return jnp.moveaxis(table[t5_buckets(distance, c)], -1, 1)
            case "alibi":
                absolute = jnp.abs(distance[:, None]).astype(jnp.float32)
                return -jnp.asarray(alibi_slopes(heads))[None, :, None, None] * absolute
            case "falcon-alibi":
                bias = falcon_alibi(key_positions, c)[:, :, None]
                return jnp.broadcast_to(bias, (*bias.shape[:2], *distance.shape[1:]))
            case _:
                return None
