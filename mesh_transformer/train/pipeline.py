# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Layers as stages that microbatches follow one another through: GPipe, and one forward one backward (1F1B).

P stages lie along the mesh axis `pipeline`, and M microbatches (train.grad_accum_steps) pass through them in ticks. The
stages are one vmapped function whose mapped axis is cut over `pipeline`, so tensor, context and fsdp work inside them as
everywhere, and rings too. After a tick every activation moves to the next stage: 1 / (batch and stream pieces) of
B T D elements for each device, one collective permute.

    tick of stage p     forward of microbatch m: m + p        backward of it: m + 2 (P - 1) - p
    1f1b                P - 1 ticks of forwards, M of a forward and a backward, P - 1 of backwards
    gpipe               M + P - 1 ticks of forwards, then as many of backwards, by automatic differentiation

Both idle the same share of the time, (P - 1) / (M + P - 1). GPipe keeps what all M microbatches leave for the backward
pass; 1F1B keeps only the inputs of 2 P - 1 at a stage and computes its layers again (once more than model.remat).
Embedding and head belong to no stage: their tables are cut over `pipeline` as well, and all stages look up and score.
What routers of experts did stays with their stage: sums over its microbatches, and the price of each is differentiated
in that microbatch's own backward pass.
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
from mesh_transformer.model.moe.router import RoutingStats, empty_routing, router_losses
from mesh_transformer.model.params import STACK, ParamInfo, Params
from mesh_transformer.model.transformer import Transformer, describe_params, head_of
from mesh_transformer.train.loss import TokenLosses, score_tokens

STREAM = ("batch", "activation_seq", "activation_embed")


def bubble_share(config: Config) -> float:
    """Share of the time that a stage waits for its first microbatch, or for the others to finish; 0 without a pipeline."""
    stages = config.mesh.pipeline
    return (stages - 1) / (config.train.grad_accum_steps + stages - 1)


class Parts(NamedTuple):
    """The model cut where the pipeline needs it; all take parameters first and a dropout key (or None) second."""

    embed: Callable[..., Array]  # (outer, key, tokens, positions) -> [B, T, D]
    stage: Callable[..., tuple]  # ((own, shared), key, x, positions, segments) -> [B, T, D] and routing of its layers
    finish: Callable[..., Array]  # (outer, key, x) -> [B, T, D], what the head scores
    infos: dict[str, dict[str, ParamInfo]]
    stages: int
    unrouted: RoutingStats | None  # zeros of what the routers of all stages report, [P, L / P, ...]


class Work(NamedTuple):
    """A batch cut into microbatches, and the key of its dropout."""

    batch: Batch  # [M, B, T], in ring order
    isolated: bool
    key: Array | None

    def take(self, index: Array) -> Batch:
        """Microbatch `index`, or one for each stage; the first or last where there is none of that number."""
        return jax.tree.map(lambda x: x[jnp.clip(index, 0, x.shape[0] - 1)], self.batch)

    def segments(self, part: Batch) -> Array | None:
        """Segments of a microbatch where documents are kept apart."""
        return part.segment_ids if self.isolated else None

    def keys(self, index: Array, place: Any) -> Array | None:
        """Dropout key of microbatch `index` (or of each) at a place: 0 is the embedding, p + 1 stage p."""
        if (key := self.key) is None:
            return None
        fold = lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j)  # noqa: E731
        return jax.vmap(fold)(index, place) if index.ndim else fold(index, place)


def make_parts(config: Config) -> Parts:
    """The functions of a run's model."""
    model, stages = config.model, config.mesh.pipeline
    short = dataclasses.replace(model, n_layers=model.n_layers // stages)

    def embed(tokens: Array, positions: Array) -> Array:
        return Transformer(model).embed(tokens, positions)

    def run_stage(x: Array, positions: Array, segments: Array | None) -> tuple[Array, RoutingStats | None]:
        layers = Transformer(short)
        x, _, routing = layers.run_layers(x, layers.see(positions, segments, None), None)
        return x, routing

    apply = hk.transform(run_stage).apply
    return Parts(
        embed=hk.transform(embed).apply,
        stage=lambda params, *inputs: apply({**params[0], **params[1]}, *inputs),
        finish=hk.transform(lambda x: Transformer(model).normalise(x)).apply,
        infos=describe_params(model),
        stages=stages,
        unrouted=jax.tree.map(lambda x: jnp.zeros((stages, *x.shape)), empty_routing(short)),
    )


def split_params(params: Params, parts: Parts) -> tuple[Params, Params, Params]:
    """(own, shared, outer): of each stage [P, L / P, ...], of all stages, and of embedding and head."""
    own = {
        module: {name: _constrain_own(x, parts, module, name) for name, x in arrays.items()}
        for module, arrays in params.items()
        if f"/{STACK}/" in module
    }
    shared = {module: arrays for module, arrays in params.items() if module.endswith("/relative_bias")}
    return own, shared, {m: arrays for m, arrays in params.items() if m not in own and m not in shared}


def _constrain_own(x: Array, parts: Parts, module: str, name: str) -> Array:
    info = parts.infos[module][name]
    return constrain(x.reshape(parts.stages, -1, *info.shape[1:]), "stage", "microbatch", *info.axes[1:])


def _join(own: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), own)


def _over_stages(function: Callable[..., Any], in_axes: tuple) -> Callable[..., Any]:
    """Every stage at once, each where its layers are."""
    return jax.vmap(function, in_axes=in_axes, spmd_axis_name="pipeline")


def _pass_on(x: Float[Array, "P B T D"], by: int) -> Float[Array, "P B T D"]:
    """What a stage has goes to the next (by = 1) or the one before (by = -1)."""
    return constrain(jnp.roll(x, by, axis=0), "stage", *STREAM)


def _at(x: Float[Array, "P B T D"], stage: int) -> Float[Array, "B T D"]:
    """What one stage has, sent to all: added up, for all others add zeros."""
    chosen = jnp.arange(x.shape[0])[:, None, None, None] == stage
    return constrain(jnp.sum(jnp.where(chosen, x, 0), axis=0, dtype=x.dtype), *STREAM)


def _put(x: Float[Array, "P B T D"], stage: int, value: Float[Array, "B T D"]) -> Float[Array, "P B T D"]:
    """`x` with another value at one stage."""
    chosen = jnp.arange(x.shape[0])[:, None, None, None] == stage
    return constrain(jnp.where(chosen, value[None], x), "stage", *STREAM)


def _due(index: Array, work: Work) -> Array:
    """Whether there is a microbatch of each number: while a pipeline fills, stages compute for nothing."""
    return (index >= 0) & (index < work.batch.tokens.shape[0])


def _forward(
    parts: Parts,
    work: Work,
    split: tuple[Params, Params, Params],
    arriving: Array,
    routing: RoutingStats | None,
    tick: Array,
) -> tuple[Array, Array, RoutingStats | None]:
    """What the stages compute in a tick, from what they received; what they computed it from; and the routing, added up."""
    own, shared, outer = split
    first = work.take(tick)
    x = parts.embed(outer, work.keys(tick, 0), first.tokens, first.positions)
    arriving = _put(arriving, 0, x)
    stage = jnp.arange(parts.stages)
    index = tick - stage
    part = work.take(index)
    run = _over_stages(lambda own, *inputs: parts.stage((own, shared), *inputs), (0, 0, 0, 0, 0))
    out, routed = run(own, work.keys(index, stage + 1), arriving, part.positions, work.segments(part))
    due = _due(index, work)
    count = lambda total, x: total + jnp.where(due.reshape(-1, *[1] * (x.ndim - 1)), x, 0)  # noqa: E731
    return constrain(out, "stage", *STREAM), arriving, jax.tree.map(count, routing, routed)


def _empty(config: Config, parts: Parts, work: Work) -> Array:
    shape = (parts.stages, *work.batch.tokens.shape[1:], config.model.d_model)
    return constrain(jnp.zeros(shape, config.model.dtype), "stage", *STREAM)


def pipeline_hidden(config: Config, params: Params, work: Work) -> tuple[Float[Array, "M B T D"], RoutingStats | None]:
    """What the head scores of every microbatch, and the routing summed over these; differentiable (GPipe)."""
    parts = make_parts(config)
    split, count = split_params(params, parts), work.batch.tokens.shape[0]

    def tick(carry: tuple[Array, RoutingStats | None], index: Array) -> tuple[tuple[Array, RoutingStats | None], Array]:
        out, _, routing = _forward(parts, work, split, *carry, index)
        return (_pass_on(out, 1), routing), _at(out, parts.stages - 1)

    ticks = jnp.arange(count + parts.stages - 1)
    (_, routing), leaving = jax.lax.scan(tick, (_empty(config, parts, work), parts.unrouted), ticks)
    finish = lambda x: parts.finish(split[2], None, x)  # noqa: E731
    return jax.lax.map(finish, leaving[parts.stages - 1 :]), _join(routing)


class Flow(NamedTuple):
    """What a tick of 1F1B hands to the next."""

    arriving: Float[Array, "P B T D"]  # outputs of the stages before
    returning: Float[Array, "P B T D"]  # gradients of the stages after
    kept: Float[Array, "R P B T D"]  # inputs of the last R = 2 P - 1 ticks' forwards
    grads: tuple[Params, Params, Params]  # of own, shared, outer
    losses: TokenLosses
    routing: RoutingStats | None  # of all stages, [P, L / P, ...]


def pipeline_gradients(
    config: Config, params: Params, work: Work, tokens: Float[Array, ""]
) -> tuple[Params, TokenLosses]:
    """Gradients of the loss per token, and its sums, by 1F1B."""
    parts = make_parts(config)
    split, count = split_params(params, parts), work.batch.tokens.shape[0]
    slots = 2 * parts.stages - 1
    empty = _empty(config, parts, work)
    kept = constrain(jnp.zeros((slots, *empty.shape), empty.dtype), "microbatch", "stage", *STREAM)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), split)
    zeros = (split_params(_join(zeros[0]), parts)[0], *zeros[1:])
    zero = jnp.zeros(())
    flow = Flow(empty, empty, kept, zeros, TokenLosses(zero, zero, zero), parts.unrouted)
    half = parts.stages - 1
    phases = ((0, half, True, False), (half, half + count, True, True), (half + count, 2 * half + count, False, True))
    for first, end, forward, backward in phases:
        tick = partial(_tick, config, parts, work, split, tokens, forward=forward, backward=backward)
        flow, _ = jax.lax.scan(tick, flow, jnp.arange(first, end))
    own, shared, outer = flow.grads
    grads = {**_join(own), **shared, **outer}
    return {module: grads[module] for module in params}, flow.losses._replace(routing=_join(flow.routing))


def _tick(
    config: Config,
    parts: Parts,
    work: Work,
    split: tuple[Params, Params, Params],
    tokens: Array,
    flow: Flow,
    tick: Array,
    *,
    forward: bool,
    backward: bool,
) -> tuple[Flow, None]:
    """Every stage's forward, the loss of what leaves the last one, and every stage's backward."""
    outer, last = split[2], parts.stages - 1
    (d_own, d_shared, d_outer), add = flow.grads, partial(jax.tree.map, jnp.add)
    if forward:
        out, taken, routing = _forward(parts, work, split, flow.arriving, flow.routing, tick)
        kept = jax.lax.dynamic_update_index_in_dim(flow.kept, taken, tick % flow.kept.shape[0], 0)
        kept = constrain(kept, "microbatch", "stage", *STREAM)
        flow = flow._replace(arriving=_pass_on(out, 1), kept=kept, routing=routing)
        if backward:
            part = work.take(tick - last)
            score = partial(_score, config, parts, part, tokens)
            (d_head, dy), sums = jax.grad(score, argnums=(0, 1), has_aux=True)(outer, _at(out, last))
            d_outer = add(d_outer, d_head)
            flow = flow._replace(returning=_put(flow.returning, last, dy), losses=add(flow.losses, sums))
    if backward:
        (own, shared, dx), first = _backward(config, parts, work, split, flow, tick), tick - 2 * last
        part = work.take(first)
        embed = lambda outer: parts.embed(outer, work.keys(first, 0), part.tokens, part.positions)  # noqa: E731
        (d_table,) = jax.vjp(embed, outer)[1](_at(dx, 0))
        flow = flow._replace(returning=_pass_on(dx, -1))
        d_own, d_shared, d_outer = add(d_own, own), add(d_shared, shared), add(d_outer, d_table)
    return flow._replace(grads=(d_own, d_shared, d_outer)), None


def _score(
    config: Config, parts: Parts, part: Batch, tokens: Array, outer: Params, x: Array
) -> tuple[Array, TokenLosses]:
    """The loss per token that a microbatch adds, and its sums."""
    head = head_of(outer, config.model)
    x = parts.finish(outer, None, x)
    scored: Any = score_tokens(
        x, head.w, head.b, part.targets, part.mask, config.train.z_loss, config.train.loss_chunks
    )
    total, sums = scored
    return total / tokens, sums


def _backward(
    config: Config, parts: Parts, work: Work, split: tuple[Params, Params, Params], flow: Flow, tick: Array
) -> tuple:
    """Gradients of every stage's layers, of what they share, and of their inputs, for the microbatch that is due there."""
    (own, shared, _), count = split, work.batch.tokens.shape[0]
    stage = jnp.arange(parts.stages)
    index = tick - 2 * (parts.stages - 1) + stage
    part = work.take(index)
    due = _due(index, work)
    gradient = jnp.where(due[:, None, None, None], flow.returning, 0)
    slot = (index + stage) % flow.kept.shape[0]  # the tick of that microbatch's forward

    def back(
        own: Params, kept: Array, slot: Array, key: Any, positions: Array, segments: Any, gradients: tuple[Array, Array]
    ) -> tuple:
        def run(own: Params, shared: Params, x: Array) -> tuple[Array, Array]:
            x, routing = parts.stage((own, shared), key, x, positions, segments)
            return x, jnp.zeros(()) if routing is None else router_losses(config.model, routing) / count

        x = jax.lax.dynamic_index_in_dim(kept, slot, 0, keepdims=False)
        return jax.vjp(run, own, shared, x)[1](gradients)

    gradients = (gradient, due.astype(jnp.float32))
    d_own, d_shared, dx = _over_stages(back, (0, 1, 0, 0, 0, 0, 0))(
        own, flow.kept, slot, work.keys(index, stage + 1), part.positions, work.segments(part), gradients
    )
    return d_own, jax.tree.map(lambda x: jnp.sum(x, axis=0), d_shared), constrain(dx, "stage", *STREAM)
