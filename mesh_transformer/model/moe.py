# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A feed-forward layer of experts: a router sends every token to a few of them.

Shazeer et al. 2017 (arXiv 1701.06538), GShard (2006.16668), Switch (2101.03961) and, for renormalised gates without a
capacity, Mixtral (2401.04088). What is routed together, as far as anything depends on it, is one sequence: the function
is the same however a batch lies on devices. A sequence's choices are taken in its order, all of a token before the next
one's, so that no token is crowded out by a later one (GShard takes everyone's first choice first).

Nothing here has a [tokens, experts, capacity] array: with f the capacity factor and k choices, it would hold T^2 k f
elements for each sequence of T tokens, where the tokens at their experts, which are gathered by index, are T k f D.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import Layout, axes_of, current_layout
from mesh_transformer.model.attention.blocks import from_ring_order, to_ring_order
from mesh_transformer.model.feed_forward import ACTIVATIONS
from mesh_transformer.model.params import Inits, param
from mesh_transformer.model.quantized import widen


class Routing(NamedTuple):
    """What a router did with the tokens of a batch; arrays have a leading dimension of layers outside a layer."""

    load: Float[Array, "*L E"]  # share of all choices that fell on each expert, before any passes by
    balance: Float[Array, "*L"]  # n_experts x sum of share x mean probability; 1 where either is even
    z_square: Float[Array, "*L"]  # mean of (log of the partition function)^2
    entropy: Float[Array, "*L"]  # mean, in nats; log(n_experts) where all are equally likely
    dropped: Float[Array, "*L"]  # share of choices that found their expert full


class Weights(NamedTuple):
    """Of all experts, or of a device's own part of them."""

    w_in: Float[Array, "E D F"]
    w_gate: Float[Array, "E D F"] | None
    w_out: Float[Array, "E F D"]


class Places(NamedTuple):
    """Mesh axes that a layer's arrays are cut along; none on one device."""

    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    ff: tuple[str, ...] = ()


class Experts(hk.Module):
    """sum over the chosen experts of gate x W_out activation(W_in x), or its gated form."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(name="experts")
        self.config, self.inits = config, inits
        assert config.experts is not None
        self.choices = config.experts

    def __call__(self, x: Float[Array, "B T D"], *, decoding: bool) -> tuple[Float[Array, "B T D"], Routing]:
        """The layer's contribution to the residual stream: zero for a token whose experts are full.

        A random key is given in training alone. While `decoding`, every token is taken, for it comes alone.
        """
        c, e, inits = self.config, self.choices, self.inits
        key = hk.maybe_next_rng_key()
        w_router = param("w_router", inits.inner, embed=c.d_model, routes=e.n_experts)
        w_in = param("w_in", inits.inner, expert=e.n_experts, embed=c.d_model, ff=c.ff_dim)
        w_gate = param("w_gate", inits.inner, expert=e.n_experts, embed=c.d_model, ff=c.ff_dim) if c.gated else None
        w_out = param("w_out", inits.residual, expert=e.n_experts, ff=c.ff_dim, embed=c.d_model)
        wide_gate = None if w_gate is None else widen(w_gate, x.dtype)
        weights = Weights(widen(w_in, x.dtype), wide_gate, widen(w_out, x.dtype))

        logits = _score_experts(x, w_router, key, e.jitter)
        gates, chosen = jax.lax.top_k(jax.nn.softmax(logits), e.per_token)
        if e.per_token > 1:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        factor = e.evaluation_capacity_factor if key is None else e.capacity_factor
        capacity = None if factor is None or decoding else find_capacity(factor, x.shape[1], e.per_token, e.n_experts)
        turns = None if capacity is None else _take_turns(chosen)
        taken = jnp.ones(chosen.shape, bool) if turns is None or capacity is None else turns < capacity
        y = _run_experts(x, gates, chosen, turns, weights, capacity, ACTIVATIONS[c.activation])
        return y, _describe_routing(logits, chosen, taken, over_batch=e.balance_over == "batch")


def find_capacity(factor: float, seq_len: int, per_token: int, n_experts: int) -> int:
    """Tokens that an expert takes of a sequence: `factor` times its even share, rounded up; never more than all."""
    return min(math.ceil(factor * seq_len * per_token / n_experts), seq_len)


def count_expert_layers(config: ModelConfig) -> int:
    """Layers that have experts."""
    return config.n_layers // len(config.pattern) * sum(has_experts for _, has_experts in config.pattern)


def empty_routing(config: ModelConfig) -> Routing | None:
    """Zeros of the shapes that a model's routers report, to add to; None for a dense one."""
    if config.experts is None:
        return None
    none = jnp.zeros(count_expert_layers(config))
    return Routing(jnp.zeros((none.size, config.experts.n_experts)), none, none, none, none)


def router_losses(config: ModelConfig, routing: Routing) -> Float[Array, ""]:
    """What the routers add to the training loss: balance (Switch, equation 4) and z (ST-MoE, arXiv 2202.08906, 5)."""
    assert config.experts is not None
    weights = config.experts
    return weights.balance_loss * jnp.sum(routing.balance) + weights.router_z_loss * jnp.sum(routing.z_square)


def _score_experts(x: Float[Array, "B T D"], w: Float[Array, "D E"], key: Array | None, jitter: float) -> Array:
    """A router's logits, in float32 throughout: Switch, section 2.4."""
    x = x.astype(jnp.float32)
    if jitter and key is not None:
        # In the sequence's order, so that a token meets the same noise wherever it lies.
        x = x * to_ring_order(jax.random.uniform(key, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter))
    return jnp.einsum("btd,de->bte", x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _describe_routing(
    logits: Float[Array, "B T E"], chosen: Int[Array, "B T K"], taken: Array, *, over_batch: bool
) -> Routing:
    """Means over all tokens, on whichever device they are."""
    n_experts, tokens = logits.shape[-1], (0, 1) if over_batch else (1,)
    probabilities = jax.nn.softmax(logits)
    is_chosen = jax.nn.one_hot(chosen, n_experts)  # summed where it is made
    share = jnp.mean(is_chosen, axis=(*tokens, 2))
    balance = n_experts * jnp.sum(share * jnp.mean(probabilities, axis=tokens), axis=-1)
    entropy = -jnp.sum(probabilities * jax.nn.log_softmax(logits), axis=-1)
    return Routing(
        load=share if over_batch else jnp.mean(share, axis=0),
        balance=jnp.mean(balance),
        z_square=jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        entropy=jnp.mean(entropy),
        dropped=jnp.mean(~taken, dtype=jnp.float32),
    )


def _take_turns(chosen: Int[Array, "B T K"]) -> Int[Array, "B T K"]:
    """How many of the same sequence chose the same expert before.

    By sorting: T k numbers for each sequence, which devices that share it exchange, instead of sums over [T k, E].
    """
    flat = from_ring_order(chosen).reshape(chosen.shape[0], -1)
    order = jnp.argsort(flat, axis=1, stable=True)
    experts, places = jnp.take_along_axis(flat, order, axis=1), jnp.arange(flat.shape[1])[None]
    is_first = jnp.concatenate([jnp.ones_like(experts[:, :1], bool), experts[:, 1:] != experts[:, :-1]], axis=1)
    turns = places - jax.lax.cummax(jnp.where(is_first, places, 0), axis=1)
    turns = jnp.take_along_axis(turns, jnp.argsort(order, axis=1), axis=1)
    return to_ring_order(turns.reshape(chosen.shape))


def _run_experts(
    x: Float[Array, "B T D"],
    gates: Float[Array, "B T K"],
    chosen: Int[Array, "B T K"],
    turns: Int[Array, "B T K"] | None,
    weights: Weights,
    capacity: int | None,
    activation: Callable[[Array], Array],
) -> Float[Array, "B T D"]:
    """The experts' outputs, weighted and added up; each device runs the experts it has."""
    run = partial(_run_all, activation=activation)
    if capacity is not None:
        run = partial(_run_seated, capacity=capacity, n_experts=weights.w_in.shape[0], activation=activation)
    inputs = (x, gates, chosen) if turns is None else (x, gates, chosen, turns)
    layout = current_layout()
    if layout is None:
        return run(weights, *inputs, places=Places())
    places, specs = _find_places(layout, x, weights)
    stream = P(places.batch or None, places.sequence or None)
    return jax.shard_map(
        partial(run, places=places),
        mesh=layout.mesh,
        in_specs=(specs, *[stream] * len(inputs)),
        out_specs=stream,
        check_vma=False,
    )(weights, *inputs)


def _find_places(layout: Layout, x: Array, weights: Weights) -> tuple[Places, Any]:
    """Where tokens and weights lie. Weights are gathered along embed: what they are cut into there moves once."""

    def axes(names: tuple[str, ...], shape: tuple[int, ...], name: str) -> list[tuple[str, ...]]:
        spec = layout.spec(names, shape, name)
        return [axes_of(spec[i]) if i < len(spec) else () for i in range(len(names))]

    batch, sequence, _ = axes(("batch", "sequence", "residual"), x.shape, "activation [experts]")
    expert, _, ff = axes(("expert", "residual", "ff"), weights.w_in.shape, "experts/w_in")
    if not set(expert) <= set(batch):
        raise ConfigError(
            f"mesh.rules.expert: experts lie on {' and '.join(expert)}, along which the batch is not cut; "
            f"add it to mesh.rules.batch"
        )
    inward, outward = P(expert or None, None, ff or None), P(expert or None, ff or None)
    return Places(batch, sequence, expert, ff), Weights(inward, None if weights.w_gate is None else inward, outward)  # type: ignore[arg-type]


def _feed(rows: Array, weights: Weights, product: Callable[..., Array], activation: Callable[[Array], Array]) -> Array:
    hidden = product(rows, weights.w_in)
    gated = weights.w_gate is not None
    hidden = activation(product(rows, weights.w_gate)) * hidden if gated else activation(hidden)
    return product(hidden, weights.w_out)


def _run_seated(
    weights: Weights,
    x: Array,
    gates: Array,
    chosen: Array,
    turns: Array,
    *,
    capacity: int,
    n_experts: int,
    activation: Callable[[Array], Array],
    places: Places,
) -> Array:
    """Every expert has `capacity` seats for each sequence; a choice whose turn comes later contributes nothing.

    Between devices: B T k f D elements are sent to the experts along `expert` and as many back (all-to-all; each device
    keeps one piece of them), the same along `context` where sequences are cut (reduce-scatter, all-gather), and the sum
    over `tensor` of B T D elements that a dense layer has too.
    """
    batch, _, width = x.shape
    pieces = jax.lax.axis_size(places.sequence) if places.sequence else 1
    seats = -(-capacity // pieces) * pieces  # as many for each piece of the sequence; the last ones stay empty
    seat = jnp.where(turns < capacity, chosen * seats + turns, n_experts * seats).reshape(batch, -1)
    row, token = jnp.arange(batch)[:, None], jnp.arange(seat.shape[1])[None] // gates.shape[2]
    # Which token sits where (0: none, or one of another piece of the sequence): indices are scattered, tokens gathered.
    taken = jnp.zeros((batch, n_experts * seats), jnp.int32).at[row, seat].set(token + 1, mode="drop")
    padded = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
    seated = padded[row, taken].reshape(batch, n_experts, seats, width).swapaxes(0, 1)
    if places.sequence:
        seated = jax.lax.psum_scatter(seated, places.sequence, scatter_dimension=2, tiled=True)
    if places.expert:
        seated = jax.lax.all_to_all(seated, places.expert, split_axis=0, concat_axis=1, tiled=True)
    product = partial(jnp.einsum, "ebci,eio->ebco", preferred_element_type=x.dtype)
    out = _feed(seated, weights, product, activation)
    if places.expert:
        out = jax.lax.all_to_all(out, places.expert, split_axis=1, concat_axis=0, tiled=True)
    if places.sequence:
        out = jax.lax.all_gather(out, places.sequence, axis=2, tiled=True)
    out = jnp.pad(out.swapaxes(0, 1).reshape(batch, -1, width), ((0, 0), (0, 1), (0, 0)))  # the last seat: nobody's
    y = _weigh(out[row, seat].reshape(*gates.shape, width), gates, x.dtype)
    return jax.lax.psum(y, places.ff) if places.ff else y


def _run_all(
    weights: Weights, x: Array, gates: Array, chosen: Array, *, activation: Callable[[Array], Array], places: Places
) -> Array:
    """Every token is taken: sorted by expert, each run of equal ones meets its expert's weights (jax.lax.ragged_dot).

    How many tokens an expert gets is known only then, so devices along `expert` gather each other's B T D elements
    (all-gather), apply their own experts and add up (reduce-scatter): n_expert_pieces / (2 k) of what an all-to-all with
    room for every token moves. On a CPU XLA multiplies every token by every expert: right, but slow with many of them.
    """
    own, per_token = weights.w_in.shape[0], gates.shape[2]
    first = 0
    if places.expert:
        first = jax.lax.axis_index(places.expert) * own
        x, gates, chosen = (jax.lax.all_gather(a, places.expert, axis=0, tiled=True) for a in (x, gates, chosen))
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < own), local, own)  # others' come last, in no run
    order = jnp.argsort(local, stable=True)
    sizes = jnp.sum(local[None] == jnp.arange(own)[:, None], axis=1, dtype=jnp.int32)
    rows = x.reshape(-1, x.shape[2])[order // per_token]
    product = partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=x.dtype)
    out = _feed(rows, weights, product, activation)
    out = jnp.where((local[order] < own)[:, None], out, 0)[jnp.argsort(order)]
    y = _weigh(out.reshape(*gates.shape, -1), gates, x.dtype)
    if places.expert:
        y = jax.lax.psum_scatter(y, places.expert, scatter_dimension=0, tiled=True)
    return jax.lax.psum(y, places.ff) if places.ff else y


def _weigh(out: Float[Array, "B T K D"], gates: Float[Array, "B T K"], dtype: Any) -> Float[Array, "B T D"]:
    """Weighted and added up in float32, and narrow again before it moves."""
    return jnp.sum(out.astype(jnp.float32) * gates[..., None], axis=2).astype(dtype)
