# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stages idle as little as the schedule says, and 1F1B keeps inputs of a few microbatches however many there are."""

import jax
import pytest

from mesh_transformer.config import ConfigError, parse_config
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.train.pipeline import bubble_share
from mesh_transformer.train.run import abstract_batch
from mesh_transformer.train.state import describe_state, state_shardings
from mesh_transformer.train.step import make_train_step


def make_config(accumulation: int, schedule: str = "1f1b", **mesh):
    return parse_config(
        {
            "model": dict(n_layers=4, d_model=32, n_heads=2, n_vocab=32, seq_len=16, remat="full"),
            "mesh": {"data": 1, "pipeline": 4, "pipeline_schedule": schedule, **mesh},
            "data": {"train": {"numbers": {"path": "made-up"}}},
            "train": dict(steps=10, batch_size=2 * accumulation, accumulation=accumulation),
        },
        where="test",
    )


def test_bubble():
    assert bubble_share(make_config(4)) == pytest.approx(3 / 7)
    assert bubble_share(make_config(32)) == pytest.approx(3 / 35)
    assert bubble_share(make_config(4, pipeline=1)) == 0


def test_stages_that_do_not_come_out_even_are_refused():
    with pytest.raises(ConfigError, match=r"mesh\.pipeline=3 does not divide model\.n_layers=4"):
        make_config(4, pipeline=3)


def temporary(accumulation: int, schedule: str) -> int:
    config = make_config(accumulation, schedule)
    layout = make_layout(config.mesh)
    shapes, axes = describe_state(config)
    shardings = state_shardings(layout, shapes, axes)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    with use_layout(layout):
        step = jax.jit(make_train_step(config), out_shardings=(shardings, None))
        program = step.lower(state, abstract_batch(config, layout)).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_the_microbatches():
    stream = 2 * 16 * 32 * 4  # bytes of a microbatch at a stage
    assert temporary(32, "1f1b") - temporary(8, "1f1b") < 8 * stream
    assert temporary(32, "gpipe") - temporary(8, "gpipe") > 24 * stream
