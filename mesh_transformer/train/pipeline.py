# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism over stages of layers, with the schedules GPipe and 1F1B (one forward, one backward).

P stages are sharded over the mesh axis `pipeline`, and M microbatches (train.grad_accum_steps) pass through them in
ticks. The stages are one vmapped function whose mapped axis is sharded over `pipeline`, so tensor, context and fsdp
parallelism, and ring attention, work inside a stage as they do without a pipeline. After a tick every activation moves
to the next stage: 1 / (shards of batch and activation_seq) of B T D elements per device, in one collective permute.

    tick of microbatch m in stage p    forward pass: m + p        backward pass in 1F1B: m + 2 (P - 1) - p
    1f1b     P - 1 ticks with a forward pass, M ticks with both passes, P - 1 ticks with a backward pass
    gpipe    M + P - 1 ticks with a forward pass, then as many with a backward pass, by automatic differentiation

Both have the same bubble, (P - 1) / (M + P - 1) of the time. GPipe saves the residuals of all M microbatches for the
backward pass. 1F1B saves only the stage inputs of 2 P - 1 microbatches and recomputes the layers (once more than
model.remat does). Embedding and head belong to no stage: their matrices are sharded over `pipeline` as well, and all
stages embed and score. Router statistics stay on the devices of their stage and are summed over the microbatches; each
router loss is differentiated in the backward pass of its microbatch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import Config
from mesh_transformer.data.loader import Batch
from mesh_transformer.mesh import constrain
from mesh_transformer.model.lm_head import head_matrix, lm_head
from mesh_transformer.model.moe.router import RoutingStats, router_losses, zero_routing_stats
from mesh_transformer.model.params import STACK, ParamInfo, Params
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import Transformer
from mesh_transformer.train.loss import TokenLosses, chunked_cross_entropy, loss_options

ACTIVATION_AXES = ("batch", "activation_seq", "activation_embed")  # of [B, T, D]


def bubble_fraction(config: Config) -> float:
    """Return the fraction of the time that each stage idles; 0 without a pipeline."""
    stages = config.mesh.pipeline
    return (stages - 1) / (config.train.grad_accum_steps + stages - 1)


class Microbatches(NamedTuple):
    """A batch split into microbatches, and the key of its dropout."""

    batch: Batch  # [M, B, T], in zigzag order
    isolated: bool  # documents are isolated from each other
    key: Array | None
    training: bool

    @property
    def count(self) -> int:
        return self.batch.tokens.shape[0]

    def take(self, index: Array) -> Batch:
        """Return microbatch `index`, or one per stage; an index out of range is clipped."""
        return jax.tree.map(lambda x: x[jnp.clip(index, 0, x.shape[0] - 1)], self.batch)

    def segment_ids(self, microbatch: Batch) -> Array | None:
        """Return the segment IDs of a microbatch if documents are isolated."""
        return microbatch.segment_ids if self.isolated else None

    def keys(self, index: Array, position: Any) -> Array | None:
        """Return the dropout key of each microbatch in `index`, for the embedding (position 0) or stage position - 1."""
        if (key := self.key) is None:
            return None

        def fold(index: Array, position: Any) -> Array:
            return jax.random.fold_in(jax.random.fold_in(key, index), position)

        return jax.vmap(fold)(index, position) if index.ndim else fold(index, position)

    def is_active(self, index: Array) -> Array:
        """Return whether each index is in range; a stage with another index computes values that are discarded."""
        return (index >= 0) & (index < self.count)


class StageFns(NamedTuple):
    """Parts of the model as pure functions; their first arguments are the parameters and a dropout key (or None)."""

    embed: Callable[..., Array]  # (outer, key, tokens, positions) -> [B, T, D]
    stage: Callable[..., tuple]  # ((stage, shared), key, x, positions, segment_ids) -> [B, T, D], routing of its layers
    head_input: Callable[..., Array]  # (outer, key, x) -> [B, T, E]
    infos: dict[str, dict[str, ParamInfo]]
    n_stages: int
    zero_routing: RoutingStats | None  # zeros of the router statistics of all stages, [P, L / P, ...]


class SplitParams(NamedTuple):
    """Parameters, or their gradients, divided into parameters of stages, parameters that stages share, and all others."""

    stages: Params  # of the layers of each stage, [P, L / P, ...]
    shared: Params  # used by all stages
    outer: Params  # of embedding, final norm and head


class Pipeline(NamedTuple):
    """Inputs of a pipeline that are the same in all ticks."""

    config: Config
    fns: StageFns
    microbatches: Microbatches
    params: SplitParams


class Carry(NamedTuple):
    """Values that one tick of 1F1B passes to the next."""

    incoming: Float[Array, "P B T D"]  # outputs of the previous stages
    incoming_grads: Float[Array, "P B T D"]  # gradients from the next stages
    inputs: Float[Array, "R P B T D"]  # ring buffer of the stage inputs of the last R = 2 P - 1 ticks
    grads: SplitParams
    losses: TokenLosses
    routing: RoutingStats | None  # of all stages, [P, L / P, ...]


def pipeline_hidden(
    config: Config, params: Params, microbatches: Microbatches
) -> tuple[Float[Array, "M B T D"], RoutingStats | None]:
    """Return the head's inputs of all microbatches, and the summed routing; differentiable (GPipe)."""
    pipeline = make_pipeline(config, params, microbatches)
    n_stages = pipeline.fns.n_stages

    def tick(carry: tuple[Array, RoutingStats | None], index: Array) -> tuple[tuple[Array, RoutingStats | None], Array]:
        out, _, routing = _forward(pipeline, *carry, index)
        return (_rotate(out, 1), routing), _select_stage(out, n_stages - 1)

    def head_input(x: Array) -> Array:
        return pipeline.fns.head_input(pipeline.params.outer, None, x)

    ticks = jnp.arange(microbatches.count + n_stages - 1)
    (_, routing), outputs = jax.lax.scan(tick, (_zero_activations(pipeline), pipeline.fns.zero_routing), ticks)
    return jax.lax.map(head_input, outputs[n_stages - 1 :]), _merge_stages(routing)


def pipeline_gradients(
    config: Config, params: Params, microbatches: Microbatches, tokens: Float[Array, ""]
) -> tuple[Params, TokenLosses]:
    """Return the gradients of the loss per token, and the summed losses, by 1F1B."""
    pipeline = make_pipeline(config, params, microbatches)
    n_stages = pipeline.fns.n_stages
    zero_x = _zero_activations(pipeline)
    inputs = jnp.zeros((2 * n_stages - 1, *zero_x.shape), zero_x.dtype)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), pipeline.params)
    zeros = zeros._replace(stages=split_params(_merge_stages(zeros.stages), pipeline.fns).stages)
    zero = jnp.zeros(())
    carry = Carry(
        incoming=zero_x,
        incoming_grads=zero_x,
        inputs=_constrain_inputs(inputs),
        grads=zeros,
        losses=TokenLosses(zero, zero, zero),
        routing=pipeline.fns.zero_routing,
    )
    fill = n_stages - 1
    count = microbatches.count
    phases = ((0, fill, True, False), (fill, fill + count, True, True), (fill + count, 2 * fill + count, False, True))
    for first, end, forward, backward in phases:
        tick = partial(_tick, pipeline, tokens, forward=forward, backward=backward)
        carry, _ = jax.lax.scan(tick, carry, jnp.arange(first, end))
    grads = {**_merge_stages(carry.grads.stages), **carry.grads.shared, **carry.grads.outer}
    losses = carry.losses._replace(routing=_merge_stages(carry.routing))
    return {module: grads[module] for module in params}, losses


def make_pipeline(config: Config, params: Params, microbatches: Microbatches) -> Pipeline:
    """Return the pipeline of a step."""
    fns = make_stage_fns(config, training=microbatches.training)
    return Pipeline(config, fns, microbatches, split_params(params, fns))


def make_stage_fns(config: Config, *, training: bool) -> StageFns:
    """Return the functions of a run's model."""
    model, n_stages = config.model, config.mesh.pipeline
    stage_model = dataclasses.replace(model, n_layers=model.n_layers // n_stages)

    def embed(tokens: Array, positions: Array) -> Array:
        return Transformer(model).embed(tokens, positions)

    def run_stage(x: Array, positions: Array, segment_ids: Array | None) -> tuple[Array, RoutingStats | None]:
        transformer = Transformer(stage_model)
        context = transformer.attention_context(positions, segment_ids, None, training=training)
        x, _, routing = transformer.run_layers(x, context, None)
        return x, routing

    apply = hk.transform(run_stage).apply
    return StageFns(
        embed=hk.transform(embed).apply,
        stage=lambda params, *inputs: apply({**params[0], **params[1]}, *inputs),
        head_input=hk.transform(lambda x: Transformer(model).head_input(x)).apply,
        infos=describe_params(model),
        n_stages=n_stages,
        zero_routing=jax.tree.map(lambda x: jnp.zeros((n_stages, *x.shape)), zero_routing_stats(stage_model)),
    )


def split_params(params: Params, fns: StageFns) -> SplitParams:
    """Split parameters into parameters of each stage, parameters that stages share, and all others."""
    stages = {
        module: {name: _split_stages(x, fns, module, name) for name, x in arrays.items()}
        for module, arrays in params.items()
        if f"/{STACK}/" in module
    }
    shared = {module: arrays for module, arrays in params.items() if module.endswith("/relative_bias")}
    outer = {module: arrays for module, arrays in params.items() if module not in stages and module not in shared}
    return SplitParams(stages, shared, outer)


def _split_stages(x: Array, fns: StageFns, module: str, name: str) -> Array:
    info = fns.infos[module][name]
    return constrain(x.reshape(fns.n_stages, -1, *info.shape[1:]), "stage", "replicated", *info.axes[1:])


def _merge_stages(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _vmap_stages(function: Callable[..., Any], in_axes: tuple) -> Callable[..., Any]:
    """Map `function` over the stages; each stage runs on the devices that hold its parameters."""
    return jax.vmap(function, in_axes=in_axes, spmd_axis_name="pipeline")


def _rotate(x: Float[Array, "P B T D"], by: int) -> Float[Array, "P B T D"]:
    """Send each stage's value to the next stage (by = 1) or the previous one (by = -1)."""
    return constrain(jnp.roll(x, by, axis=0), "stage", *ACTIVATION_AXES)


def _select_stage(x: Float[Array, "P B T D"], stage: int) -> Float[Array, "B T D"]:
    """Return one stage's value on all stages, by a sum to which the other stages contribute zeros."""
    is_selected = jnp.arange(x.shape[0])[:, None, None, None] == stage
    return constrain(jnp.sum(jnp.where(is_selected, x, 0), axis=0, dtype=x.dtype), *ACTIVATION_AXES)


def _set_stage(x: Float[Array, "P B T D"], stage: int, value: Float[Array, "B T D"]) -> Float[Array, "P B T D"]:
    """Return `x` with `value` at one stage."""
    is_selected = jnp.arange(x.shape[0])[:, None, None, None] == stage
    return constrain(jnp.where(is_selected, value[None], x), "stage", *ACTIVATION_AXES)


def _constrain_inputs(x: Float[Array, "R P B T D"]) -> Float[Array, "R P B T D"]:
    return constrain(x, "replicated", "stage", *ACTIVATION_AXES)


def _zero_activations(pipeline: Pipeline) -> Float[Array, "P B T D"]:
    model = pipeline.config.model
    shape = (pipeline.fns.n_stages, *pipeline.microbatches.batch.tokens.shape[1:], model.d_model)
    return constrain(jnp.zeros(shape, model.dtype), "stage", *ACTIVATION_AXES)


def _forward(
    pipeline: Pipeline, incoming: Array, routing: RoutingStats | None, tick: Array
) -> tuple[Array, Array, RoutingStats | None]:
    """Run every stage for one tick. Return the stages' outputs, their inputs, and the routing summed so far."""
    fns, microbatches, params = pipeline.fns, pipeline.microbatches, pipeline.params
    first = microbatches.take(tick)
    x = fns.embed(params.outer, microbatches.keys(tick, 0), first.tokens, first.positions)
    inputs = _set_stage(incoming, 0, x)
    stage = jnp.arange(fns.n_stages)
    index = tick - stage
    current = microbatches.take(index)
    segment_ids = microbatches.segment_ids(current)
    run = _vmap_stages(lambda stages, *args: fns.stage((stages, params.shared), *args), (0, 0, 0, 0, 0))
    out, new_routing = run(params.stages, microbatches.keys(index, stage + 1), inputs, current.positions, segment_ids)
    is_active = microbatches.is_active(index)

    def add_active(total: Array, x: Array) -> Array:
        return total + jnp.where(is_active.reshape(-1, *[1] * (x.ndim - 1)), x, 0)

    return constrain(out, "stage", *ACTIVATION_AXES), inputs, jax.tree.map(add_active, routing, new_routing)


def _tick(
    pipeline: Pipeline, tokens: Array, carry: Carry, tick: Array, *, forward: bool, backward: bool
) -> tuple[Carry, None]:
    """Run the forward pass of every stage, the loss of the last stage's output, and every stage's backward pass."""
    fns, microbatches, outer = pipeline.fns, pipeline.microbatches, pipeline.params.outer
    last = fns.n_stages - 1
    grads = carry.grads
    add = partial(jax.tree.map, jnp.add)
    if forward:
        out, new_inputs, routing = _forward(pipeline, carry.incoming, carry.routing, tick)
        inputs = jax.lax.dynamic_update_index_in_dim(carry.inputs, new_inputs, tick % carry.inputs.shape[0], 0)
        carry = carry._replace(incoming=_rotate(out, 1), inputs=_constrain_inputs(inputs), routing=routing)
        if backward:
            loss_fn = partial(_microbatch_loss, pipeline, microbatches.take(tick - last), tokens)
            (d_outer, dx), sums = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(outer, _select_stage(out, last))
            grads = grads._replace(outer=add(grads.outer, d_outer))
            incoming_grads = _set_stage(carry.incoming_grads, last, dx)
            carry = carry._replace(incoming_grads=incoming_grads, losses=add(carry.losses, sums))
    if backward:
        d_stages, d_shared, dx = _backward(pipeline, carry, tick)
        first = tick - 2 * last
        microbatch = microbatches.take(first)

        def embed(outer: Params) -> Array:
            return fns.embed(outer, microbatches.keys(first, 0), microbatch.tokens, microbatch.positions)

        (d_outer,) = jax.vjp(embed, outer)[1](_select_stage(dx, 0))
        carry = carry._replace(incoming_grads=_rotate(dx, -1))
        grads = add(grads, SplitParams(d_stages, d_shared, d_outer))
    return carry._replace(grads=grads), None


def _microbatch_loss(
    pipeline: Pipeline, microbatch: Batch, tokens: Array, outer: Params, x: Array
) -> tuple[Array, TokenLosses]:
    """Return a microbatch's contribution to the loss per token, and its summed losses."""
    config = pipeline.config
    head = lm_head(outer, config.model)
    x = pipeline.fns.head_input(outer, None, x)
    w = head_matrix(head, config.model)
    result: Any = chunked_cross_entropy(x, w, head.b, microbatch.targets, microbatch.mask, loss_options(config))
    total, sums = result
    return total / tokens, sums


def _backward(pipeline: Pipeline, carry: Carry, tick: Array) -> tuple:
    """Return the gradients of every stage's layers, of shared parameters, and of the stage inputs, for one tick."""
    fns, microbatches, params = pipeline.fns, pipeline.microbatches, pipeline.params
    stage = jnp.arange(fns.n_stages)
    index = tick - 2 * (fns.n_stages - 1) + stage
    microbatch = microbatches.take(index)
    is_active = microbatches.is_active(index)
    d_out = jnp.where(is_active[:, None, None, None], carry.incoming_grads, 0)
    buffer_index = (index + stage) % carry.inputs.shape[0]  # of the stage's input in the microbatch's forward pass

    def stage_vjp(
        stages: Params,
        inputs: Array,
        buffer_index: Array,
        key: Any,
        positions: Array,
        segment_ids: Any,
        cotangents: Any,
    ) -> tuple:
        def run(stages: Params, shared: Params, x: Array) -> tuple[Array, Array]:
            x, routing = fns.stage((stages, shared), key, x, positions, segment_ids)
            if routing is None:
                return x, jnp.zeros(())
            return x, router_losses(pipeline.config.model, routing) / microbatches.count

        x = jax.lax.dynamic_index_in_dim(inputs, buffer_index, 0, keepdims=False)
        return jax.vjp(run, stages, params.shared, x)[1](cotangents)

    d_stages, d_shared, dx = _vmap_stages(stage_vjp, (0, 1, 0, 0, 0, 0, 0))(
        params.stages,
        carry.inputs,
        buffer_index,
        microbatches.keys(index, stage + 1),
        microbatch.positions,
        microbatches.segment_ids(microbatch),
        (d_out, is_active.astype(jnp.float32)),
    )
    d_shared = jax.tree.map(lambda x: jnp.sum(x, axis=0), d_shared)
    return d_stages, d_shared, constrain(dx, "stage", *ACTIVATION_AXES)
