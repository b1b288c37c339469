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
from mesh_transformer.model.quantized import Quantized
from mesh_transformer.model.transformer import describe_params
from mesh_transformer.plan.job import Job, Measured
from mesh_transformer.sample.programs import Programs
from mesh_transformer.sample.requests import Row, stack_rows
from mesh_transformer.sample.state import State
from mesh_transformer.sample.weights import contracted_dims
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
    programs = Programs(model, {}, layout, weights=serve.weights, cache=serve.cache)
    params = _abstract_params(programs.config, layout, serve.weights)
    state = _abstract_state(programs, job, layout)
    lowered = programs.lower_decode(params, state)
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
        kinds={
            "weights": weights,
            "cache": caches,
            "request": sum(_held(leaf) for leaf in jax.tree.leaves(state)) - caches,
        },
        gradients=0,
        fast=job.fast,
        sharding_table=format_parameters(shapes, axes, layout),
    )


def _abstract_params(model: ModelConfig, layout: Layout, weights: str) -> Any:
    """Weights as sample/weights.py lays them out; as saved means in the activations' type, or narrower."""

    def place(module: str, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
        stacked = axes[:1] == (STACK,)
        shape, axes, count = (shape[1:], axes[1:], shape[0]) if stacked else (shape, axes, 1)
        contracted = contracted_dims(name, axes)
        dtype = jnp.dtype("float32" if not contracted else model.dtype if weights == "saved" else weights)
        leaf: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape, f"{module}/{name}"))
        if contracted and weights == "int8":
            axes = tuple("window" if dim in contracted else axis for dim, axis in enumerate(axes))
            scales = tuple(1 if dim in contracted else size for dim, size in enumerate(shape))
            place_of = layout.sharding(axes, scales, f"{module}/{name}")
            scale: Any = jax.ShapeDtypeStruct(scales, jnp.float32, sharding=place_of)
            leaf = Quantized(leaf, scale)
        return jax.tree.map(lambda x: (x,) * count, leaf) if stacked else leaf

    return {
        module: {name: place(module, name, info.shape, info.axes) for name, info in arrays.items()}
        for module, arrays in describe_params(model).items()
    }


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
