# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of pipeline parallelism: bubble, memory of 1F1B, and router statistics and gradients."""

import jax
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, parse_config
from mesh_transformer.data.loader import Batch
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.train.compile import abstract_batch
from mesh_transformer.train.pipeline import bubble_fraction
from mesh_transformer.train.state import describe_state, state_shardings
from mesh_transformer.train.step import make_gradients, make_train_step


def make_config(n_microbatches: int, schedule: str = "1f1b", **mesh):
    return parse_config(
        {
            "model": dict(n_layers=4, d_model=32, n_heads=2, n_vocab=32, seq_len=16, remat="full"),
            "mesh": {"data": 1, "pipeline": 4, "pipeline_schedule": schedule, **mesh},
            "data": {"train": {"numbers": {"path": "made-up"}}},
            "train": dict(steps=10, batch_size=2 * n_microbatches, grad_accum_steps=n_microbatches),
        },
        where="test",
    )


def test_bubble_fraction():
    assert bubble_fraction(make_config(4)) == pytest.approx(3 / 7)
    assert bubble_fraction(make_config(32)) == pytest.approx(3 / 35)
    assert bubble_fraction(make_config(4, pipeline=1)) == 0


def test_layers_must_be_divisible_by_stages():
    with pytest.raises(ConfigError, match=r"mesh\.pipeline=3 does not divide the 4 repetitions"):
        make_config(4, pipeline=3)


def temp_bytes(n_microbatches: int, schedule: str) -> int:
    config = make_config(n_microbatches, schedule)
    layout = make_layout(config.mesh)
    shapes, axes = describe_state(config)
    shardings = state_shardings(layout, shapes, axes)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    with use_layout(layout):
        step = jax.jit(make_train_step(config), out_shardings=(shardings, None))
        program = step.lower(state, abstract_batch(config, layout)).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_is_independent_of_the_number_of_microbatches():
    activation_bytes = 2 * 16 * 32 * 4  # of a microbatch on a stage
    assert temp_bytes(32, "1f1b") - temp_bytes(8, "1f1b") < 8 * activation_bytes
    assert temp_bytes(32, "gpipe") - temp_bytes(8, "gpipe") > 24 * activation_bytes


EXPERTS = dict(n_experts=4, capacity_factor=0.8, group_size=2, aux_loss_weight=0.3)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_router_statistics_and_gradients_equal_one_device(schedule):
    """Loads, fractions and router losses by layer, and all gradients, equal those of gradient accumulation on one device."""
    sizes = dict(n_layers=2, d_model=8, n_heads=1, n_vocab=16, seq_len=8, d_ff=8, positions="rope-half", norm="rmsnorm")
    rng = np.random.default_rng(0)
    tokens, ones = rng.integers(0, 16, (6, 9), dtype=np.int32), np.ones((6, 8), np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32), (6, 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, ones.astype(np.float32))
    params: dict = {}

    def compute_gradients(**mesh):
        table = {
            "model": dict(sizes, ff_bias=False, qkv_bias=False, experts=EXPERTS),
            "mesh": {"data": 1, "pipeline_schedule": schedule, **mesh},
            "data": {"train": {"numbers": {"path": "made-up"}}},
            "train": dict(steps=10, batch_size=6, grad_accum_steps=3),
        }
        config = parse_config(table, where="test")
        layout = make_layout(config.mesh, jax.devices()[: config.mesh.pipeline * config.mesh.expert])
        for module, infos in () if params else describe_params(config.model).items():
            params[module] = {name: 0.3 * rng.normal(size=i.shape).astype(np.float32) for name, i in infos.items()}

        def with_layout(params, batch, key):
            with use_layout(layout):
                return make_gradients(config)(params, batch, key)

        return jax.jit(with_layout)(params, batch, jax.random.key(1))

    expected = compute_gradients()
    found = compute_gradients(pipeline=2, expert=2)
    assert expected.losses.routing is not None
    assert float(expected.losses.routing.dropped_fraction.min()) > 0
    assert expected.losses.routing.expert_load.shape == (2, 4)
    for one, other in zip(jax.tree.leaves(expected[:2]), jax.tree.leaves(found[:2]), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max(), rtol=0)
