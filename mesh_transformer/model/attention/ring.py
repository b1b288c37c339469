# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention block by block with an online softmax, alone or as a ring: memory grows with the sequence, not its square.

A ring (Liu et al. 2023) is n devices along a mesh axis, each with 1/n of a sequence: its queries stay, keys and values go
round. Causality would leave the first device idle and the last one busy, so the sequence is cut into 2n pieces and
device i holds pieces i and 2n-1-i: in every step after the first each device has the same two of four squares to do.
Which blocks of queries meet which blocks of keys in which step is a table (`make_steps`); a single device is a ring
of one, and a window shortens the table, whole steps of the ring included.

Bytes sent by each device: forward, its keys and values once per step, 2 (n-1) B T/n K C elements; backward the same
again and their gradients in float32 with one step more. All of it overlaps with the blocks' products.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from mesh_transformer.config import ConfigError
from mesh_transformer.mesh import constrain, current_layout
from mesh_transformer.model.attention.dense import MASK_VALUE


class Ring(NamedTuple):
    """How blocks are cut and where they travel."""

    axis: str | None  # mesh axis, inside shard_map; None: one device
    size: int  # devices on it
    block: int  # places
    window: int | None  # a query sees this many keys, itself included; None: all before it


class RingStep(NamedTuple):
    """What every device does while it has the keys of the device `shift` places before it."""

    shift: int
    # Row for each device; columns: block of queries, block of keys, first place of each, and whether to count it at all.
    block_pairs: Int[np.ndarray, "n P 5"]


def zigzag_order(length: int, size: int) -> Int[np.ndarray, "T"]:
    """Places of a sequence in the order in which a ring of `size` devices holds them; `length` is a multiple of 2 size."""
    if size == 1:
        return np.arange(length)
    pieces = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([np.concatenate([pieces[i], pieces[2 * size - 1 - i]]) for i in range(size)])


def to_zigzag(x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B T *rest"]:
    """Along the sequence as the devices of a ring hold it; unchanged where sequences are not cut."""
    return _reorder(x, zigzag_order)


def from_zigzag(x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B T *rest"]:
    """Along the sequence as it is read. Moves all of x between devices."""
    return _reorder(x, lambda *sizes: np.argsort(zigzag_order(*sizes)))


def _reorder(x: Array, order: Callable[[int, int], np.ndarray]) -> Array:
    layout = current_layout()
    size = 1 if layout is None else layout.num_shards("sequence")
    if size == 1:
        return x
    if x.shape[1] % (2 * size):
        raise ConfigError(
            f"a sequence of {x.shape[1]} does not make 2 pieces for each of {size} devices; change mesh.context or seq_len"
        )
    axes = ("batch", "sequence", *["activation_embed"] * (x.ndim - 2))
    return constrain(x[:, order(x.shape[1], size)], *axes)


@cache
def make_block_schedule(length: int, ring: Ring) -> list[RingStep]:
    """The table for `length` places on each device: every pair of blocks of which something is visible, once."""
    n, block = ring.size, ring.block
    starts = zigzag_order(n * length, n).reshape(n, -1, block)[:, :, 0]
    steps = []
    for shift in range(n):
        rows = []
        for device in range(n):
            queries, keys = starts[device], starts[(device - shift) % n]
            rows.append(
                [
                    (i, j, q, k, 1)
                    for i, q in enumerate(queries)
                    for j, k in enumerate(keys)
                    if k <= q and (ring.window is None or q - k - block + 1 < ring.window)
                ]
            )
        longest = max(map(len, rows))
        # Devices with less to do repeat a pair without counting it: all walk through the same program.
        filled = [row + [(0, 0, queries[0], queries[0], 0)] * (longest - len(row)) for row in rows]
        if longest:
            steps.append(RingStep(shift, np.array(filled, np.int32)))
    return steps


def _scores(
    q: Array, k: Array, pair: Any, segments: Any, slopes: Array | None, ring: Ring
) -> Float[Array, "B K G T S"]:
    """Of one block of queries and one of keys, in float32, with what is hidden far below zero."""
    scores = jnp.einsum("bkgtc,bksc->bkgts", q, k, preferred_element_type=jnp.float32)
    block = jnp.arange(ring.block)
    distance = (pair[2] + block)[:, None] - (pair[3] + block)[None]
    visible = (distance >= 0) & (pair[4] > 0)
    if ring.window is not None:
        visible = visible & (distance < ring.window)
    if slopes is not None:
        scores = scores - slopes[None, :, :, None, None] * distance[None, None, None].astype(jnp.float32)
    hidden = jnp.where(visible, 0.0, MASK_VALUE)[None]
    if segments is not None:
        hidden = jnp.where(visible[None] & (segments[0][:, :, None] == segments[1][:, None]), 0.0, MASK_VALUE)
    return scores + hidden[:, None, None]


def _take(x: Array, index: Array, ring: Ring, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * ring.block, ring.block, axis)


def _add(x: Array, part: Array, index: Array, ring: Ring, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _take(x, index, ring, axis) + part, index * ring.block, axis)


def _take_segments(own: Array | None, other: Array | None, pair: Any, ring: Ring) -> Any:
    return None if own is None else (_take(own, pair[0], ring, 1), _take(other, pair[1], ring, 1))  # type: ignore[arg-type]


def _rotate(moving: Any, ring: Ring, distance: int) -> Any:
    """What the device `distance` places before had."""
    if distance % ring.size == 0:
        return moving
    routes = [(i, (i + distance) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, routes), moving)


def _local_block_pairs(step: RingStep, ring: Ring) -> Int[Array, "P 5"]:
    return jnp.asarray(step.block_pairs)[0 if ring.axis is None else jax.lax.axis_index(ring.axis)]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def ring_attention(
    q: Float[Array, "B K G T C"],
    k: Float[Array, "B K T C"],
    v: Float[Array, "B K T C"],
    segments: Int[Array, "B T"] | None,
    slopes: Float[Array, "K G"] | None,
    ring: Ring,
) -> Float[Array, "B K G T C"]:
    """Causal attention of scaled queries; arrays are this device's part of the sequence, in ring order."""
    return _forward(q, k, v, segments, slopes, ring)[0]


def _forward(q: Array, k: Array, v: Array, segments: Any, slopes: Any, ring: Ring) -> tuple[Array, tuple]:
    moving, at = (k, v, segments), 0
    # Running maximum, sum and mixture of every query; the diagonal comes first, so the maximum is real from then on.
    carry = (
        jnp.full(q.shape[:-1], MASK_VALUE, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    for step in make_block_schedule(q.shape[3], ring):
        moving, at = _rotate(moving, ring, step.shift - at), step.shift
        k_now, v_now, segments_now = moving

        def fold(
            carry: Any, pair: Array, k: Any = k_now, v: Any = v_now, other: Any = segments_now
        ) -> tuple[Any, None]:
            high, total, mixed = (_take(x, pair[0], ring, 3) for x in carry)
            own = _take_segments(segments, other, pair, ring)
            scores = _scores(_take(q, pair[0], ring, 3), _take(k, pair[1], ring, 2), pair, own, slopes, ring)
            higher = jnp.maximum(high, jnp.max(scores, axis=-1))
            weights, faded = jnp.exp(scores - higher[..., None]), jnp.exp(high - higher)
            seen = jnp.einsum(
                "bkgts,bksc->bkgtc",
                weights.astype(v.dtype),
                _take(v, pair[1], ring, 2),
                preferred_element_type=jnp.float32,
            )
            new = (higher, total * faded + jnp.sum(weights, axis=-1), mixed * faded[..., None] + seen)
            start = pair[0] * ring.block
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, part, start, 3) for x, part in zip(carry, new, strict=True)
            ), None

        carry, _ = jax.lax.scan(fold, carry, _local_block_pairs(step, ring))
    high, total, mixed = carry
    out = (mixed / total[..., None]).astype(q.dtype)
    return out, (q, k, v, segments, slopes, out, high + jnp.log(total))


def _backward(ring: Ring, kept: tuple, gradient: Array) -> tuple:
    q, k, v, segments, slopes, out, log_total = kept
    # The softmax's own gradient needs one number per query: sum over keys of weight x its gradient.
    along = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dq, dkv = jnp.zeros(q.shape, jnp.float32), (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    moving, at = (k, v, segments, dkv), 0
    for step in make_block_schedule(q.shape[3], ring):
        moving, at = _rotate(moving, ring, step.shift - at), step.shift
        k_now, v_now, segments_now, dkv = moving

        def fold(
            carry: Any, pair: Array, k: Any = k_now, v: Any = v_now, other: Any = segments_now
        ) -> tuple[Any, None]:
            dq, dk, dv = carry
            queries, outer = _take(q, pair[0], ring, 3), _take(gradient, pair[0], ring, 3)
            keys, values = _take(k, pair[1], ring, 2), _take(v, pair[1], ring, 2)
            own = _take_segments(segments, other, pair, ring)
            scores = _scores(queries, keys, pair, own, slopes, ring)
            weights = jnp.exp(scores - _take(log_total, pair[0], ring, 3)[..., None])
            product = partial(jnp.einsum, preferred_element_type=jnp.float32)
            inner = product("bkgtc,bksc->bkgts", outer, values) - _take(along, pair[0], ring, 3)[..., None]
            inner = (weights * inner).astype(q.dtype)
            return (
                _add(dq, product("bkgts,bksc->bkgtc", inner, keys), pair[0], ring, 3),
                _add(dk, product("bkgts,bkgtc->bksc", inner, queries), pair[1], ring, 2),
                _add(dv, product("bkgts,bkgtc->bksc", weights.astype(q.dtype), outer), pair[1], ring, 2),
            ), None

        (dq, *dkv), _ = jax.lax.scan(fold, (dq, *dkv), _local_block_pairs(step, ring))
        moving = (k_now, v_now, segments_now, tuple(dkv))
    dk, dv = _rotate(moving[3], ring, -at)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


ring_attention.defvjp(_forward, _backward)
