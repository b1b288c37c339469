# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Learned products: a linear map over the last dimensions, and dropout."""

import math

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.mesh import current_layout
from mesh_transformer.model.quantization import Quantized, quantized_matmul, dequantize


def linear(
    x: Float[Array, "..."],
    w: Float[Array, "..."] | Quantized,
    b: Float[Array, "..."] | None = None,
    *,
    inputs: int = 1,
    flipped: bool = False,
    dtype: str | None = None,
) -> Float[Array, "..."]:
    """x [..., inputs] times w [inputs, outputs] plus b, where the last `inputs` dimensions of x are contracted.

    A `flipped` w is [output, input], as a table of embeddings is for the head.
    The result has x's dtype or `dtype`. The weight is cast to x's dtype here and nowhere else; the bias is added in
    float32, so that its gradient, a sum over all tokens, is taken in float32. On one device everything but the
    contracted dimensions is laid out as one: the weight's gradient then contracts one dimension instead of batch and
    sequence, 1.6 times faster on a CPU. Across devices it is not, for batch and sequence may both be cut.
    """
    batch, outputs = x.shape[: x.ndim - inputs], w.shape[:1] if flipped else w.shape[inputs:]
    if current_layout() is not None:
        w = dequantize(w, x.dtype).T if flipped else dequantize(w, x.dtype)
        dims = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
        y = jax.lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=dtype or x.dtype)
        return y if b is None else (y + jnp.expand_dims(b, range(len(batch)))).astype(y.dtype)
    rows = x.reshape(math.prod(batch), -1)
    if isinstance(w, Quantized) or w.dtype.itemsize < x.dtype.itemsize:
        y = quantized_matmul(rows, w, inputs=inputs, flipped=flipped).astype(dtype or x.dtype)
    else:
        w = w.astype(x.dtype).T if flipped else w.astype(x.dtype).reshape(rows.shape[1], -1)
        y = jnp.matmul(rows, w, preferred_element_type=dtype or x.dtype)
    if b is not None:
        y = (y + b.reshape(1, -1)).astype(y.dtype)
    return y.reshape(*batch, *outputs)


def dropout(x: Float[Array, "..."], rate: float) -> Float[Array, "..."]:
    """Zero a share `rate` of x and scale up the rest, where a dropout key was given; otherwise x."""
    key = hk.maybe_next_rng_key() if rate else None
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)
