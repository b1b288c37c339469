# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Int8 weights and KV caches for sampling, and matmuls that dequantize a weight block by block in the CPU's cache."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from mesh_transformer.mesh import target_platform

INT8_MAX = 127  # -128 is not used, so that the range is symmetric
# Elements dequantized at a time: enough to use all cores, and few enough for their shared cache.
BLOCK_SIZE = 1 << 20
MAX_BLOCK_COLUMNS = 1 << 12
MAX_BLOCKED_ROWS = 32  # of x; with more rows, dequantizing the whole weight costs little compared with the matmul


class Quantized(NamedTuple):
    """An array stored as values * scale, with one scale for all values that a matmul sums into the same output."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]  # float32, rank of `values`; size 1 along the dimensions that a matmul contracts

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dequantized array."""
        return self.values.shape


def quantize(w: Float[Array, "..."], contracted_dims: tuple[int, ...]) -> Quantized:
    """Return `w` rounded to 255 levels between minus and plus its largest magnitude, separately for each output."""
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=contracted_dims, keepdims=True) / INT8_MAX
    values = jnp.round(w / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Quantized(values, scale)


def dequantize(w: Float[Array, "..."] | Quantized, dtype: Any) -> Float[Array, "..."]:
    """Return `w`, quantized or not, as an array of `dtype`."""
    return (w.values.astype(jnp.float32) * w.scale if isinstance(w, Quantized) else w).astype(dtype)


def quantized_matmul(
    x: Float[Array, "M K"], w: Float[Array, "..."] | Quantized, *, inputs: int, transposed: bool
) -> Float[Array, "M N"]:
    """Return the float32 matmul of x with a quantized weight, on one device. See `linear` for `inputs` and `transposed`.

    Matmuls on a CPU support float32 only: XLA would convert an entire quantized weight in memory, and decoding is bound by
    memory bandwidth. Instead, one block at a time is converted, which fits into the CPU's cache.
    """
    values, scale = w if isinstance(w, Quantized) else (w, None)
    k = math.prod(w.shape[:inputs])
    if target_platform() != "cpu" or x.shape[0] > MAX_BLOCKED_ROWS:
        dense = dequantize(w, x.dtype)
        return jnp.matmul(x, dense.T if transposed else dense.reshape(k, -1), preferred_element_type=jnp.float32)
    x = x.astype(jnp.float32)
    y = _matmul_transposed(x, values) if transposed else _matmul(x, values.reshape(k, -1))
    return y if scale is None else y * scale.reshape(1, -1)


def _matmul_transposed(x: Float[Array, "M K"], values: Array) -> Float[Array, "M N"]:
    """Return x times the transpose of `values` [N, K], computed in blocks of rows; the last two blocks overlap."""
    n, k = values.shape
    n_rows = min(max(BLOCK_SIZE // k, 1), n)

    def step(i: Array, y: Array) -> Array:
        first = jnp.minimum(i * n_rows, n - n_rows)
        block = jax.lax.dynamic_slice(values, (first, 0), (n_rows, k)).astype(jnp.float32)
        return jax.lax.dynamic_update_slice(y, jnp.einsum("mk,nk->mn", x, block), (0, first))

    return jax.lax.fori_loop(0, -(-n // n_rows), step, jnp.zeros((x.shape[0], n), jnp.float32))


def _matmul(x: Float[Array, "M K"], values: Array) -> Float[Array, "M N"]:
    """Return x times `values` [K, N], summed over blocks of rows; a wide matrix is split into strips that may overlap."""
    k, n = values.shape
    width = min(n, MAX_BLOCK_COLUMNS)
    height = max(size for size in range(1, max(BLOCK_SIZE // width, 1) + 1) if k % size == 0)

    def strip(first: Array | int) -> Array:
        def step(i: Array, y: Array) -> Array:
            block = jax.lax.dynamic_slice(values, (i * height, first), (height, width)).astype(jnp.float32)
            return y + jnp.matmul(jax.lax.dynamic_slice(x, (0, i * height), (x.shape[0], height)), block)

        return jax.lax.fori_loop(0, k // height, step, jnp.zeros((x.shape[0], width), jnp.float32))

    if width == n:
        return strip(0)

    def write_strip(i: Array, y: Array) -> Array:
        first = jnp.minimum(i * width, n - width)
        return jax.lax.dynamic_update_slice(y, strip(first), (0, first))

    return jax.lax.fori_loop(0, -(-n // width), write_strip, jnp.zeros((x.shape[0], n), jnp.float32))
