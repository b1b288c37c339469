# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The engine's decoding program, lowered from shapes alone: what sampling needs on hardware that is not there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ConfigError, ModelConfig, SampleConfig
from mesh_transformer.mesh import Layout
from mesh_transformer.model.params import STACK
from mesh_transformer.model.transformer import describe_params, init_cache
from mesh_transformer.plan.job import Job, Measured
from mesh_transformer.sample.engine import STOP_TOKENS
from mesh_transformer.sample.programs import Programs, Request, State
from mesh_transformer.sample.sampling import stack_options
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
    programs = Programs(model, {}, layout)
    params = _abstract_params(programs.config, layout)
    state, request = _abstract_request(programs, job, layout)
    lowered = programs.lower_decode(params, state, request)
    weights = sum(_held(leaf) for leaf in jax.tree.leaves(params))
    caches = sum(_held(leaf) for leaf in jax.tree.leaves(state.caches))
    shapes, axes = describe_state(job.config)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
    per_token = 2.0 * (count - model.n_vocab * model.d_model * (not model.tied_embeddings))
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
        kinds={"weights": weights, "cache": caches, "request": _size_of(state, request) - caches},
        gradients=0,
        fast=job.fast,
        sharding_table=format_parameters(shapes, axes, layout),
    )


def _abstract_params(model: ModelConfig, layout: Layout) -> Any:
    """Weights as the engine lays them out: every layer an array of its own, matrices in the activations' type."""

    def place(module: str, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
        dtype = jnp.dtype(model.dtype if name.startswith("w_") else "float32")
        stacked = axes[:1] == (STACK,)
        shape, axes, count = (shape[1:], axes[1:], shape[0]) if stacked else (shape, axes, 1)
        leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape, f"{module}/{name}"))
        return (leaf,) * count if stacked else leaf

    return {
        module: {name: place(module, name, info.shape, info.axes) for name, info in arrays.items()}
        for module, arrays in describe_params(model).items()
    }


def _abstract_request(programs: Programs, job: Job, layout: Layout) -> tuple[State, Request]:
    model, rows = programs.config, job.batch

    def batched(dtype: Any, *rest: int) -> Any:
        axes = ("batch", *["residual"] * len(rest))
        return jax.ShapeDtypeStruct((rows, *rest), dtype, sharding=layout.sharding(axes, (rows, *rest), "request"))

    shape = (rows, model.kv_heads, job.context, model.head_dim)
    where = layout.sharding(("batch", "kv_heads", "position", "head_dim"), shape, "cache")
    layer = jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype), sharding=where)
    stacked = jax.eval_shape(lambda: init_cache(model, rows, job.context))
    caches = jax.tree.map(lambda leaf: (layer,) * leaf.shape[0], stacked)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    options = jax.eval_shape(lambda: stack_options([SampleConfig()] * rows))
    options = jax.tree.map(lambda leaf: batched(leaf.dtype), options)
    stop_tokens: Any = jax.ShapeDtypeStruct((STOP_TOKENS,), np.int32)
    request = Request(
        keys=batched(keys.dtype),
        options=options,
        prompt=batched(bool, model.n_vocab),
        limit=batched(np.int32),
        stop_tokens=stop_tokens,
    )
    state = State(caches, batched(np.int32), batched(np.int32), batched(bool), batched(np.int32, model.n_vocab))
    return state, request


def _held(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _size_of(state: State, request: Request) -> int:
    leaves = [leaf for leaf in jax.tree.leaves((state, request)) if leaf.sharding is not None]
    return sum(_held(leaf) for leaf in leaves)
