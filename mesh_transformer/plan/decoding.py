# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The engine's decoding program, lowered from shapes alone: what sampling needs on hardware that is not there."""

import math
from typing import Any

import jax
import numpy as np

from mesh_transformer.config import ConfigError, SampleConfig
from mesh_transformer.mesh import Layout
from mesh_transformer.plan.estimate import count_active, describe_model
from mesh_transformer.plan.job import Job, Measured
from mesh_transformer.sample.programs import Programs
from mesh_transformer.sample.requests import Row, stack_rows
from mesh_transformer.sample.state import State
from mesh_transformer.train.state import describe_state, format_parameters


def lower_decoding(job: Job, layout: Layout) -> tuple[Any, Measured]:
    """The program that draws tokens for `job.batch` rows with caches of `job.context` tokens.

    The figures are of one token of every row: the program's loop over tokens counts once. Raises ConfigError where rows
    or context do not fit.
    """
    model = job.config.model
    if job.batch % layout.batch_pieces:
        raise ConfigError(
            f"--batch {job.batch}: rows do not divide over {layout.batch_pieces} device(s) along the batch; "
            f"use a multiple of {layout.batch_pieces}, or another mesh (--set mesh.fsdp=1 --set mesh.tensor=...)"
        )
    if job.context > model.seq_len:
        raise ConfigError(f"--context {job.context}: the model reads at most model.seq_len = {model.seq_len} tokens")
    serve = job.config.serve
    shapes, axes = describe_state(job.config)
    programs = Programs(model, shapes.params, layout, weights=serve.weights, cache=serve.cache)
    state = _abstract_state(programs, job, layout)
    lowered = programs.lower_decode(state)
    weights = sum(_held(leaf) for leaf in jax.tree.leaves(programs.weights))
    caches = sum(_held(leaf) for leaf in jax.tree.leaves(state.caches))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
    chosen = model.experts.per_token if model.experts else 0.0
    active = count_active(describe_model(job.config.model), chosen, model)
    per_token = 2.0 * (active - model.n_vocab * model.d_model * (not model.tied_embeddings))
    attention = 4.0 * model.n_layers * model.n_heads * model.head_dim * job.context
    return lowered, Measured(
        topology=job.topology,
        platform=layout.mesh.devices.flat[0].platform,
        devices=layout.mesh.size,
        mesh=dict(layout.mesh.shape),
        parameters=count,
        tokens=job.batch,
        flops=(per_token + attention) * job.batch,
        hardware_flops=(per_token + attention) * job.batch,
        kinds={
            "weights": weights,
            "cache": caches,
            "request": sum(_held(leaf) for leaf in jax.tree.leaves(state)) - caches,
        },
        gradients=0,
        fast=job.fast,
        sharding_table=format_parameters(shapes, axes, layout),
    )


def _abstract_state(programs: Programs, job: Job, layout: Layout) -> State:
    """`job.batch` seated rows, as shapes and places."""
    asked = jax.eval_shape(
        lambda: stack_rows([Row(0, np.zeros(1, np.int32), SampleConfig(), 1)], programs.config.n_vocab)
    )
    state = jax.eval_shape(lambda like: programs.empty_state(like, job.batch, job.context), asked)

    def place(leaf: jax.ShapeDtypeStruct, *axes: str) -> jax.ShapeDtypeStruct:
        axes = axes or ("batch", *["residual"] * (leaf.ndim - 1))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(axes, leaf.shape, "state"))

    caches = jax.tree.map(lambda leaf: place(leaf, "batch", "kv_heads", "position", "head_dim"), state.caches)
    return jax.tree.map(place, state._replace(caches=None))._replace(caches=caches)


def _held(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
