# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Narrow weights for sampling: eight bits and a scale, and products that read no more than what is stored from memory."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from mesh_transformer.mesh import target_platform

INT8_MAX = 127  # of the whole numbers; -128 is not used, so that the range is symmetric
BLOCK = 1 << 20  # values widened at once: so many XLA spreads over all cores, whose shared cache holds them
COLUMNS = 1 << 12  # of a block at most
FEW_ROWS = 32  # of x: with more, widening a whole weight first costs little beside the product


class Quantized(NamedTuple):
    """values * scale: whole numbers, and one scale for all that is added up into the same output."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]  # float32, of the same rank; 1 along the dimensions that a product contracts

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for."""
        return self.values.shape


def quantize(w: Float[Array, "..."], contracted: tuple[int, ...]) -> Quantized:
    """`w` rounded to 255 steps between minus and plus its largest value, for each output by itself."""
    wide = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=contracted, keepdims=True) / INT8_MAX
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Quantized(values, scale)


def dequantize(w: Float[Array, "..."] | Quantized, dtype: Any) -> Float[Array, "..."]:
    """What is used as it is, whatever it was kept as."""
    return (w.values.astype(jnp.float32) * w.scale if isinstance(w, Quantized) else w).astype(dtype)


def quantized_matmul(
    x: Float[Array, "M K"], w: Float[Array, "..."] | Quantized, *, inputs: int, flipped: bool
) -> Float[Array, "M N"]:
    """x times a weight, of which `linear` says what is contracted, in float32, on one device.

    A CPU's product takes float32 alone: XLA would widen a narrower weight as a whole, in memory, and decoding is bound by
    memory. A block is widened at a time instead, small enough to stay in a cache.
    """
    values, scale = w if isinstance(w, Quantized) else (w, None)
    k = math.prod(w.shape[:inputs])
    if target_platform() != "cpu" or x.shape[0] > FEW_ROWS:
        wide = dequantize(w, x.dtype)
        return jnp.matmul(x, wide.T if flipped else wide.reshape(k, -1), preferred_element_type=jnp.float32)
    x = x.astype(jnp.float32)
    y = _by_output(x, values) if flipped else _by_input(x, values.reshape(k, -1))
    return y if scale is None else y * scale.reshape(1, -1)


def _by_output(x: Float[Array, "M K"], values: Array) -> Float[Array, "M N"]:
    """x times the transpose of `values` [N, K], some rows of these at a time; the last blocks overlap."""
    n, k = values.shape
    size = min(max(BLOCK // k, 1), n)

    def step(i: Array, y: Array) -> Array:
        first = jnp.minimum(i * size, n - size)
        block = jax.lax.dynamic_slice(values, (first, 0), (size, k)).astype(jnp.float32)
        return jax.lax.dynamic_update_slice(y, jnp.einsum("mk,nk->mn", x, block), (0, first))

    return jax.lax.fori_loop(0, -(-n // size), step, jnp.zeros((x.shape[0], n), jnp.float32))


def _by_input(x: Float[Array, "M K"], values: Array) -> Float[Array, "M N"]:
    """x times `values` [K, N], added up over blocks of rows; a wide one in overlapping strips of columns."""
    k, n = values.shape
    width = min(n, COLUMNS)
    height = max(size for size in range(1, max(BLOCK // width, 1) + 1) if k % size == 0)

    def strip(first: Array | int) -> Array:
        def step(i: Array, y: Array) -> Array:
            block = jax.lax.dynamic_slice(values, (i * height, first), (height, width)).astype(jnp.float32)
            return y + jnp.matmul(jax.lax.dynamic_slice(x, (0, i * height), (x.shape[0], height)), block)

        return jax.lax.fori_loop(0, k // height, step, jnp.zeros((x.shape[0], width), jnp.float32))

    if width == n:
        return strip(0)

    def place(i: Array, y: Array) -> Array:
        first = jnp.minimum(i * width, n - width)
        return jax.lax.dynamic_update_slice(y, strip(first), (0, first))

    return jax.lax.fori_loop(0, -(-n // width), place, jnp.zeros((x.shape[0], n), jnp.float32))
