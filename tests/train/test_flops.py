# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Products are counted through loops, recomputation and programs written for one device of many."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mesh_transformer.config import MeshConfig
from mesh_transformer.mesh import make_layout
from mesh_transformer.train.flops import count_flops

ROWS, DIM, LAYERS = 8, 16, 3
PRODUCT = 2 * ROWS * DIM * DIM


def layers(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=LAYERS)[0]


def test_loops_and_recomputation():
    x, w = jnp.ones((ROWS, DIM)), jnp.ones((DIM, DIM))
    assert count_flops(layers, x, w) == LAYERS * PRODUCT

    def loss(w, layer):
        return jnp.sum(jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=LAYERS)[0])

    plain = count_flops(jax.grad(lambda w: loss(w, lambda x: jnp.tanh(x @ w))), w)
    again = count_flops(jax.grad(lambda w: loss(w, jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w)))), w)
    assert plain == 3 * LAYERS * PRODUCT
    assert again == (2 + 4 + 2) * LAYERS * PRODUCT


def test_one_devices_shapes_are_multiplied():
    mesh = make_layout(MeshConfig(data=2, fsdp=2, tensor=2)).mesh
    x, w = jnp.ones((ROWS, DIM)), jnp.ones((DIM, DIM))
    cut = P(("data", "fsdp"), None)
    sharded = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(cut, P(None, "tensor")), out_specs=P(cut[0], "tensor")
    )
    assert count_flops(sharded, x, w) == PRODUCT
