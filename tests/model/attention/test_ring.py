# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Blocks meet exactly the blocks they see, every device of a ring has the same to do, and memory grows with the sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, MeshConfig
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.model.attention.dense import dense_attention
from mesh_transformer.model.attention.ring import (
    Ring,
    ring_attention,
    from_zigzag,
    make_block_schedule,
    zigzag_order,
    to_zigzag,
)


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize(("size", "block"), [(1, 4), (4, 4), (4, 2)])
def test_every_visible_pair_of_places_is_met_once_and_by_its_owner(size, block, window):
    length = 32
    order = zigzag_order(length, size).reshape(size, -1)
    met = np.zeros((length, length), int)
    for shift, pairs in make_block_schedule(length // size, Ring("context", size, block, window)):
        for device, rows in enumerate(pairs):
            for query_block, key_block, query, key, counts in rows:
                if counts:
                    met[query : query + block, key : key + block] += 1
                    assert order[device][query_block * block] == query
                    assert order[(device - shift) % size][key_block * block] == key
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = (distance >= 0) & (distance < (window or length))
    assert (met[visible] == 1).all()
    assert met.max() == 1
    if block == 2 and window == 3:
        assert met.sum() < visible.sum() * 3, "far blocks are left out"


def test_devices_of_a_ring_have_equally_much_to_do():
    steps = make_block_schedule(32, Ring("context", 8, 4, None))
    assert [step.shift for step in steps] == list(range(8))
    for step in steps:
        assert (step.block_pairs[..., 4] == 1).all(), "a device would wait for another"
    # Without pieces from both ends the last device would have eight times the work of the first.
    near = make_block_schedule(32, Ring("context", 8, 4, 4))
    assert [step.shift for step in near] == [0, 1, 7], "a window needs neighbours alone"


def test_order_of_a_ring_and_back():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    x = jnp.arange(2 * 16).reshape(2, 16)
    with use_layout(make_layout(MeshConfig(data=1, context=4))):
        held = to_zigzag(x)
        assert held[0].tolist() != x[0].tolist()
        np.testing.assert_array_equal(from_zigzag(held), x)
        with pytest.raises(ConfigError, match=r"a sequence of 12 does not make 2 pieces for each of 4 devices"):
            to_zigzag(x[:, :12])
    assert to_zigzag(x) is x


def make_arrays(length: int):
    keys = jax.random.split(jax.random.key(0), 4)
    q, gradient = (jax.random.normal(key, (2, length, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[2:])
    return q, k, v, gradient


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_equal_all_at_once_forward_and_backward(window):
    q, k, v, gradient = make_arrays(24)
    segments = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], 8, axis=1))
    slopes = jnp.array([0.5, 0.25, 0.125, 0.0625])
    distance = jnp.arange(24)[:, None] - jnp.arange(24)[None]
    visible = (distance >= 0)[None] & (segments[:, :, None] == segments[:, None])
    bias = -slopes[None, :, None, None] * distance[None, None]

    def plain(q, k, v):
        seen = visible if window is None else visible & (distance < window)[None]
        return dense_attention(q, k, v, seen, bias, scale=0.3)

    def blocked(q, k, v):
        heads = (0.3 * q).reshape(2, 24, 2, 2, 8).transpose(0, 2, 3, 1, 4)
        ring = Ring(None, 1, 8, window)
        mixed = ring_attention(heads, k.swapaxes(1, 2), v.swapaxes(1, 2), segments, slopes.reshape(2, 2), ring)
        return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)

    wanted, back = jax.vjp(plain, q, k, v)
    found, own_back = jax.jit(lambda *x: jax.vjp(blocked, *x))(q, k, v)
    unseen = dense_attention(q, k, v, (distance >= 0)[None], bias, scale=0.3)
    assert np.abs(wanted - unseen).max() > 0.1, "segments make no difference"
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    for a, b in zip(own_back(gradient), back(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_memory_grows_with_the_sequence_and_not_its_square():
    def temporary(length: int, block: int) -> int:
        shapes = [
            jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32) for shape in ((1, length, 8), (length, 8), (length, 8))
        ]

        def loss(q, k, v):
            return jnp.sum(ring_attention(q, k, v, None, None, Ring(None, 1, block, None)))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(1024, 128), temporary(4096, 128)
    assert long < 4.5 * short
    assert long < 4096**2 * 4 / 8, "scores of all pairs exist"
