# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Normalisation of the residual stream; statistics are taken in float32 whatever the activations are."""

from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.params import param


def _statistics(x: Float[Array, "*B D"], eps: float, centred: bool) -> tuple[Array, Array]:
    """x in float32, less its mean where `centred`, and 1 / sqrt(its mean square + eps) [*B, 1]."""
    wide = x.astype(jnp.float32)
    if centred:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return wide, jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float, centred: bool
) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias in x's dtype; without the mean unless `centred`.

    Its gradient is written out: it keeps x alone for the backward pass, where automatic differentiation keeps four
    float32 arrays of x's shape (broadcast statistics and scales among them) in every layer.
    """
    wide, inverse = _statistics(x, eps, centred)
    scale, bias = (jnp.expand_dims(row, range(x.ndim - 1)) for row in (scale, bias))
    return (wide * inverse * scale + bias).astype(x.dtype)


def _normalise_forward(x: Array, scale: Array, bias: Array, eps: float, centred: bool) -> tuple[Array, tuple]:
    return normalize(x, scale, bias, eps, centred), (x, scale)


def _normalise_backward(eps: float, centred: bool, kept: tuple, gradient: Array) -> tuple[Array, Array, Array]:
    x, scale = kept
    wide, inverse = _statistics(x, eps, centred)
    normed, outer = wide * inverse, gradient.astype(jnp.float32)
    inner, rows = outer * jnp.expand_dims(scale, range(x.ndim - 1)), tuple(range(x.ndim - 1))
    along = jnp.mean(inner * normed, axis=-1, keepdims=True)
    dx = inner - normed * along
    if centred:
        dx = dx - jnp.mean(inner, axis=-1, keepdims=True)
    return (dx * inverse).astype(x.dtype), jnp.sum(outer * normed, axis=rows), jnp.sum(outer, axis=rows)


normalize.defvjp(_normalise_forward, _normalise_backward)


class Norm(hk.Module):
    """One of the norms of `config.norm`."""

    def __init__(self, config: ModelConfig, name: str):
        super().__init__(name=name)
        self.config = config

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalise the last dimension; the result has x's dtype."""
        c, ones, zeros = self.config, hk.initializers.Constant(1.0), hk.initializers.Constant(0.0)
        if c.norm == "scalenorm":  # Nguyen and Salazar 2019: one learned length
            wide = x.astype(jnp.float32)
            square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
            # The gradient stays finite at zero, unlike a length's.
            y = wide * jax.lax.rsqrt(jnp.maximum(square, c.norm_eps**2))
            return (y * param("scale", hk.initializers.Constant(c.d_model**0.5))).astype(x.dtype)
        if c.norm.startswith("gptj-"):
            return self._divide_by_length(x)
        # layernorm: Ba et al. 2016; rmsnorm: Zhang and Sennrich 2019, as in Llama
        scale = param("scale", ones, embed=c.d_model)
        centred = c.norm == "layernorm"
        bias = param("bias", zeros, embed=c.d_model) if centred and c.norm_bias else jnp.zeros_like(scale)
        return normalize(x, scale, bias, c.norm_eps, centred)

    def _divide_by_length(self, x: Array) -> Array:
        c, axes = self.config, dict(embed=self.config.d_model) if self.config.norm == "gptj-rmsnorm" else {}
        wide = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        length = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))  # its gradient is finite at zero
        y = wide / (length + c.norm_eps) * self._row("scale", c.d_model**0.5, axes, x.ndim)
        return (y + self._row("bias", 0.0, axes, x.ndim) if c.norm_bias else y).astype(x.dtype)

    def _row(self, name: str, first: float, axes: dict[str, int], ndim: int) -> Array:
        row = param(name, hk.initializers.Constant(first), **axes)
        return jnp.expand_dims(row, range(ndim - row.ndim))


class QKNorm(hk.Module):
    """rmsnorm of every head by itself, with one scale for all of them (Qwen 3)."""

    def __init__(self, config: ModelConfig, name: str):
        super().__init__(name=name)
        self.config = config

    def __call__(self, x: Float[Array, "B T N C"]) -> Float[Array, "B T N C"]:
        """Normalise the channels of each head; the result has x's dtype."""
        scale = param("scale", hk.initializers.Constant(1.0), head_dim=self.config.head_dim)
        return normalize(x, scale, jnp.zeros_like(scale), self.config.norm_eps, False)
