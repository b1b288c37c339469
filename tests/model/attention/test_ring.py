# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Blockwise and ring attention: the block schedule, equality with dense attention, and memory linear in the length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.model.attention.dense import dense_attention
from mesh_transformer.model.attention.ring import (
    Ring,
    from_zigzag,
    make_block_schedule,
    ring_attention,
    to_zigzag,
    zigzag_order,
)

UNSCALED = ModelConfig(n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, n_vocab=8, seq_len=24, attention_scale="none")


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize(("size", "block"), [(1, 4), (4, 4), (4, 2)])
def test_every_visible_pair_is_scheduled_once_on_the_device_that_holds_it(size, block, window):
    length = 32
    order = zigzag_order(length, size).reshape(size, -1)
    counts = np.zeros((length, length), int)
    for shift, block_pairs in make_block_schedule(length // size, Ring("context", size, block, window)):
        for device, pairs in enumerate(block_pairs):
            for query_block, key_block, query, key, is_counted in pairs:
                if is_counted:
                    counts[query : query + block, key : key + block] += 1
                    assert order[device][query_block * block] == query
                    assert order[(device - shift) % size][key_block * block] == key
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = (distance >= 0) & (distance < (window or length))
    assert (counts[visible] == 1).all()
    assert counts.max() == 1
    if block == 2 and window == 3:
        assert counts.sum() < visible.sum() * 3, "blocks outside the window are scheduled"


def test_devices_of_a_ring_have_equal_work():
    steps = make_block_schedule(32, Ring("context", 8, 4, None))
    assert [step.shift for step in steps] == list(range(8))
    for step in steps:
        assert (step.block_pairs[..., 4] == 1).all(), "devices have unequal work"
    # A window needs the keys of neighboring devices only.
    windowed = make_block_schedule(32, Ring("context", 8, 4, 4))
    assert [step.shift for step in windowed] == [0, 1, 7]


def test_zigzag_order_and_back():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    x = jnp.arange(2 * 16).reshape(2, 16)
    with use_layout(make_layout(MeshConfig(data=1, context=4))):
        reordered = to_zigzag(x)
        assert reordered[0].tolist() != x[0].tolist()
        np.testing.assert_array_equal(from_zigzag(reordered), x)
        with pytest.raises(ConfigError, match=r"sequence length 12 is not divisible by 2 \* mesh.context = 8"):
            to_zigzag(x[:, :12])
    assert to_zigzag(x) is x


def make_arrays(length: int):
    keys = jax.random.split(jax.random.key(0), 4)
    q, gradient = (jax.random.normal(key, (2, length, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[2:])
    return q, k, v, gradient


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 5])
def test_blockwise_equals_dense_forward_and_backward(window, softcap):
    config = dataclasses.replace(UNSCALED, attention_softcap=softcap)
    q, k, v, gradient = make_arrays(24)
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], 8, axis=1))
    slopes = jnp.array([0.5, 0.25, 0.125, 0.0625])
    distance = jnp.arange(24)[:, None] - jnp.arange(24)[None]
    visible = (distance >= 0)[None] & (segment_ids[:, :, None] == segment_ids[:, None])
    bias = -slopes[None, :, None, None] * distance[None, None]

    def dense(q, k, v):
        mask = visible if window is None else visible & (distance < window)[None]
        return dense_attention(0.3 * q, k, v, mask, bias, config)

    def blockwise(q, k, v):
        heads = (0.3 * q).reshape(2, 24, 2, 2, 8).transpose(0, 2, 3, 1, 4)
        ring = Ring(None, 1, 8, window, config)
        out = ring_attention(heads, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids, slopes.reshape(2, 2), None, ring)
        return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)

    wanted, back = jax.vjp(dense, q, k, v)
    found, own_back = jax.jit(lambda *x: jax.vjp(blockwise, *x))(q, k, v)
    unsegmented = dense_attention(0.3 * q, k, v, (distance >= 0)[None], bias, config)
    assert np.abs(wanted - unsegmented).max() > 0.1, "the segment IDs have no effect"
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    for a, b in zip(own_back(gradient), back(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_sinks_take_part_in_the_softmax():
    q, k, v, gradient = make_arrays(24)
    sinks = jnp.array([0.5, -1.0, 2.0, 0.0])
    mask = jnp.tril(jnp.ones((1, 24, 24), bool))

    def explicit(q, k, v, sinks):
        scores = jnp.einsum("bthc,bshc->bhts", q, jnp.repeat(k, 2, axis=2))
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
        extra = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, extra], axis=-1))[..., :-1]
        return jnp.einsum("bhts,bshc->bthc", weights, jnp.repeat(v, 2, axis=2))

    def dense(q, k, v, sinks):
        return dense_attention(q, k, v, mask, None, UNSCALED, sinks)

    def blockwise(q, k, v, sinks):
        heads = q.reshape(2, 24, 2, 2, 8).transpose(0, 2, 3, 1, 4)
        own = sinks.reshape(2, 2)
        out = ring_attention(heads, k.swapaxes(1, 2), v.swapaxes(1, 2), None, None, own, Ring(None, 1, 8, None))
        return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)

    wanted, back = jax.vjp(explicit, q, k, v, sinks)
    assert np.abs(wanted - explicit(q, k, v, sinks - 9.0)).max() > 0.1, "the sinks have no effect"
    for function in (dense, blockwise):
        found, own_back = jax.jit(lambda *x, function=function: jax.vjp(function, *x))(q, k, v, sinks)
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        for a, b in zip(own_back(gradient), back(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_memory_is_linear_in_the_length():
    def temporary(length: int, block: int) -> int:
        shapes = [
            jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32) for shape in ((1, length, 8), (length, 8), (length, 8))
        ]

        def loss(q, k, v):
            return jnp.sum(ring_attention(q, k, v, None, None, None, Ring(None, 1, block, None)))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short = temporary(1024, 128)
    long = temporary(4096, 128)
    assert long < 4.5 * short
    assert long < 4096**2 * 4 / 8, "the scores of all pairs are materialized"
