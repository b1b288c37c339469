# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Programs of the sampling engines, lowered from shapes for hardware that need not be present.

For a decoder-only model, this is the program that decodes one token per sequence with full KV caches. For an
encoder-decoder model, these are the program that decodes one token per sequence and the program that encodes the prompts.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.config import ConfigError, ModelConfig, SampleConfig
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.model.attention.kv_cache import cache_axes
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
    """Lower the program that decodes `job.batch` sequences with KV caches of `job.context` tokens.

    The statistics are for one token per sequence: the program's loop over tokens counts once. Raises ConfigError if the
    batch or the context is not supported.
    """
    _check(job, layout)
    model, serve = job.config.model, job.config.serve
    shapes, _ = describe_state(job.config)
    programs = EnginePrograms(
        model, shapes.params, layout, weight_dtype=serve.weight_dtype, kv_cache_dtype=serve.kv_cache_dtype
    )
    params = jax.eval_shape(lambda: blank_params(model.n_vocab))
    state = jax.eval_shape(lambda like: programs.empty_state(like, job.batch, job.context), params)
    state = _with_shardings(state, layout)
    flops = _matmul_flops(describe_model(model), model) + model.n_layers * _attention_flops(job)
    return programs.lower_decode(state), _describe(job, layout, programs.weights, state, flops * job.batch)


def lower_seq2seq_decode(job: CompileJob, layout: MeshLayout) -> tuple[Any, CompiledStats]:
    """Lower the program of an encoder-decoder model that decodes `job.batch` sequences, like `lower_decode`.

    Encoder output and KV cache have `job.context` tokens each.
    """
    programs, state = _make_programs(job, layout)
    stats = _describe(job, layout, programs.weights, state, _decode_flops(job) * job.batch)
    named = {f"{module}/{name}": array for module, arrays in programs.weights.items() for name, array in arrays.items()}
    stats.idle_bytes = sum(_device_bytes(array) for name, array in named.items() if _is_encode_param(name))
    return programs.lower_decode(state), stats


def lower_seq2seq_encode(job: CompileJob, layout: MeshLayout) -> tuple[Any, CompiledStats]:
    """Lower the program that encodes the prompts and samples the first tokens, which runs before decoding."""
    programs, state = _make_programs(job, layout)
    encoder_tokens = _with_shardings(jax.ShapeDtypeStruct((job.batch, job.context), jnp.int32), layout)
    model = job.config.model
    assert model.encoder is not None
    params = describe_model(model)
    encode_params = {name: info for name, info in params.items() if _is_encode_param(name)}
    layers = model.encoder.n_layers * _attention_flops(job)
    flops = _decode_flops(job) + job.context * (
        2.0 * count_active(encode_params, _experts_per_token(model), model) + layers
    )
    return programs.lower_encode(state, encoder_tokens), _describe(
        job, layout, programs.weights, state, flops * job.batch
    )


def _check(job: CompileJob, layout: MeshLayout) -> None:
    if job.batch % layout.batch_shards:
        raise ConfigError(
            f"--batch {job.batch} is not divisible by the {layout.batch_shards} device(s) that share the batch; "
            f"use a multiple of {layout.batch_shards}, or another mesh (--set mesh.fsdp=1 --set mesh.tensor=...)"
        )
    if job.context > job.config.model.seq_len:
        raise ConfigError(
            f"--context {job.context} exceeds model.seq_len = {job.config.model.seq_len}; use a shorter context"
        )


def _make_programs(job: CompileJob, layout: MeshLayout) -> tuple[EncoderDecoderPrograms, EncoderDecoderState]:
    """Return the engine's programs, and the state of `job.batch` sequences as shapes with shardings."""
    _check(job, layout)
    shapes, _ = describe_state(job.config)
    serve = job.config.serve
    programs = EncoderDecoderPrograms(
        job.config.model,
        shapes.params,
        layout,
        weight_dtype=serve.weight_dtype,
        kv_cache_dtype=serve.kv_cache_dtype,
    )

    def empty_state() -> EncoderDecoderState:
        segment_ids = jnp.ones((job.batch, job.context), jnp.int32)
        keys = jax.random.split(jax.random.key(0), job.batch)
        return programs.empty_state(segment_ids, make_options(SampleConfig(), job.batch), keys, 0, job.context)

    return programs, _with_shardings(jax.eval_shape(empty_state), layout)


def _with_shardings(shapes: Any, layout: MeshLayout) -> Any:
    """Add shardings to shapes: caches are sharded as in the engine, all other arrays along the batch."""

    def with_sharding(leaf: jax.ShapeDtypeStruct, *axes: str) -> jax.ShapeDtypeStruct:
        axes = axes or ("batch", *["activation_embed"] * leaf.ndim)[: leaf.ndim]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(axes, leaf.shape, "state"))

    if not isinstance(shapes, DecodeState | EncoderDecoderState):
        return jax.tree.map(with_sharding, shapes)
    caches = jax.tree.map(lambda leaf: with_sharding(leaf, *cache_axes(leaf.shape[1])), shapes.caches)
    return jax.tree.map(with_sharding, shapes._replace(caches=None))._replace(caches=caches)


def _describe(
    job: CompileJob, layout: MeshLayout, weights: Any, state: DecodeState | EncoderDecoderState, flops: float
) -> CompiledStats:
    """Return the statistics that are known before compilation."""
    shapes, axes = describe_state(job.config)
    state_bytes = _device_bytes(state)
    cache_bytes = _device_bytes(state.caches)
    return CompiledStats(
        topology=job.topology,
        platform=layout.mesh.devices.flat[0].platform,
        devices=layout.mesh.size,
        mesh=dict(layout.mesh.shape),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        tokens=job.batch,
        flops=flops,
        hardware_flops=flops,
        bytes_by_kind={"weights": _device_bytes(weights), "cache": cache_bytes, "request": state_bytes - cache_bytes},
        gradient_bytes=0,
        low_effort=job.low_effort,
        sharding_table=format_parameters(shapes, axes, layout),
    )


def _device_bytes(shapes: Any) -> int:
    """Return the bytes of a tree of sharded shapes on one device."""
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _experts_per_token(model: ModelConfig) -> float:
    return model.experts.n_experts_per_token if model.experts else 0.0


def _matmul_flops(params: Mapping[str, ParamInfo], model: ModelConfig) -> float:
    """Return the FLOPs of the matmuls with `params` for one token; the embedding look-up needs no FLOPs."""
    embedding = model.n_vocab * model.token_embedding_dim * (not model.tied_embeddings)
    return 2.0 * (count_active(params, _experts_per_token(model), model) - embedding)


def _attention_flops(job: CompileJob) -> float:
    """Return the FLOPs of one layer's attention for a token that attends to a full cache."""
    model = job.config.model
    latent = model.latent_attention
    per_key = 2 * model.head_dim if latent is None else 2 * latent.kv_rank + latent.d_rotated  # keys and values
    return 2.0 * model.n_heads * per_key * job.context


def _decode_flops(job: CompileJob) -> float:
    """Return the FLOPs of a decoded token, including self-attention and cross-attention."""
    model = job.config.model
    params = {name: info for name, info in describe_model(model).items() if not _is_encode_param(name)}
    return _matmul_flops(params, model) + 2 * model.n_layers * _attention_flops(job)


def _is_encode_param(name: str) -> bool:
    """Return whether a parameter processes encoder tokens instead of decoded tokens."""
    return name.startswith("transformer/encoder/") or name.endswith(("/cross_attention/w_k", "/cross_attention/w_v"))
