# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Which experts a token is for, what the routers of a model did, and what that costs in the training loss."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.attention.ring import from_zigzag, to_zigzag


class RoutingStats(NamedTuple):
    """What a router did with the tokens of a batch; arrays have a leading dimension of layers outside a layer."""

    expert_load: Float[Array, "*L E"]  # share of all choices that fell on each expert, before any passes by
    aux_loss: Float[Array, "*L"]  # n_experts x sum of share x mean probability; 1 where either is even
    router_z: Float[Array, "*L"]  # mean of (log of the partition function)^2
    entropy: Float[Array, "*L"]  # mean, in nats; log(n_experts) where all are equally likely
    dropped_fraction: Float[
        Array, "*L"
    ]  # share of choices that found their expert full; of tokens, if experts chose none of them


class Assignment(NamedTuple):
    """Which experts a token is for. Where experts choose, K is all of them, in their order."""

    gates: Float[Array, "B T K"]
    experts: Int[Array, "B T K"]
    rank_in_expert: Int[Array, "B T K"] | None  # how many of the group come to this expert before; None: every token is taken
    dropout_mask: Bool[Array, "..."] | None  # hidden units that dropout leaves: [E groups C F], without a capacity [B T K F]


def find_capacity(factor: float, tokens: int, n_experts_per_token: int, n_experts: int) -> int:
    """Tokens that an expert takes of a group: `factor` times its even share, rounded up; never more than all."""
    return min(math.ceil(factor * tokens * n_experts_per_token / n_experts), tokens)


def rows_per_token(config: ModelConfig, *, training: bool = True) -> float:
    """Rows that the experts of a layer compute for each token of a sequence: its choices, or all seats, empty ones too."""
    e = config.experts
    if e is None:
        return 0.0
    if not training and e.eval_capacity is not None:
        return min(e.eval_capacity, config.seq_len) * e.n_experts / config.seq_len
    factor = e.capacity_factor if training else e.eval_capacity_factor
    if factor is None:
        return float(e.n_experts_per_token)
    tokens = e.group_size * config.seq_len
    return find_capacity(factor, tokens, e.n_experts_per_token, e.n_experts) * e.n_experts / tokens


def count_expert_layers(config: ModelConfig) -> int:
    """Layers that have experts, in the encoder too."""
    layers = config.n_layers + (config.n_encoder_layers or 0)
    return layers // len(config.pattern) * sum(has_experts for _, has_experts in config.pattern)


def empty_routing(config: ModelConfig) -> RoutingStats | None:
    """Zeros of the shapes that a model's routers report, to add to; None for a dense one."""
    if config.experts is None:
        return None
    none = jnp.zeros(count_expert_layers(config))
    return RoutingStats(jnp.zeros((none.size, config.experts.n_experts)), none, none, none, none)


def router_losses(config: ModelConfig, routing: RoutingStats) -> Float[Array, ""]:
    """What the routers add to the training loss: balance (Switch, equation 4) and z (ST-MoE, arXiv 2202.08906, 5)."""
    assert config.experts is not None
    weights = config.experts
    return weights.aux_loss_weight * jnp.sum(routing.aux_loss) + weights.router_z_loss * jnp.sum(routing.router_z)


def score_experts(x: Float[Array, "B T D"], w: Float[Array, "D E"], key: Array | None, jitter: float) -> Array:
    """A router's logits, in float32 throughout: Switch, section 2.4."""
    x = x.astype(jnp.float32)
    if jitter and key is not None:
        # In the sequence's order, so that a token meets the same noise wherever it lies.
        x = x * to_zigzag(jax.random.uniform(key, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter))
    return jnp.einsum("btd,de->bte", x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def describe_routing(
    logits: Float[Array, "B T E"], counts: Array, passed_by: Bool[Array, "..."], *, over_batch: bool
) -> RoutingStats:
    """Means over all tokens, on whichever device they are; `counts` says which experts each token is for."""
    n_experts, tokens = logits.shape[-1], (0, 1) if over_batch else (1,)
    probabilities = jax.nn.softmax(logits)
    mean_counts = jnp.mean(counts, axis=tokens, dtype=jnp.float32)
    share = mean_counts / jnp.sum(mean_counts, axis=-1, keepdims=True)
    balance = n_experts * jnp.sum(share * jnp.mean(probabilities, axis=tokens), axis=-1)
    entropy = -jnp.sum(probabilities * jax.nn.log_softmax(logits), axis=-1)
    return RoutingStats(
        expert_load=share if over_batch else jnp.mean(share, axis=0),
        aux_loss=jnp.mean(balance),
        router_z=jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        entropy=jnp.mean(entropy),
        dropped_fraction=jnp.mean(passed_by, dtype=jnp.float32),
    )


def take_turns(chosen: Int[Array, "B T K"], group: int) -> Int[Array, "B T K"]:
    """How many of the same group of `group` sequences chose the same expert before.

    By sorting: T k numbers for each sequence, which devices that share a group exchange, instead of sums over [T k, E].
    """
    flat = from_zigzag(chosen).reshape(chosen.shape[0] // group, -1)
    order = jnp.argsort(flat, axis=1, stable=True)
    experts, places = jnp.take_along_axis(flat, order, axis=1), jnp.arange(flat.shape[1])[None]
    is_first = jnp.concatenate([jnp.ones_like(experts[:, :1], bool), experts[:, 1:] != experts[:, :-1]], axis=1)
    turns = places - jax.lax.cummax(jnp.where(is_first, places, 0), axis=1)
    turns = jnp.take_along_axis(turns, jnp.argsort(order, axis=1), axis=1)
    return to_zigzag(turns.reshape(chosen.shape))


def rank_tokens(probabilities: Float[Array, "B T E"], group: int) -> Int[Array, "B T E"]:
    """How many of the same group of sequences an expert is likelier for; of equal ones the earlier comes first."""
    shape = probabilities.shape
    wanted = -from_zigzag(jax.lax.stop_gradient(probabilities)).reshape(shape[0] // group, -1, shape[2])
    return to_zigzag(jnp.argsort(jnp.argsort(wanted, axis=1, stable=True), axis=1).reshape(shape))
