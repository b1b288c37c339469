# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training step: gradients over microbatches, skip guard, optimizer update. Evaluation step: losses only."""

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
from mesh_transformer.model.lm_head import head_matrix, lm_head
from mesh_transformer.model.moe.router import RoutingStats, router_losses, zero_routing_stats
from mesh_transformer.model.params import Params, split_scan
from mesh_transformer.model.transformer import Model, make_model
from mesh_transformer.reports.metrics_table import representative_layers
from mesh_transformer.train.loss import TokenLosses, chunked_cross_entropy, loss_options, require_head
from mesh_transformer.train.noise_scale import noise_scale, update_noise_scale
from mesh_transformer.train.optimizer import global_norm
from mesh_transformer.train.pipeline import Microbatches, pipeline_gradients, pipeline_hidden
from mesh_transformer.train.schedule import make_schedule
from mesh_transformer.train.state import GUARD_WINDOW, SkipGuard, TrainState, make_run_optimizer

Metrics = dict[str, Array]


class Gradients(NamedTuple):
    """Result of the backward pass over a batch."""

    grads: Params  # of the mean loss over the batch, float32
    losses: TokenLosses
    microbatch_sq_norm: Float[Array, ""]  # mean over microbatches of the squared norm of their mean gradient


def make_train_step(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the pure function (state, batch) -> (state, metrics) that training runs and the planner compiles."""
    optimizer = make_run_optimizer(config)
    schedule = make_schedule(config.optimizer, config.train.steps)
    compute_gradients = make_gradients(config)
    train = config.train

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = dropout_key(config, state.step)
        grads, losses, microbatch_sq_norm = compute_gradients(state.params, batch, key)
        loss = losses.sum_loss / losses.tokens
        grad_norm = global_norm(grads)
        is_good = _is_good_step(state.guard, loss, grad_norm, train.loss_spike_factor)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        noise = state.noise
        if noise is not None:
            batch_size = batch.tokens.shape[0]
            noise = update_noise_scale(
                noise,
                microbatch_sq_norm,
                jnp.square(grad_norm),
                batch_size // train.grad_accum_steps,
                batch_size,
            )
        # Select instead of multiplying by 0 or 1: 0 x NaN is NaN. A skipped step leaves every leaf unchanged.
        params, opt_state, noise = jax.tree.map(
            lambda new, old: jnp.where(is_good, new, old),
            (params, opt_state, noise),
            (state.params, state.opt_state, state.noise),
        )
        guard = _update_guard(state.guard, is_good, loss, grad_norm)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "z_loss_raw": losses.sum_log_z_squared / losses.tokens,
            "skipped": guard.skipped,
            "consecutive_skips": guard.in_a_row,
        }
        if losses.routing is not None:
            metrics |= _routing_metrics(jax.tree.map(lambda x: x / train.grad_accum_steps, losses.routing))
        if noise is not None:
            metrics["noise_scale"] = noise_scale(noise)
        if train.log_layer_grad_norms:
            metrics["layer_grad_norms"] = norms_by_layer(grads)
        return TrainState(state.step + 1, params, opt_state, guard, noise), metrics

    return train_step


def _block_index(block: str) -> int:
    return int(block.removeprefix("block_"))


def dropout_key(config: Config, step: Int[Array, ""]) -> PRNGKeyArray | None:
    """Return the random key of a step for dropout and router jitter; None for a model without either."""
    is_random = config.model.dropout or config.model.experts
    return jax.random.fold_in(jax.random.key(config.run.seed), step) if is_random else None


def _routing_metrics(routing: RoutingStats) -> Metrics:
    """Return router metrics: means over the layers with experts, the maximum load, and the number of idle experts."""
    load = routing.expert_load * routing.expert_load.shape[1]  # in multiples of a uniform load
    return {
        "aux_loss": jnp.mean(routing.aux_loss),
        "router_z_loss": jnp.mean(routing.router_z),
        "router_entropy": jnp.mean(routing.entropy),
        "dropped_fraction": jnp.mean(routing.dropped_fraction),
        "expert_load": load[jnp.array(representative_layers(load.shape[0]))],
        "max_expert_load": jnp.max(load),
        "idle_experts": jnp.sum(routing.expert_load == 0),
    }


def make_eval_step(config: Config) -> Callable[[Params, Batch], TokenLosses]:
    """Return the pure function (params, batch) -> summed losses, without dropout."""
    model = make_model(config.model)

    def eval_step(params: Params, batch: Batch) -> TokenLosses:
        return _batch_loss(config, model, params, batch, None, training=False)[1]._replace(routing=None)

    return eval_step


def model_inputs(config: Config, batch: Batch) -> dict[str, Any]:
    """Return the model's inputs besides tokens: encoder tokens; positions and segment IDs if documents are isolated.

    Without isolated documents the model uses its defaults, which need no memory.
    """
    if config.model.n_encoder_layers is not None:
        return {"encoder_tokens": batch.encoder_tokens}
    return {"positions": batch.positions, "segment_ids": batch.segment_ids} if config.data.isolate_documents else {}


def _batch_loss(
    config: Config, model: Model, params: Params, batch: Batch, key: Array | None, *, training: bool
) -> tuple[Array, TokenLosses]:
    """Return the summed loss of a batch without router losses, and its parts; routing is summed over microbatches."""
    if config.mesh.pipeline > 1:
        microbatches = _make_microbatches(config, batch, key, training=training)
        hidden, routing = pipeline_hidden(config, params, microbatches)
        # Microbatches are interleaved rows of the batch (`_split_batch`): undo this, without communication.
        x, targets, mask = (
            y.swapaxes(0, 1).reshape(-1, *y.shape[2:])
            for y in (hidden, microbatches.batch.targets, microbatches.batch.mask)
        )
    else:
        inputs = model_inputs(config, batch)
        x, routing = model.hidden_states(params, batch.tokens, dropout_key=key, training=training, **inputs)
        targets, mask = to_zigzag(batch.targets), to_zigzag(batch.mask)
    require_head(config.model)
    head = lm_head(params, config.model)
    w = head_matrix(head, config.model)
    result: Any = chunked_cross_entropy(x, w, head.b, targets, mask, loss_options(config))
    total, sums = result
    return total, sums._replace(routing=routing)


def _make_microbatches(config: Config, batch: Batch, key: Array | None, *, training: bool) -> Microbatches:
    split = _split_batch(jax.tree.map(to_zigzag, batch), config.train.grad_accum_steps)
    return Microbatches(split, config.data.isolate_documents, key, training)


def make_gradients(config: Config) -> Callable[[Params, Batch, Array | None], Gradients]:
    """Return a function (params, batch, dropout key) -> gradients of the mean loss, accumulated in float32."""
    model = make_model(config.model)
    n_microbatches = config.train.grad_accum_steps

    def loss_fn(params: Params, microbatch: Batch, key: Array | None, tokens: Array) -> tuple[Array, TokenLosses]:
        total, sums = _batch_loss(config, model, params, microbatch, key, training=True)
        if sums.routing is None:
            return total / tokens, sums
        # Router losses are means over a microbatch. All microbatches have equal weight because padding is routed too.
        return total / tokens + router_losses(config.model, sums.routing) / n_microbatches, sums

    def gradients(params: Params, batch: Batch, key: Array | None) -> Gradients:
        tokens = jnp.sum(batch.mask)  # of the whole batch, so that the microbatch losses sum to the mean over the batch
        if config.mesh.pipeline > 1 and config.mesh.pipeline_schedule == "1f1b":
            grads, sums = pipeline_gradients(
                config, params, _make_microbatches(config, batch, key, training=True), tokens
            )
            return Gradients(grads, sums, jnp.zeros(()))
        if n_microbatches == 1 or config.mesh.pipeline > 1:
            grads, sums = jax.grad(loss_fn, has_aux=True)(params, batch, key, tokens)
            return Gradients(grads, sums, jnp.zeros(()))

        def accumulate(carry: Gradients, item: tuple[Array, Batch]) -> tuple[Gradients, None]:
            index, microbatch = item
            micro_key = None if key is None else jax.random.fold_in(key, index)
            grads, sums = jax.grad(loss_fn, has_aux=True)(params, microbatch, micro_key, tokens)
            mean_norm = global_norm(grads) * tokens / jnp.sum(microbatch.mask)
            total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), (carry.grads, carry.losses), (grads, sums))
            grads, losses = total
            return Gradients(grads, losses, carry.microbatch_sq_norm + jnp.square(mean_norm) / n_microbatches), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        zero = jnp.zeros(())
        no_losses = TokenLosses(zero, zero, zero, zero_routing_stats(config.model))
        start = Gradients(zeros, no_losses, jnp.zeros(()))
        return jax.lax.scan(accumulate, start, (jnp.arange(n_microbatches), _split_batch(batch, n_microbatches)))[0]

    return gradients


def _split_batch(batch: Batch, n_microbatches: int) -> Batch:
    """Split a batch into microbatches [M, B / M, ...]; row i goes to microbatch i mod M, so no row changes its device."""

    def split(x: Array) -> Array:
        microbatches = x.reshape(-1, n_microbatches, *x.shape[1:]).swapaxes(0, 1)
        return constrain(microbatches, "microbatch", "batch", *["sequence"] * (microbatches.ndim - 2))

    return jax.tree.map(split, batch)


def _is_good_step(
    guard: SkipGuard, loss: Float[Array, ""], grad_norm: Float[Array, ""], loss_spike_factor: float
) -> Bool[Array, ""]:
    """Return whether loss and gradient norm are finite and not spikes.

    A spike is above `loss_spike_factor` times the median of the last GUARD_WINDOW accepted steps; none is detected
    before that many steps were accepted.
    """
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if not loss_spike_factor:
        return is_finite
    no_spike = (loss <= loss_spike_factor * jnp.median(guard.losses)) & (
        grad_norm <= loss_spike_factor * jnp.median(guard.grad_norms)
    )
    return is_finite & (no_spike | (guard.accepted < GUARD_WINDOW))


def _update_guard(
    guard: SkipGuard, is_good: Bool[Array, ""], loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> SkipGuard:
    index = guard.accepted % GUARD_WINDOW
    accepted = is_good.astype(jnp.int32)
    return SkipGuard(
        skipped=guard.skipped + 1 - accepted,
        in_a_row=jnp.where(is_good, 0, guard.in_a_row + 1),
        accepted=guard.accepted + accepted,
        losses=guard.losses.at[index].set(jnp.where(is_good, loss, guard.losses[index])),
        grad_norms=guard.grad_norms.at[index].set(jnp.where(is_good, grad_norm, guard.grad_norms[index])),
    )


def norms_by_layer(grads: Params) -> Float[Array, "L"]:
    """Return the norm of each layer of the gradients (or parameters), from the arrays stacked over the layer scan.

    Layers within a period are in the order of the pattern; the encoder's layers come first.
    """
    stacks: dict[tuple[str, str], dict[str, Array]] = {}
    for module, arrays in grads.items():
        outer, scan, inner = split_scan(module)
        if inner:
            block = inner.split("/")[0]
            squares = stacks.setdefault((outer, scan), {})
            for grad in arrays.values():
                square = jnp.sum(jnp.square(grad.astype(jnp.float32)), axis=tuple(range(1, grad.ndim)))
                squares[block] = squares.get(block, 0.0) + square
    by_layer = [
        jnp.stack([squares[block] for block in sorted(squares, key=_block_index)], axis=1).reshape(-1)
        # "transformer/encoder" before "transformer", and "first_layers" before "layers"
        for _, squares in sorted(stacks.items(), key=lambda item: (item[0][0] == "transformer", item[0][1]))
    ]
    return jnp.sqrt(jnp.concatenate(by_layer))
