# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Normalisation of the residual stream; statistics are taken in float32 whatever the activations are."""

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.params import param


class Norm(hk.Module):
    """One of the norms of `config.norm`."""

    def __init__(self, config: ModelConfig, name: str):
        super().__init__(name=name)
        self.config = config

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalise the last dimension; the result has x's dtype."""
        config, ones = self.config, hk.initializers.Constant(1.0)
        wide = x.astype(jnp.float32)
        match config.norm:
            case "layernorm":  # Ba et al. 2016
                mean = jnp.mean(wide, axis=-1, keepdims=True)
                variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
                y = (wide - mean) * jax.lax.rsqrt(variance + config.norm_eps)
                y = y * param("scale", ones, embed=config.d_model)[None, None]
                if config.norm_bias:
                    y = y + param("bias", hk.initializers.Constant(0.0), embed=config.d_model)[None, None]
            case "rmsnorm":  # Zhang and Sennrich 2019, as in Llama
                mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
                y = (
                    wide
                    * jax.lax.rsqrt(mean_square + config.norm_eps)
                    * param("scale", ones, embed=config.d_model)[None, None]
                )
            case "scalenorm":  # Nguyen and Salazar 2019: one learned length
                square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
                y = wide * jax.lax.rsqrt(
                    jnp.maximum(square, config.norm_eps**2)
                )  # finite gradient at zero, unlike a length's
                y = y * param("scale", hk.initializers.Constant(config.d_model**0.5))
        return y.astype(x.dtype)
