# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compilation of the training and evaluation steps, and abstract arguments for compiling without data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.config import Config
from mesh_transformer.data.loader import Batch
from mesh_transformer.distributed.coordination import gather, process_count
from mesh_transformer.mesh import MeshLayout, use_layout
from mesh_transformer.train.state import TrainState
from mesh_transformer.train.step import make_eval_step, make_train_step


def jit_train_step(config: Config, layout: MeshLayout, shardings: TrainState) -> Any:
    """Return the jitted training step, which training and the planner share. A call donates the state."""
    step = with_layout(make_train_step(config), layout)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(layout)))


def jit_eval_step(config: Config, layout: MeshLayout) -> Any:
    """Return the jitted evaluation step."""
    return jax.jit(with_layout(make_eval_step(config), layout), out_shardings=replicated(layout))


def replicated(layout: MeshLayout) -> NamedSharding:
    """Return the fully replicated sharding, for values that the host reads in every process."""
    return NamedSharding(layout.mesh, PartitionSpec())


def with_layout(function: Callable[..., Any], layout: MeshLayout) -> Callable[..., Any]:
    """Wrap `function` so that it is always traced under `layout`."""

    def wrapped(*args: Any) -> Any:
        with use_layout(layout):
            return function(*args)

    return wrapped


def compile_barrier(step: Any) -> Callable[..., Any]:
    """Wrap a jitted function of (state, batch) so that all processes compile it before any process runs it.

    Otherwise one process could wait in its first collective while another still compiles, and XLA's CPU collectives
    time out after 30 s.
    """
    if process_count() == 1:
        return step
    compiled: dict[tuple[int, ...], Callable[..., Any]] = {}

    def compile_and_run(state: Any, batch: Batch) -> Any:
        shape = batch.tokens.shape
        if shape not in compiled:
            compiled[shape] = step.lower(state, batch).compile()
            gather("compiled", "")
        return compiled[shape](state, batch)

    return compile_and_run


def abstract_state(shapes: TrainState, shardings: TrainState) -> TrainState:
    """Return a state of jax.ShapeDtypeStructs with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def abstract_batch(config: Config, layout: MeshLayout | None = None) -> Batch:
    """Return a global batch of jax.ShapeDtypeStructs, with shardings if there is a layout."""

    def describe(length: int, dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        shape = (config.train.batch_size, length)
        sharding = layout and layout.sharding(("batch", "sequence"), shape, "batch")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    integers = describe(config.target_len)
    mask = describe(config.target_len, np.float32)
    encoder_tokens = config.model.n_encoder_layers and describe(config.model.seq_len)
    return Batch(integers, integers, integers, integers, mask, encoder_tokens)


def config_for_flops(config: Config) -> Config:
    """Return the configuration for counting the model's FLOPs: no recomputation or pipeline, and the default attention kernel."""
    model = dataclasses.replace(config.model, remat="none", attention_kernel="auto")
    return dataclasses.replace(config, model=model, mesh=dataclasses.replace(config.mesh, pipeline=1))
