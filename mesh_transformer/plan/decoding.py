# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The engines' programs, lowered from shapes alone: what sampling needs on hardware that is not there.

Of a decoder alone the program that draws tokens for rows with full caches. Of a model with an encoder the program that
writes a token behind texts that were read, and the one that reads them.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.config import ConfigError, ModelConfig, SampleConfig
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.model.params import ParamInfo
from mesh_transformer.plan.estimate import count_active, describe_model
from mesh_transformer.plan.job import CompiledStats, CompileJob
from mesh_transformer.sample.engine.device_state import DecodeState
from mesh_transformer.sample.engine.encoder_decoder_programs import EncoderDecoderPrograms, EncoderDecoderState
from mesh_transformer.sample.engine.programs import EnginePrograms
from mesh_transformer.sample.engine.requests import blank_params
from mesh_transformer.sample.sampling import make_options
from mesh_transformer.train.state import describe_state, format_parameters


def lower_decode(job: CompileJob, layout: MeshLayout) -> tuple[Any, CompiledStats]:
    """The program that draws tokens for `job.batch` rows with caches of `job.context` tokens.

    The figures are of one token of every row: the program's loop over tokens counts once. Raises ConfigError where rows
    or context do not fit.
    """
    _check(job, layout)
    model, serve = job.config.model, job.config.serve
    shapes, _ = describe_state(job.config)
    programs = EnginePrograms(
        model, shapes.params, layout, weight_dtype=serve.weight_dtype, kv_cache_dtype=serve.kv_cache_dtype
    )
    params = jax.eval_shape(lambda: blank_params(model.n_vocab))
    state = jax.eval_shape(lambda like: programs.empty_state(like, job.batch, job.context), params)
    state = _place(state, layout)
    flops = _product_flops(describe_model(model), model) + model.n_layers * _attention_flops(job)
    return programs.lower_decode(state), _describe(job, layout, programs.weights, state, flops * job.batch)


def lower_seq2seq_decode(job: CompileJob, layout: MeshLayout) -> tuple[Any, CompiledStats]:
    """Of a model with an encoder: the program that draws a token for `job.batch` rows, as `lower_decoding`.

    What the encoder read has `job.context` tokens, and so has the cache of what is written.
    """
    writer, writing = _make_writer(job, layout)
    measured = _describe(job, layout, writer.weights, writing, _writing_flops(job) * job.batch)
    named = {f"{module}/{name}": own for module, arrays in writer.weights.items() for name, own in arrays.items()}
    measured.idle_bytes = sum(_device_bytes(own) for name, own in named.items() if _is_of_reading(name))
    return writer.lower_decode(writing), measured


def lower_seq2seq_encode(job: CompileJob, layout: MeshLayout) -> tuple[Any, CompiledStats]:
    """The program that comes before that of `lower_writing`: it reads the texts and draws the first tokens."""
    writer, writing = _make_writer(job, layout)
    sources = _place(jax.ShapeDtypeStruct((job.batch, job.context), jnp.int32), layout)
    model = job.config.model
    assert model.encoder is not None
    params = describe_model(model)
    read = {name: info for name, info in params.items() if _is_of_reading(name)}
    layers = model.encoder.n_layers * _attention_flops(job)
    flops = _writing_flops(job) + job.context * (2.0 * count_active(read, _chosen(model), model) + layers)
    return writer.lower_encode(writing, sources), _describe(job, layout, writer.weights, writing, flops * job.batch)


def _check(job: CompileJob, layout: MeshLayout) -> None:
    if job.batch % layout.batch_shards:
        raise ConfigError(
            f"--batch {job.batch}: rows do not divide over {layout.batch_shards} device(s) along the batch; "
            f"use a multiple of {layout.batch_shards}, or another mesh (--set mesh.fsdp=1 --set mesh.tensor=...)"
        )
    if job.context > job.config.model.seq_len:
        raise ConfigError(
            f"--context {job.context}: the model reads at most model.seq_len = {job.config.model.seq_len} tokens"
        )


def _make_writer(job: CompileJob, layout: MeshLayout) -> tuple[EncoderDecoderPrograms, EncoderDecoderState]:
    """The engine's programs, and the answers of `job.batch` rows as shapes and places."""
    _check(job, layout)
    shapes, _ = describe_state(job.config)
    serve = job.config.serve
    writer = EncoderDecoderPrograms(
        job.config.model,
        shapes.params,
        layout,
        weight_dtype=serve.weight_dtype,
        kv_cache_dtype=serve.kv_cache_dtype,
    )

    def begin() -> EncoderDecoderState:
        segments, keys = jnp.ones((job.batch, job.context), jnp.int32), jax.random.split(jax.random.key(0), job.batch)
        return writer.empty_state(segments, make_options(SampleConfig(), job.batch), keys, 0, job.context)

    return writer, _place(jax.eval_shape(begin), layout)


def _place(shapes: Any, layout: MeshLayout) -> Any:
    """Shapes with places: those of `caches` as caches lie, all else cut along the batch."""

    def put(leaf: jax.ShapeDtypeStruct, *axes: str) -> jax.ShapeDtypeStruct:
        axes = axes or ("batch", *["activation_embed"] * leaf.ndim)[: leaf.ndim]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(axes, leaf.shape, "state"))

    if not isinstance(shapes, DecodeState | EncoderDecoderState):
        return jax.tree.map(put, shapes)
    caches = jax.tree.map(lambda leaf: put(leaf, "batch", "kv_heads", "position", "head_dim"), shapes.caches)
    return jax.tree.map(put, shapes._replace(caches=None))._replace(caches=caches)


def _describe(
    job: CompileJob, layout: MeshLayout, weights: Any, state: DecodeState | EncoderDecoderState, flops: float
) -> CompiledStats:
    """What is known of a program before it is compiled."""
    shapes, axes = describe_state(job.config)
    held, caches = _device_bytes(state), _device_bytes(state.caches)
    return CompiledStats(
        topology=job.topology,
        platform=layout.mesh.devices.flat[0].platform,
        devices=layout.mesh.size,
        mesh=dict(layout.mesh.shape),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        tokens=job.batch,
        flops=flops,
        hardware_flops=flops,
        bytes_by_kind={"weights": _device_bytes(weights), "cache": caches, "request": held - caches},
        gradient_bytes=0,
        low_effort=job.low_effort,
        sharding_table=format_parameters(shapes, axes, layout),
    )


def _device_bytes(shapes: Any) -> int:
    """Bytes of one device."""
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _chosen(model: ModelConfig) -> float:
    return model.experts.n_experts_per_token if model.experts else 0.0


def _product_flops(params: Mapping[str, ParamInfo], model: ModelConfig) -> float:
    """Of a token that meets `params`, one that is looked up first."""
    looked_up = model.n_vocab * model.d_model * (not model.tied_embeddings)
    return 2.0 * (count_active(params, _chosen(model), model) - looked_up)


def _attention_flops(job: CompileJob) -> float:
    """Of a token that looks at all places of a cache, in one layer."""
    return 4.0 * job.config.model.n_heads * job.config.model.head_dim * job.context


def _writing_flops(job: CompileJob) -> float:
    """Of a token that is written: through the decoder, which looks at what is written and at what was read."""
    model = job.config.model
    params = {name: info for name, info in describe_model(model).items() if not _is_of_reading(name)}
    return _product_flops(params, model) + 2 * model.n_layers * _attention_flops(job)


def _is_of_reading(name: str) -> bool:
    """Whether tokens that are read meet this parameter, and those that are written do not."""
    return name.startswith("transformer/encoder/") or name.endswith(("/cross_attention/w_k", "/cross_attention/w_v"))
