# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Shapes that follow from the configuration: parameters, their number, and empty KV caches."""

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
    """Return the shape and logical axes of every parameter, as {module: {name: info}}, without allocating any."""
    return describe(make_model(config).init)


def count_params(config: ModelConfig) -> int:
    """Return the number of parameters, by abstract evaluation."""
    return sum(math.prod(info.shape) for arrays in describe_params(config).values() for info in arrays.values())


def init_cache(
    config: ModelConfig, batch_size: int, cache_len: int, dtype: str | None = None, *, encoder_len: int = 0
) -> KVCaches:
    """Return empty caches for `batch_size` sequences of `cache_len` tokens.

    `dtype` defaults to that of the activations. "int8" adds a float32 scale for each token and head. The caches of an
    encoder-decoder model also hold the keys and values of `encoder_len` encoder tokens.
    """
    pattern = config.pattern

    def empty(length: int) -> Array | Quantized:
        shape = (config.n_layers // len(pattern), batch_size, config.kv_heads, length, config.head_dim)
        values = jnp.zeros(shape, dtype or config.dtype)
        return Quantized(values, jnp.zeros((*shape[:-1], 1), jnp.float32)) if dtype == "int8" else values

    def cross_attention() -> KVCache | None:
        return None if config.encoder is None else KVCache(empty(encoder_len), empty(encoder_len))

    return tuple(KVCache(empty(cache_len), empty(cache_len), cross_attention()) for _ in pattern)
