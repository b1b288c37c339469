# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The router: logits, assignment of tokens to experts, capacity, statistics, and auxiliary losses."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.model.attention.ring import from_zigzag, to_zigzag


class RoutingStats(NamedTuple):
    """Router statistics over the tokens of a batch. Outside a layer, arrays have a leading dimension of layers."""

    expert_load: Float[Array, "*L E"]  # fraction of all assignments to each expert, including dropped assignments
    aux_loss: Float[Array, "*L"]  # n_experts * sum(load * mean probability); 1 if load or probability is uniform
    router_z: Float[Array, "*L"]  # mean of (log of the partition function)^2
    entropy: Float[Array, "*L"]  # mean, in nats; log(n_experts) if all experts are equally probable
    # Fraction of assignments dropped because the expert was full; with expert choice, fraction of tokens that no expert chose.
    dropped_fraction: Float[Array, "*L"]


class Assignment(NamedTuple):
    """Assignment of tokens to experts. With expert choice, K is the number of experts, and index k is expert k."""

    gates: Float[Array, "B T K"]
    experts: Int[Array, "B T K"]
    rank_in_expert: Int[Array, "B T K"] | None  # rank among the expert's assignments in a group; None: no capacity
    dropout_mask: Bool[Array, "..."] | None  # hidden units to keep: [E groups C F], or [B T K F] without a capacity


def expert_capacity(factor: float, tokens: int, n_experts_per_token: int, n_experts: int) -> int:
    """Return the number of tokens that an expert processes per group of `tokens` tokens.

    The result is `factor` times an equal share of the assignments, rounded up, and at most `tokens`.
    """
    return min(math.ceil(factor * tokens * n_experts_per_token / n_experts), tokens)


def expert_rows_per_token(config: ModelConfig, *, training: bool = True) -> float:
    """Return the number of rows of expert matmuls per token in one layer, including rows of unused capacity."""
    e = config.experts
    if e is None:
        return 0.0
    if not training and e.eval_capacity is not None:
        return min(e.eval_capacity, config.seq_len) * e.n_experts / config.seq_len
    factor = e.capacity_factor if training else e.eval_capacity_factor
    if factor is None:
        return float(e.n_experts_per_token)
    tokens = e.group_size * config.seq_len
    return expert_capacity(factor, tokens, e.n_experts_per_token, e.n_experts) * e.n_experts / tokens


def count_expert_layers(config: ModelConfig) -> int:
    """Return the number of layers with experts, including the layers of an encoder."""
    encoder = config.encoder
    kinds = (*config.layer_kinds, *(encoder.layer_kinds if encoder else ()))
    return sum(kind.has_experts for kind in kinds)


def zero_routing_stats(config: ModelConfig) -> RoutingStats | None:
    """Return zeros with the shapes of a model's routing statistics, for accumulation; None for a dense model."""
    if config.experts is None:
        return None
    zeros = jnp.zeros(count_expert_layers(config))
    return RoutingStats(jnp.zeros((zeros.size, config.experts.n_experts)), zeros, zeros, zeros, zeros)


def router_losses(config: ModelConfig, routing: RoutingStats) -> Float[Array, ""]:
    """Return the auxiliary losses of the routers.

    The result is the weighted sum of the load-balancing loss (Switch, equation 4) and the router z-loss (ST-MoE, arXiv
    2202.08906, equation 5).
    """
    assert config.experts is not None
    weights = config.experts
    return weights.aux_loss_weight * jnp.sum(routing.aux_loss) + weights.router_z_loss * jnp.sum(routing.router_z)


def router_logits(
    x: Float[Array, "B T D"], w: Float[Array, "D E"], b: Float[Array, "E"] | None, key: Array | None, jitter: float
) -> Float[Array, "B T E"]:
    """Return a router's logits, in float32 throughout (Switch, section 2.4)."""
    x = x.astype(jnp.float32)
    if jitter and key is not None:
        # Sampled in the natural order of the sequence, so that the noise of a token does not depend on the mesh.
        x = x * to_zigzag(jax.random.uniform(key, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter))
    logits = jnp.einsum("btd,de->bte", x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return logits if b is None else logits + b[None, None]


def router_scores(logits: Float[Array, "B T E"], experts: ExpertsConfig) -> Float[Array, "B T E"]:
    """Return the scores of all experts for each token: softmax probabilities, or independent sigmoids."""
    return jax.nn.sigmoid(logits) if experts.scores == "sigmoid" else jax.nn.softmax(logits)


def select_experts(
    scores: Float[Array, "B T E"], selection_bias: Float[Array, "E"] | None, experts: ExpertsConfig
) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
    """Return the gates and the indices of each token's experts, in order of decreasing preference."""
    preference = scores if selection_bias is None else scores + selection_bias[None, None]
    if experts.limits_groups:
        preference = _limit_groups(preference, experts)
    _, selected = jax.lax.top_k(jax.lax.stop_gradient(preference), experts.n_experts_per_token)
    gates = jnp.take_along_axis(scores, selected, axis=-1)
    if experts.normalizes_gates:  # 1e-20 as in DeepSeek V3: a sum of sigmoids can be zero
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    return gates * experts.gate_scale, selected


def _limit_groups(preference: Float[Array, "B T E"], experts: ExpertsConfig) -> Float[Array, "B T E"]:
    """Return the preferences of the experts in each token's best groups, and minus infinity for other experts.

    Sources: DeepSeek V2 (arXiv 2405.04434, section 2.2.2) and V3 (2412.19437, section 2.1.2).
    """
    by_group = preference.reshape(*preference.shape[:-1], experts.n_expert_groups, -1)
    best, _ = jax.lax.top_k(by_group, 1 if experts.group_score == "max" else 2)
    _, groups = jax.lax.top_k(jnp.sum(best, axis=-1), experts.groups_per_token)
    is_chosen = jnp.any(jax.nn.one_hot(groups, experts.n_expert_groups, dtype=bool), axis=-2)
    return jnp.where(is_chosen[..., None], by_group, -jnp.inf).reshape(preference.shape)


def routing_stats(
    logits: Float[Array, "B T E"], counts: Array, dropped: Bool[Array, "..."], *, over_batch: bool
) -> RoutingStats:
    """Return means over all tokens of all devices. `counts` [B, T, E] is the number of assignments of a token to an expert."""
    n_experts = logits.shape[-1]
    token_dims = (0, 1) if over_batch else (1,)
    probabilities = jax.nn.softmax(logits)
    mean_counts = jnp.mean(counts, axis=token_dims, dtype=jnp.float32)
    load = mean_counts / jnp.sum(mean_counts, axis=-1, keepdims=True)
    aux_loss = n_experts * jnp.sum(load * jnp.mean(probabilities, axis=token_dims), axis=-1)
    entropy = -jnp.sum(probabilities * jax.nn.log_softmax(logits), axis=-1)
    return RoutingStats(
        expert_load=load if over_batch else jnp.mean(load, axis=0),
        aux_loss=jnp.mean(aux_loss),
        router_z=jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        entropy=jnp.mean(entropy),
        dropped_fraction=jnp.mean(dropped, dtype=jnp.float32),
    )


def rank_in_expert(experts: Int[Array, "B T K"], group_size: int) -> Int[Array, "B T K"]:
    """Return, for each assignment, the number of earlier assignments of its group to the same expert.

    A group has `group_size` sequences. The ranks are computed by sorting: devices that share a group exchange T K integers
    per sequence instead of the partial sums of a one-hot array [T K, E].
    """
    flat = from_zigzag(experts).reshape(experts.shape[0] // group_size, -1)
    order = jnp.argsort(flat, axis=1, stable=True)
    ordered = jnp.take_along_axis(flat, order, axis=1)
    index = jnp.arange(flat.shape[1])[None]
    is_first = jnp.concatenate([jnp.ones_like(ordered[:, :1], bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    rank = index - jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)
    rank = jnp.take_along_axis(rank, jnp.argsort(order, axis=1), axis=1)
    return to_zigzag(rank.reshape(experts.shape))


def rank_for_expert(probabilities: Float[Array, "B T E"], group_size: int) -> Int[Array, "B T E"]:
    """Return the rank of each token for each expert, by probability within the group. Ties rank the earlier token first."""
    shape = probabilities.shape
    negated = -from_zigzag(jax.lax.stop_gradient(probabilities)).reshape(shape[0] // group_size, -1, shape[2])
    return to_zigzag(jnp.argsort(jnp.argsort(negated, axis=1, stable=True), axis=1).reshape(shape))
