# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Blockwise attention with an online softmax, on one device or as ring attention. Memory is linear in the sequence length.

Ring attention (Liu et al. 2023) runs on n devices along one mesh axis. Each device holds 1/n of every sequence: it keeps
its queries, and the keys and values are sent around the ring. With contiguous shards, a causal mask would leave the first
device idle and the last device busy. The sequence is therefore split into 2n chunks in the zigzag layout: device i holds
chunks i and 2n-1-i. In every step after the first, each device then has the same amount of work, two of four chunk pairs.
`make_block_schedule` lists which blocks of queries attend to which blocks of keys in each step. A single device is a
ring of one device. A window shortens the schedule and can skip whole steps of the ring.

Communication per device: the forward pass sends the keys and values once per step, 2 (n-1) B T/n K C elements. The
backward pass sends them again, and sends their gradients in float32 in one step more. The communication overlaps with the
matmuls of the blocks.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import constrain, current_layout
from mesh_transformer.model.attention.dense import MASK_VALUE
from mesh_transformer.model.formulas import finish_scores


class Ring(NamedTuple):
    """Block size and ring topology."""

    axis: str | None  # mesh axis, inside shard_map; None: one device
    size: int  # number of devices
    block: int  # positions per block
    # Number of keys that a query attends to, including the key at the query's position; None: all earlier keys.
    window: int | None
    config: ModelConfig | None = None  # soft cap of the scores; None: no cap


class RingStep(NamedTuple):
    """Work of all devices in the step in which each holds the keys and values of the device `shift` ranks before it."""

    shift: int
    # One row per device and pair; columns: index of the query block, index of the key block, position of the first query,
    # position of the first key, and 1 for a pair to compute or 0 for padding.
    block_pairs: Int[np.ndarray, "n P 5"]


def zigzag_order(length: int, size: int) -> Int[np.ndarray, "T"]:
    """Return the positions of a sequence in zigzag order, as a ring of `size` devices stores them.

    `length` must be a multiple of 2 * size.
    """
    if size == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[2 * size - 1 - i]]) for i in range(size)])


def to_zigzag(x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B T *rest"]:
    """Return `x` with the sequence in zigzag order; unchanged if the sequence is not sharded."""
    return _reorder(x, zigzag_order)


def from_zigzag(x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B T *rest"]:
    """Return `x` with the sequence in its natural order. If the sequence is sharded, all of `x` is sent between devices."""
    return _reorder(x, lambda *sizes: np.argsort(zigzag_order(*sizes)))


def _reorder(x: Array, order: Callable[[int, int], np.ndarray]) -> Array:
    layout = current_layout()
    size = 1 if layout is None else layout.num_shards("sequence")
    if size == 1:
        return x
    if x.shape[1] % (2 * size):
        raise ConfigError(
            f"sequence length {x.shape[1]} is not divisible by 2 * mesh.context = {2 * size}; "
            "change mesh.context or model.seq_len"
        )
    axes = ("batch", "sequence", *["activation_embed"] * (x.ndim - 2))
    return constrain(x[:, order(x.shape[1], size)], *axes)


@cache
def make_block_schedule(length: int, ring: Ring) -> list[RingStep]:
    """Return the steps for `length` positions per device. Each pair of blocks with a visible query-key pair occurs exactly once."""
    starts = zigzag_order(ring.size * length, ring.size).reshape(ring.size, -1, ring.block)[:, :, 0]
    steps = []
    for shift in range(ring.size):
        by_device = []
        for device in range(ring.size):
            queries = starts[device]
            keys = starts[(device - shift) % ring.size]
            by_device.append(
                [
                    (i, j, q, k, 1)
                    for i, q in enumerate(queries)
                    for j, k in enumerate(keys)
                    if k <= q and (ring.window is None or q - k - ring.block + 1 < ring.window)
                ]
            )
        longest = max(map(len, by_device))
        # All devices run the same program, so the lists of devices with less work are padded with masked pairs.
        padded = [pairs + [(0, 0, queries[0], queries[0], 0)] * (longest - len(pairs)) for pairs in by_device]
        if longest:
            steps.append(RingStep(shift, np.array(padded, np.int32)))
    return steps


def _products(q: Array, k: Array) -> Float[Array, "B K G T S"]:
    return jnp.einsum("bkgtc,bksc->bkgts", q, k, preferred_element_type=jnp.float32)


def _block_scores(
    products: Array, pair: Any, segment_ids: Any, slopes: Array | None, ring: Ring
) -> Float[Array, "B K G T S"]:
    """Return the scores of one block of queries and one block of keys in float32, with the mask added.

    `products` are the dot products of the scaled queries and the keys, and `pair` is a row of RingStep.block_pairs.
    """
    scores = products if ring.config is None else finish_scores(products, ring.config)
    block = jnp.arange(ring.block)
    distance = (pair[2] + block)[:, None] - (pair[3] + block)[None]
    visible = (distance >= 0) & (pair[4] > 0)
    if ring.window is not None:
        visible = visible & (distance < ring.window)
    if slopes is not None:
        scores = scores - slopes[None, :, :, None, None] * distance[None, None, None].astype(jnp.float32)
    mask = jnp.where(visible, 0.0, MASK_VALUE)[None]
    if segment_ids is not None:
        query_ids, key_ids = segment_ids
        mask = jnp.where(visible[None] & (query_ids[:, :, None] == key_ids[:, None]), 0.0, MASK_VALUE)
    return scores + mask[:, None, None]


def _take_block(x: Array, index: Array, ring: Ring, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * ring.block, ring.block, axis)


def _add_block(x: Array, block: Array, index: Array, ring: Ring, axis: int) -> Array:
    total = _take_block(x, index, ring, axis) + block
    return jax.lax.dynamic_update_slice_in_dim(x, total, index * ring.block, axis)


def _take_segment_ids(query_ids: Array | None, key_ids: Array | None, pair: Any, ring: Ring) -> Any:
    if query_ids is None or key_ids is None:
        return None
    return _take_block(query_ids, pair[0], ring, 1), _take_block(key_ids, pair[1], ring, 1)


def _rotate(tree: Any, ring: Ring, shift: int) -> Any:
    """Send `tree` to the device `shift` ranks ahead, and return the received tree."""
    if shift % ring.size == 0:
        return tree
    permutation = [(i, (i + shift) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, permutation), tree)


def _local_block_pairs(step: RingStep, ring: Ring) -> Int[Array, "P 5"]:
    return jnp.asarray(step.block_pairs)[0 if ring.axis is None else jax.lax.axis_index(ring.axis)]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def ring_attention(
    q: Float[Array, "B K G T C"],
    k: Float[Array, "B K T C"],
    v: Float[Array, "B K T C"],
    segment_ids: Int[Array, "B T"] | None,
    slopes: Float[Array, "K G"] | None,
    sinks: Float[Array, "K G"] | None,
    ring: Ring,
) -> Float[Array, "B K G T C"]:
    """Return causal attention of scaled queries. The arrays are this device's shard, in zigzag order.

    `sinks` are the scores of an additional key of each head, whose value is zero.
    """
    return _forward(q, k, v, segment_ids, slopes, sinks, ring)[0]


def _forward(
    q: Array, k: Array, v: Array, segment_ids: Any, slopes: Any, sinks: Any, ring: Ring
) -> tuple[Array, tuple]:
    rotating = (k, v, segment_ids)
    shift = 0
    # Running maximum, sum of weights and weighted values of each query. The diagonal blocks come first, so the maximum
    # is the score of a visible key from the first step on.
    high = jnp.full(q.shape[:-1], MASK_VALUE, jnp.float32)
    total = jnp.zeros(q.shape[:-1], jnp.float32)
    if sinks is not None:
        high = jnp.broadcast_to(_over_queries(sinks), high.shape)
        total = jnp.ones_like(total)
    carry = (high, total, jnp.zeros(q.shape, jnp.float32))
    for step in make_block_schedule(q.shape[3], ring):
        rotating = _rotate(rotating, ring, step.shift - shift)
        shift = step.shift
        k_now, v_now, key_ids_now = rotating

        def accumulate(
            carry: Any, pair: Array, k: Any = k_now, v: Any = v_now, key_ids: Any = key_ids_now
        ) -> tuple[Any, None]:
            high, total, out = (_take_block(x, pair[0], ring, 3) for x in carry)
            ids = _take_segment_ids(segment_ids, key_ids, pair, ring)
            products = _products(_take_block(q, pair[0], ring, 3), _take_block(k, pair[1], ring, 2))
            scores = _block_scores(products, pair, ids, slopes, ring)
            new_high = jnp.maximum(high, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_high[..., None])
            correction = jnp.exp(high - new_high)
            block_out = jnp.einsum(
                "bkgts,bksc->bkgtc",
                weights.astype(v.dtype),
                _take_block(v, pair[1], ring, 2),
                preferred_element_type=jnp.float32,
            )
            updated = (
                new_high,
                total * correction + jnp.sum(weights, axis=-1),
                out * correction[..., None] + block_out,
            )
            start = pair[0] * ring.block
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, block, start, 3) for x, block in zip(carry, updated, strict=True)
            ), None

        carry, _ = jax.lax.scan(accumulate, carry, _local_block_pairs(step, ring))
    high, total, out = carry
    out = (out / total[..., None]).astype(q.dtype)
    return out, (q, k, v, segment_ids, slopes, sinks, out, high + jnp.log(total))


def _over_queries(sinks: Float[Array, "K G"]) -> Float[Array, "1 K G 1"]:
    return sinks.astype(jnp.float32)[None, :, :, None]


def _backward(ring: Ring, residuals: tuple, gradient: Array) -> tuple:
    q, k, v, segment_ids, slopes, sinks, out, log_total = residuals
    # The gradient of the softmax needs one number per query: the sum over keys of weight * gradient of the weight.
    row_sum = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dq = jnp.zeros(q.shape, jnp.float32)
    dkv = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    rotating = (k, v, segment_ids, dkv)
    shift = 0
    for step in make_block_schedule(q.shape[3], ring):
        rotating = _rotate(rotating, ring, step.shift - shift)
        shift = step.shift
        k_now, v_now, key_ids_now, dkv = rotating

        def accumulate(
            carry: Any, pair: Array, k: Any = k_now, v: Any = v_now, key_ids: Any = key_ids_now
        ) -> tuple[Any, None]:
            dq, dk, dv = carry
            queries = _take_block(q, pair[0], ring, 3)
            block_gradient = _take_block(gradient, pair[0], ring, 3)
            keys = _take_block(k, pair[1], ring, 2)
            values = _take_block(v, pair[1], ring, 2)
            ids = _take_segment_ids(segment_ids, key_ids, pair, ring)
            scores, scores_vjp = jax.vjp(
                lambda products: _block_scores(products, pair, ids, slopes, ring), _products(queries, keys)
            )
            weights = jnp.exp(scores - _take_block(log_total, pair[0], ring, 3)[..., None])
            matmul = partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_weights = matmul("bkgtc,bksc->bkgts", block_gradient, values)
            (d_products,) = scores_vjp(weights * (d_weights - _take_block(row_sum, pair[0], ring, 3)[..., None]))
            d_products = d_products.astype(q.dtype)
            d_values = matmul("bkgts,bkgtc->bksc", weights.astype(q.dtype), block_gradient)
            return (
                _add_block(dq, matmul("bkgts,bksc->bkgtc", d_products, keys), pair[0], ring, 3),
                _add_block(dk, matmul("bkgts,bkgtc->bksc", d_products, queries), pair[1], ring, 2),
                _add_block(dv, d_values, pair[1], ring, 2),
            ), None

        (dq, *dkv), _ = jax.lax.scan(accumulate, (dq, *dkv), _local_block_pairs(step, ring))
        rotating = (k_now, v_now, key_ids_now, tuple(dkv))
    dk, dv = _rotate(rotating[3], ring, -shift)
    d_sinks = None
    if sinks is not None:  # the value of a sink is zero, and so is the gradient of its weight
        weights = jnp.exp(_over_queries(sinks) - log_total)
        d_sinks = -jnp.sum(weights * row_sum, axis=(0, 3)).astype(sinks.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, d_sinks


ring_attention.defvjp(_forward, _backward)
