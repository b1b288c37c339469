# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: loss and gradients over microbatches, the guard, the update; and the step that only evaluates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mesh_transformer.config import Config
from mesh_transformer.data.loader import Batch
from mesh_transformer.mesh import constrain
from mesh_transformer.model.attention.ring import to_zigzag
from mesh_transformer.model.moe.router import RoutingStats, empty_routing, router_losses
from mesh_transformer.model.params import STACK, Params
from mesh_transformer.model.transformer import Model, head_of, make_model
from mesh_transformer.reports.metrics_log import representative_layers
from mesh_transformer.train.noise_scale import noise_scale, update_noise_scale
from mesh_transformer.train.loss import TokenLosses, score_tokens
from mesh_transformer.train.optimizer import global_norm
from mesh_transformer.train.pipeline import Work, pipeline_gradients, pipeline_hidden
from mesh_transformer.train.schedule import make_schedule
from mesh_transformer.train.state import GUARD_WINDOW, SkipGuard, TrainState, make_run_optimizer

Metrics = dict[str, Array]


class Gradients(NamedTuple):
    """What the backward pass over a batch leaves."""

    grads: Params  # of the mean loss over the batch, float32
    losses: TokenLosses
    microbatch_sq_norm: Float[Array, ""]  # mean over microbatches of the squared norm of their own mean gradient


def make_train_step(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function (state, batch) -> (state, metrics) that training runs and the planner compiles."""
    optimizer = make_run_optimizer(config)
    schedule = make_schedule(config.optimizer, config.train.steps)
    gradients = make_gradients(config)
    train = config.train

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = dropout_key(config, state.step)
        found = gradients(state.params, batch, key)
        loss = found.losses.nats / found.losses.tokens
        grad_norm = global_norm(found.grads)
        ok = _accept(state.guard, loss, grad_norm, train.loss_spike_factor)

        updates, opt_state = optimizer.update(found.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        noise = state.noise
        if noise is not None:
            small = batch.tokens.shape[0] // train.grad_accum_steps
            noise = update_noise_scale(
                noise, found.microbatch_sq_norm, jnp.square(grad_norm), small, batch.tokens.shape[0]
            )
        # Select, never multiply: 0 x NaN is NaN. A rejected step leaves every leaf as it was.
        kept = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (params, opt_state, noise),
            (state.params, state.opt_state, state.noise),
        )
        guard = _update_guard(state.guard, ok, loss, grad_norm)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "log_z_square": found.losses.z_squares / found.losses.tokens,
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.in_a_row,
        }
        if found.losses.routing is not None:
            metrics |= routing_stats(jax.tree.map(lambda x: x / train.grad_accum_steps, found.losses.routing))
        if kept[2] is not None:
            metrics["noise_scale"] = noise_scale(kept[2])
        if train.log_layer_grad_norms:
            metrics["layer_grad_norms"] = norms_by_layer(found.grads)
        params, opt_state, noise = kept
        return TrainState(state.step + 1, params, opt_state, guard, noise), metrics

    return train_step


def dropout_key(config: Config, step: Int[Array, ""]) -> PRNGKeyArray | None:
    """What dropout and routers of a step follow from; None without either."""
    draws = config.model.dropout or config.model.experts
    return jax.random.fold_in(jax.random.key(config.run.seed), step) if draws else None


def routing_stats(routing: RoutingStats) -> Metrics:
    """What the metrics say of routers: means over the layers that have one, but for the worst of them."""
    shares = routing.expert_load * routing.expert_load.shape[1]  # of an even load
    return {
        "balance_loss": jnp.mean(routing.aux_loss),
        "router_z_loss": jnp.mean(routing.router_z),
        "router_entropy": jnp.mean(routing.entropy),
        "dropped_share": jnp.mean(routing.dropped_fraction),
        "expert_load": shares[jnp.array(representative_layers(shares.shape[0]))],
        "largest_expert_load": jnp.max(shares),
        "unused_experts": jnp.sum(routing.expert_load == 0),
    }


def make_eval_step(config: Config) -> Callable[[Params, Batch], TokenLosses]:
    """The pure function (params, batch) -> summed losses, without dropout."""
    model = make_model(config.model)

    def eval_step(params: Params, batch: Batch) -> TokenLosses:
        return _score_batch(config, model, params, batch, None)[1]._replace(routing=None)

    return eval_step


def model_inputs(config: Config, batch: Batch) -> dict[str, Any]:
    """What a model reads beside tokens: an encoder's sources; positions and segments where documents are kept apart.

    Elsewhere the model's own defaults cost nothing.
    """
    if config.model.n_encoder_layers is not None:
        return {"sources": batch.encoder_tokens}
    return {"positions": batch.positions, "segments": batch.segment_ids} if config.data.isolate_documents else {}


def _score_batch(
    config: Config, model: Model, params: Params, batch: Batch, key: Array | None
) -> tuple[Array, TokenLosses]:
    """The loss of the head, summed over a batch; and its parts, with what routers did, summed over microbatches."""
    if config.mesh.pipeline > 1:
        work = _make_work(config, batch, key)
        (x, routing), targets, mask = pipeline_hidden(config, params, work), work.batch.targets, work.batch.mask
        # Microbatches are interleaved rows of the batch, so that nothing moves; put back in the same way.
        x, targets, mask = (y.swapaxes(0, 1).reshape(-1, *y.shape[2:]) for y in (x, targets, mask))
    else:
        x, routing = model.hidden(params, batch.tokens, dropout_key=key, **model_inputs(config, batch))
        targets, mask = to_zigzag(batch.targets), to_zigzag(batch.mask)
    head = head_of(params, config.model)
    scored: Any = score_tokens(x, head.w, head.b, targets, mask, config.train.z_loss, config.train.loss_chunks)
    total, sums = scored
    return total, sums._replace(routing=routing)


def _make_work(config: Config, batch: Batch, key: Array | None) -> Work:
    parts = _cut(jax.tree.map(to_zigzag, batch), config.train.grad_accum_steps)
    return Work(parts, config.data.isolate_documents, key)


def make_gradients(config: Config) -> Callable[[Params, Batch, Array | None], Gradients]:
    """(parameters, batch, dropout key) -> gradients of the mean loss, accumulated in float32 over the microbatches."""
    model, pieces = make_model(config.model), config.train.grad_accum_steps

    def loss_of(params: Params, part: Batch, key: Array | None, tokens: Array) -> tuple[Array, TokenLosses]:
        total, sums = _score_batch(config, model, params, part, key)
        if sums.routing is None:
            return total / tokens, sums
        # Of means over a microbatch, which count alike: padding is routed like everything else.
        return total / tokens + router_losses(config.model, sums.routing) / pieces, sums

    def gradients(params: Params, batch: Batch, key: Array | None) -> Gradients:
        tokens = jnp.sum(batch.mask)  # of the whole batch, so that parts add up to its mean whatever their masks
        if config.mesh.pipeline > 1 and config.mesh.pipeline_schedule == "1f1b":
            grads, sums = pipeline_gradients(config, params, _make_work(config, batch, key), tokens)
            return Gradients(grads, sums, jnp.zeros(()))
        if pieces == 1 or config.mesh.pipeline > 1:
            grads, sums = jax.grad(loss_of, has_aux=True)(params, batch, key, tokens)
            return Gradients(grads, sums, jnp.zeros(()))

        def accumulate(carry: Gradients, part: tuple[Array, Batch]) -> tuple[Gradients, None]:
            index, microbatch = part
            micro_key = None if key is None else jax.random.fold_in(key, index)
            grads, sums = jax.grad(loss_of, has_aux=True)(params, microbatch, micro_key, tokens)
            own_mean = global_norm(grads) * tokens / jnp.sum(microbatch.mask)
            total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), (carry.grads, carry.losses), (grads, sums))
            grads, losses = total
            return Gradients(grads, losses, carry.microbatch_sq_norm + jnp.square(own_mean) / pieces), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        zero = jnp.zeros(())
        no_losses = TokenLosses(zero, zero, zero, empty_routing(config.model))
        start = Gradients(zeros, no_losses, jnp.zeros(()))
        return jax.lax.scan(accumulate, start, (jnp.arange(pieces), _cut(batch, pieces)))[0]

    return gradients


def _cut(batch: Batch, pieces: int) -> Batch:
    """Microbatch i is rows i, i + pieces, ...: each device cuts its own rows, nothing moves."""

    def cut(x: Array) -> Array:
        parts = x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, "microbatch", "batch", *["sequence"] * (parts.ndim - 2))

    return jax.tree.map(cut, batch)


def _accept(
    guard: SkipGuard, loss: Float[Array, ""], grad_norm: Float[Array, ""], loss_spike_factor: float
) -> Bool[Array, ""]:
    """Finite, and no spike: below `loss_spike_factor` medians of the last WINDOW accepted steps, once there are so many."""
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if not loss_spike_factor:
        return ok
    calm = (loss <= loss_spike_factor * jnp.median(guard.losses)) & (
        grad_norm <= loss_spike_factor * jnp.median(guard.grad_norms)
    )
    return ok & (calm | (guard.accepted < GUARD_WINDOW))


def _update_guard(guard: SkipGuard, ok: Bool[Array, ""], loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> SkipGuard:
    place = guard.accepted % GUARD_WINDOW
    one = ok.astype(jnp.int32)
    return SkipGuard(
        skipped=guard.skipped + 1 - one,
        in_a_row=jnp.where(ok, 0, guard.in_a_row + 1),
        accepted=guard.accepted + one,
        losses=guard.losses.at[place].set(jnp.where(ok, loss, guard.losses[place])),
        grad_norms=guard.grad_norms.at[place].set(jnp.where(ok, grad_norm, guard.grad_norms[place])),
    )


def norms_by_layer(grads: Params) -> Float[Array, "L"]:
    """Norm of each layer of gradients, or of what has their structure, from the arrays stacked over the scan.

    Order within a period is the pattern's; an encoder's layers come first.
    """
    stacks: dict[str, dict[str, Array]] = {}
    for module, arrays in grads.items():
        stack, _, inner = module.partition(f"/{STACK}/")
        if inner:
            block, squares = inner.split("/")[0], stacks.setdefault(stack, {})
            for grad in arrays.values():
                square = jnp.sum(jnp.square(grad.astype(jnp.float32)), axis=tuple(range(1, grad.ndim)))
                squares[block] = squares.get(block, 0.0) + square
    by_layer = [
        jnp.stack([squares[block] for block in sorted(squares)], axis=1).reshape(-1)
        for _, squares in sorted(stacks.items(), reverse=True)  # "transformer/encoder", "transformer"
    ]
    return jnp.sqrt(jnp.concatenate(by_layer))
