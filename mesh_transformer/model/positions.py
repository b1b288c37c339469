# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Position encodings: rotary embeddings of queries and keys, and biases on attention scores."""

import math
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.rope import RopeScalingConfig
from mesh_transformer.model.params import param


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each rotated channel pair, in float32."""

    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]


def make_rotation(
    positions: Int[Array, "B T"], reached_len: Int[Array, "B"] | None, config: ModelConfig, *, local: bool = False
) -> Rotation:
    """Return the rotation at `positions` of local layers if `local`, otherwise of global layers.

    The frequencies of "longrope" depend on the length of a sequence, including later chunks: `reached_len`, or the largest
    position + 1. transformers uses the longest sequence of a batch; here each sequence is independent of the others.
    """
    frequencies = jnp.asarray(rope_frequencies(config, local=local), jnp.float32)[None, None]
    scale = 1.0
    if config.rope_scaling is not None and not _is_unscaled(config, local):
        scale = config.rope_scaling.rotation_scale
        if config.rope_scaling.type == "longrope":
            length = jnp.max(positions, axis=1) + 1 if reached_len is None else reached_len
            is_long = length > (config.rope_scaling.original_seq_len or 0)
            long = jnp.asarray(rope_frequencies(config, is_long=True), jnp.float32)[None, None]
            frequencies = jnp.where(is_long[:, None, None], long, frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if scale == 1.0:
        return Rotation(jnp.cos(angles), jnp.sin(angles))
    return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def apply_rope(x: Float[Array, "B T N C"], rotation: Rotation, config: ModelConfig) -> Float[Array, "B T N C"]:
    """Return `x` with rotary embeddings (Su et al. 2021) applied to the first `rope_dim` channels of every head.

    "rope-interleaved" rotates the channels (2i, 2i+1) as a pair, as in GPT-J. "rope-half" rotates (i, i + r/2), as in
    GPT-NeoX and Llama. Both are the same function with permuted weights, so a checkpoint must state which of them it uses.
    """
    r = config.rope_dim
    cos = rotation.cos[:, :, None, :]
    sin = rotation.sin[:, :, None, :]
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


def rope_frequencies(config: ModelConfig, *, local: bool = False, is_long: bool = False) -> np.ndarray:
    """Return the angle per position of each channel pair, in radians, float64 [r/2] (modeling_rope_utils of transformers).

    `is_long`: for sequences of more than `original_seq_len` tokens ("longrope"). "dynamic" uses at every
    length the frequencies that transformers uses for model.seq_len tokens, so that cached keys stay valid.
    """
    r = config.rope_dim
    theta = config.rope_local_theta if local and config.rope_local_theta is not None else config.rope_theta
    scaling = config.rope_scaling
    if scaling is None or _is_unscaled(config, local):
        return theta ** (-np.arange(0, r, 2) / r)
    factor = scaling.factor or 1.0  # None only for longrope, which does not use it
    trained_len = scaling.original_seq_len or config.seq_len  # None only for linear, which does not use it
    if scaling.type == "dynamic":
        theta = theta * (factor * max(config.seq_len, trained_len) / trained_len - (factor - 1)) ** (r / (r - 2))
    frequencies = theta ** (-np.arange(0, r, 2) / r)
    match scaling.type:
        case "dynamic":
            return frequencies
        case "linear":
            return frequencies / factor
        case "longrope":
            return frequencies / np.asarray(scaling.long_factor if is_long else scaling.short_factor)
        case "yarn":
            unscaled = _yarn_unscaled(config, scaling, trained_len)
        case "llama3":
            low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 1.0
            rotations = trained_len * frequencies / (2 * math.pi)  # full rotations within the trained length
            unscaled = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return frequencies * (unscaled + (1 - unscaled) / factor)


def _is_unscaled(config: ModelConfig, local: bool) -> bool:
    return local and config.rope_local_theta is not None


def _yarn_unscaled(config: ModelConfig, scaling: RopeScalingConfig, trained_len: int) -> np.ndarray:
    """Return the weight of the unscaled frequency of each channel pair in YaRN (Peng et al. 2023, section 3.2)."""
    r = config.rope_dim

    def pair_with(rotations: float) -> float:
        """Return the fractional index of the channel pair with this number of rotations within the trained length."""
        return r * math.log(trained_len / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with(scaling.beta_fast or 32.0), pair_with(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    width = high - low if high != low else 0.001
    return 1 - np.clip((np.arange(r // 2) - low) / width, 0.0, 1.0)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """Return the ALiBi slope of every head (Press et al. 2021), a geometric series.

    For a number of heads that is not a power of two, the slopes for the next lower power of two are followed by every second
    slope for the next higher power of two.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-4.0 * np.arange(1, 2 * (n_heads - power), 2) / power)
    return np.concatenate([slopes, extra]).astype(np.float32)


def falcon_alibi(key_positions: Int[Array, "B S"], config: ModelConfig) -> Float[Array, "B H S"]:
    """Return Falcon's ALiBi bias of each key: its position times the slope of the head, scaled like the scores.

    Slopes, positions and products are rounded to bfloat16, as in Falcon's code. Without the rounding, the attention weights
    would equal the weights of "alibi" with the slopes scaled likewise, because the two biases of a query differ by a constant.
    """
    slopes = jnp.asarray(alibi_slopes(config.n_heads))[None, :, None]
    positions = key_positions.astype(jnp.float32)[:, None]
    return _round_to_bfloat16(_round_to_bfloat16(slopes) * _round_to_bfloat16(positions)) * config.head_dim**-0.5


def _round_to_bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA may remove a pair of casts


def t5_buckets(distance: Int[Array, "*shape"], config: ModelConfig) -> Int[Array, "*shape"]:
    """Return the bucket of each distance = query position - key position (Raffel et al. 2019).

    With 32 buckets up to a distance of 128, a causal model has one bucket per distance up to 15, then logarithmic buckets.
    A model that is not causal uses half of the buckets for keys after the query, and distances are exact up to 7 on either
    side.
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


def bucket_bias(table: Float[Array, "K H"], buckets: Int[Array, "B T S"]) -> Float[Array, "B H T S"]:
    """Return the bias of each head on the attention scores, given the table of the T5 bias and the bucket of each distance."""
    return jnp.moveaxis(table[buckets], -1, 1)


def bias_table(name: str, config: ModelConfig) -> Float[Array, "K H"]:
    """Return the parameter `name` of the current module: the bias of each bucket and head."""
    return param(name, hk.initializers.RandomNormal(0.02), buckets=config.t5_buckets, heads=config.n_heads)


class RelativeBias(hk.Module):
    """Bias of each head on the attention scores, by distance between query and key, that all layers of a stack share."""

    def __init__(self, config: ModelConfig):
        super().__init__(name="relative_bias")
        self.config = config

    def __call__(
        self, distance: Int[Array, "B T S"], key_positions: Int[Array, "K S"]
    ) -> Float[Array, "N H T S"] | None:
        """Return the bias for each distance = query - key, or None for position encodings without a shared bias.

        B or K may be 1; N is their maximum.
        """
        c = self.config
        heads = c.n_heads
        match c.positions:
            case "t5" if c.t5_shared_bias:
                return bucket_bias(bias_table("table", c), t5_buckets(distance, c))
            case "alibi":
                absolute = jnp.abs(distance[:, None]).astype(jnp.float32)
                return -jnp.asarray(alibi_slopes(heads))[None, :, None, None] * absolute
            case "falcon-alibi":
                bias = falcon_alibi(key_positions, c)[:, :, None]
                return jnp.broadcast_to(bias, (*bias.shape[:2], *distance.shape[1:]))
            case _:
                return None
