# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Shapes derived from the configuration: parameters, their number, and empty KV caches."""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.attention.kv_cache import KVCache
from mesh_transformer.model.params import ParamInfo, describe
from mesh_transformer.model.quantization import Quantized
from mesh_transformer.model.transformer import KVCaches, make_model


@functools.lru_cache(maxsize=64)  # tracing the model takes about 0.5 s, and many callers need the result
def describe_params(config: ModelConfig) -> dict[str, dict[str, ParamInfo]]:
    """Return the shape and logical axes of every parameter, as {module: {name: info}}, without allocating arrays."""
    return describe(make_model(config).init)


def count_params(config: ModelConfig) -> int:
    """Return the number of parameters, without allocating arrays."""
    return sum(math.prod(info.shape) for arrays in describe_params(config).values() for info in arrays.values())


def init_cache(
    config: ModelConfig, batch_size: int, cache_len: int, dtype: str | None = None, *, encoder_len: int = 0
) -> KVCaches:
    """Return empty caches for `batch_size` sequences of `cache_len` tokens.

    `dtype` defaults to model.dtype. "int8" adds a float32 scale for each token and head. The caches of an
    encoder-decoder model also hold the keys and values of `encoder_len` encoder tokens.
    """
    latent = config.latent_attention
    n_heads = config.kv_heads if latent is None else 1
    key_dim, value_dim = (config.head_dim, config.head_dim) if latent is None else (latent.kv_rank, latent.d_rotated)

    def empty(n_repeats: int, length: int, size: int) -> Array | Quantized:
        shape = (n_repeats, batch_size, n_heads, length, size)
        values = jnp.zeros(shape, dtype or config.dtype)
        return Quantized(values, jnp.zeros((*shape[:-1], 1), jnp.float32)) if dtype == "int8" else values

    def empty_pair(n_repeats: int, length: int) -> KVCache:
        return KVCache(empty(n_repeats, length, key_dim), empty(n_repeats, length, value_dim))

    def empty_cache(n_repeats: int) -> KVCache:
        cross_attention = None if config.encoder is None else empty_pair(n_repeats, encoder_len)
        return empty_pair(n_repeats, cache_len)._replace(cross_attention=cross_attention)

    return tuple(empty_cache(stack.n_repeats) for stack in config.layer_stacks for _ in stack.pattern)
