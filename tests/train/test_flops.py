# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests that matmuls are counted inside loops, recomputation and shard_map."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mesh_transformer.config import MeshConfig
from mesh_transformer.mesh import make_layout
from mesh_transformer.train.flops import count_flops

ROWS, DIM, LAYERS = 8, 16, 3
MATMUL = 2 * ROWS * DIM * DIM


def layers(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=LAYERS)[0]


def test_loops_and_recomputation():
    x, w = jnp.ones((ROWS, DIM)), jnp.ones((DIM, DIM))
    assert count_flops(layers, x, w) == LAYERS * MATMUL

    def loss(w, layer):
        return jnp.sum(jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=LAYERS)[0])

    saved = count_flops(jax.grad(lambda w: loss(w, lambda x: jnp.tanh(x @ w))), w)
    recomputed = count_flops(jax.grad(lambda w: loss(w, jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w)))), w)
    assert saved == 3 * LAYERS * MATMUL
    assert recomputed == (2 + 4 + 2) * LAYERS * MATMUL


def test_shapes_inside_shard_map_are_multiplied_by_the_devices():
    mesh = make_layout(MeshConfig(data=2, fsdp=2, tensor=2)).mesh
    x, w = jnp.ones((ROWS, DIM)), jnp.ones((DIM, DIM))
    batch_spec = P(("data", "fsdp"), None)
    sharded = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(batch_spec, P(None, "tensor")), out_specs=P(batch_spec[0], "tensor")
    )
    assert count_flops(sharded, x, w) == MATMUL
