# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Normalization layers. Statistics are computed in float32, regardless of the dtype of the activations."""

from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.formulas import initial_norm_scale, norm_scale
from mesh_transformer.model.params import param


def _statistics(x: Float[Array, "*B D"], eps: float, centered: bool) -> tuple[Array, Array]:
    """Return y = x in float32, minus its mean if `centered`, and 1 / sqrt(mean(y^2) + eps) [*B, 1]."""
    x = x.astype(jnp.float32)
    if centered:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x, jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Float[Array, "*B D"], scale: Float[Array, "*N D"], bias: Float[Array, "*N D"], eps: float, centered: bool
) -> Float[Array, "*B D"]:
    """Return (x - mean) / sqrt(variance + eps) * scale + bias in x's dtype; the mean is 0 unless `centered`.

    The statistics are over the last dimension; `scale` and `bias` may have several of x's last dimensions.

    The gradient is written by hand: it saves only x for the backward pass. Automatic differentiation saves four float32
    arrays of x's shape in every layer, among them broadcast statistics and scales.
    """
    x_centered, inverse = _statistics(x, eps, centered)
    scale, bias = (jnp.expand_dims(p, range(x.ndim - p.ndim)) for p in (scale, bias))
    return (x_centered * inverse * scale + bias).astype(x.dtype)


def _normalize_forward(x: Array, scale: Array, bias: Array, eps: float, centered: bool) -> tuple[Array, tuple]:
    return normalize(x, scale, bias, eps, centered), (x, scale)


def _normalize_backward(eps: float, centered: bool, residuals: tuple, gradient: Array) -> tuple[Array, Array, Array]:
    x, scale = residuals
    x_centered, inverse = _statistics(x, eps, centered)
    normed = x_centered * inverse
    gradient = gradient.astype(jnp.float32)
    batch_dims = tuple(range(x.ndim - scale.ndim))
    d_normed = gradient * jnp.expand_dims(scale, batch_dims)
    dx = d_normed - normed * jnp.mean(d_normed * normed, axis=-1, keepdims=True)
    if centered:
        dx = dx - jnp.mean(d_normed, axis=-1, keepdims=True)
    return (
        (dx * inverse).astype(x.dtype),
        jnp.sum(gradient * normed, axis=batch_dims),
        jnp.sum(gradient, axis=batch_dims),
    )


normalize.defvjp(_normalize_forward, _normalize_backward)


class Norm(hk.Module):
    """Normalization over the last dimension, of the type `config.norm`."""

    def __init__(self, config: ModelConfig, name: str, dim: int | None = None):
        """`dim` is the size of the last dimension; None: d_model."""
        super().__init__(name=name)
        self.config = config
        self.dim = dim or config.d_model

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normalized x, in x's dtype."""
        c = self.config
        zeros = hk.initializers.Constant(0.0)
        if c.norm == "scalenorm":  # Nguyen and Salazar 2019: one learned length
            x_float32 = x.astype(jnp.float32)
            square = jnp.sum(jnp.square(x_float32), axis=-1, keepdims=True)
            # The maximum is applied to the squares, because the gradient of the square root is infinite at zero.
            y = x_float32 * jax.lax.rsqrt(jnp.maximum(square, c.norm_eps**2))
            return (y * param("scale", hk.initializers.Constant(self.dim**0.5))).astype(x.dtype)
        if c.norm.startswith("gptj-"):
            return self._divide_by_length(x)
        if c.norm == "nonparametric-layernorm":
            ones = jnp.ones(self.dim)
            return normalize(x, ones, jnp.zeros_like(ones), c.norm_eps, True)
        # layernorm: Ba et al. 2016; rmsnorm: Zhang and Sennrich 2019, as in Llama
        scale = norm_scale(param("scale", hk.initializers.Constant(initial_norm_scale(c)), embed=self.dim), c)
        centered = c.norm == "layernorm"
        bias = param("bias", zeros, embed=self.dim) if centered and c.norm_bias else jnp.zeros_like(scale)
        return normalize(x, scale, bias, c.norm_eps, centered)

    def _divide_by_length(self, x: Array) -> Array:
        """Return x / (|x| + eps) * scale + bias, as mesh-transformer-jax computes it."""
        c = self.config
        axes = dict(embed=self.dim) if c.norm == "gptj-rmsnorm" else {}
        x_float32 = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(x_float32), axis=-1, keepdims=True)
        # the gradient of a square root is infinite at zero
        length = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
        y = x_float32 / (length + c.norm_eps) * self._vector("scale", self.dim**0.5, axes, x.ndim)
        return (y + self._vector("bias", 0.0, axes, x.ndim) if c.norm_bias else y).astype(x.dtype)

    def _vector(self, name: str, initial: float, axes: dict[str, int], ndim: int) -> Array:
        vector = param(name, hk.initializers.Constant(initial), **axes)
        return jnp.expand_dims(vector, range(ndim - vector.ndim))


class QKNorm(hk.Module):
    """Normalization of queries or keys, of the type `config.qk_norm`; `heads` is the logical axis of the heads."""

    def __init__(self, config: ModelConfig, name: str, heads: str = "heads"):
        super().__init__(name=name)
        self.config = config
        self.heads = heads

    def __call__(self, x: Float[Array, "B T N C"]) -> Float[Array, "B T N C"]:
        """Return the normalized x, in x's dtype."""
        c = self.config
        axes = dict(head_dim=c.head_dim)
        if c.qk_norm in ("rmsnorm-all-heads", "layernorm-per-head"):
            axes = {self.heads: x.shape[2]} | axes
        gemma = c.qk_norm == "gemma-rmsnorm"
        scale = param("scale", hk.initializers.Constant(0.0 if gemma else 1.0), **axes)
        scale = 1.0 + scale if gemma else scale
        if c.qk_norm == "rmsnorm-all-heads":
            flat: Any = normalize(x.reshape(*x.shape[:2], -1), scale.ravel(), jnp.zeros(scale.size), c.norm_eps, False)
            return flat.reshape(x.shape)
        return normalize(x, scale, jnp.zeros_like(scale), c.norm_eps, c.qk_norm == "layernorm-per-head")
