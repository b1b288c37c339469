# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A feed-forward layer of experts: a router sends every token to a few of them.

Shazeer et al. 2017 (arXiv 1701.06538), GShard (2006.16668), Switch (2101.03961) and, for renormalised gates without a
capacity, Mixtral (2401.04088). What is routed together, as far as anything depends on it, is a group of sequences (one,
unless experts.group_size says more), and never what a device happens to hold: the function is the same however a batch lies
on devices. A group's choices are taken in its order, a sequence before the next one and all of a token before the next
one's, so that no token is crowded out by a later one (GShard takes everyone's first choice first). Where experts choose
instead (Zhou et al. 2022, 2202.09368), each takes the tokens of a group that it is likeliest for, wherever they are:
what becomes of a token then depends on those after it.

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
from jaxtyping import Array, Bool, Float

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout, axes_of, current_layout
from mesh_transformer.model.attention.ring import to_zigzag
from mesh_transformer.model.feed_forward import ACTIVATIONS
from mesh_transformer.model.moe.router import (
    Assignment,
    RoutingStats,
    describe_routing,
    find_capacity,
    rank_tokens,
    score_experts,
    take_turns,
)
from mesh_transformer.model.params import Inits, param
from mesh_transformer.model.quantization import dequantize


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
    group: tuple[str, ...] = ()  # the last of `batch`, over which the sequences of one group lie

    @property
    def seats(self) -> tuple[str, ...]:
        """Whose devices have tokens for the same seats of an expert, and run a piece of these each."""
        return tuple(axis for axis in self.group if axis not in self.expert) + self.sequence

    @property
    def groups(self) -> tuple[str, ...]:
        """Whose devices have other groups, after the tokens went to their experts."""
        return tuple(axis for axis in self.batch if axis not in (*self.group, *self.expert))


class Experts(hk.Module):
    """sum over the chosen experts of gate x W_out activation(W_in x), or its gated form."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(name="experts")
        self.config, self.inits = config, inits
        assert config.experts is not None
        self.choices = config.experts

    def __call__(self, x: Float[Array, "B T D"], *, decoding: bool) -> tuple[Float[Array, "B T D"], RoutingStats]:
        """The layer's contribution to the residual stream.

        A random key is given in training alone. While `decoding`, a token goes to its likeliest experts, which take it:
        it comes alone.
        """
        c, e, inits = self.config, self.choices, self.inits
        key = hk.maybe_next_rng_key()
        w_router = param("w_router", inits.input, embed=c.d_model, router=e.n_experts)
        w_in = param("w_in", inits.input, expert=e.n_experts, embed=c.d_model, ff=c.ff_dim)
        w_gate = param("w_gate", inits.input, expert=e.n_experts, embed=c.d_model, ff=c.ff_dim) if c.gated_ffn else None
        w_out = param("w_out", inits.output, expert=e.n_experts, ff=c.ff_dim, embed=c.d_model)
        wide_gate = None if w_gate is None else dequantize(w_gate, x.dtype)
        weights = Weights(dequantize(w_in, x.dtype), wide_gate, dequantize(w_out, x.dtype))

        logits = score_experts(x, w_router, key, e.router_jitter)
        factor = e.eval_capacity_factor if key is None else e.capacity_factor
        capacity, group = None, 1
        if e.eval_capacity is not None and key is None and not decoding:
            capacity = min(e.eval_capacity, x.shape[1])
        elif factor is not None and not decoding:
            group = _find_group(e.group_size, x.shape[0])
            capacity = find_capacity(factor, group * x.shape[1], e.n_experts_per_token, e.n_experts)
        by_expert, probabilities = e.routing == "expert-choice" and not decoding, jax.nn.softmax(logits)
        if by_expert:
            gates, turns = probabilities, rank_tokens(probabilities, group)
            experts = jnp.broadcast_to(jnp.arange(e.n_experts), gates.shape)
        else:
            gates, experts = _choose(probabilities, e.n_experts_per_token)
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True) if e.scales_gates else gates
            turns = None if capacity is None else take_turns(experts, group)
        taken = jnp.ones(experts.shape, bool) if turns is None or capacity is None else turns < capacity
        kept = _draw_kept(c, key, experts.shape, capacity, group)
        feed = partial(_feed, activation=ACTIVATIONS[c.activation], dropout=e.expert_dropout)
        y = _run_experts(x, Assignment(gates, experts, turns, kept), weights, capacity, group, feed, by_expert=by_expert)
        if e.dropped_tokens == "gated-input":
            y = y + (x * jnp.sum(jnp.where(taken, 0.0, gates), axis=-1, keepdims=True)).astype(y.dtype)
        over_batch = e.aux_loss_scope == "batch"
        if by_expert:
            return y, describe_routing(logits, taken, ~jnp.any(taken, axis=-1), over_batch=over_batch)
        counts = jnp.sum(jax.nn.one_hot(experts, e.n_experts), axis=2)  # summed where it is made
        return y, describe_routing(logits, counts, ~taken, over_batch=over_batch)


def _choose(probabilities: Float[Array, "B T E"], k: int) -> tuple[Array, Array]:
    """Probabilities of the k likeliest experts of each token and their numbers, on the device that has the token.

    Left to itself, XLA gathers the probabilities of all tokens on every GPU where the mesh has another axis than theirs.
    """

    def choose(own: Array) -> tuple[Array, Array]:
        gates, experts = jax.lax.top_k(own, k)
        return gates, experts

    layout = current_layout()
    if layout is None:
        return choose(probabilities)
    spec = layout.spec(("batch", "sequence"), probabilities.shape[:2], "activation [experts]")
    return jax.shard_map(choose, mesh=layout.mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False)(
        probabilities
    )


def _find_group(wanted: int, batch: int) -> int:
    """Sequences that share seats; ConfigError if the batch does not divide into such groups."""
    group = min(wanted, batch)
    if batch % group:
        raise ConfigError(
            f"model.experts.group_size = {wanted} does not divide a batch of {batch} sequences, of which such groups share an "
            f"expert's seats; use, for example, {math.gcd(wanted, batch)}, or another train.batch_size"
        )
    return group


def _draw_kept(
    c: ModelConfig, key: Array | None, shape: tuple[int, ...], capacity: int | None, group: int
) -> Bool[Array, "..."] | None:
    """Hidden units that dropout keeps, drawn in the sequence's order as jitter is; None without it."""
    assert c.experts is not None
    if key is None or not c.experts.expert_dropout:
        return None
    key, keep = jax.random.fold_in(key, 1), 1.0 - c.experts.expert_dropout
    if capacity is None:
        return to_zigzag(jax.random.bernoulli(key, keep, (*shape, c.ff_dim)))
    return jax.random.bernoulli(key, keep, (c.experts.n_experts, shape[0] // group, capacity, c.ff_dim))


def _run_experts(
    x: Float[Array, "B T D"],
    choices: Assignment,
    weights: Weights,
    capacity: int | None,
    group: int,
    feed: Callable[..., Array],
    *,
    by_expert: bool,
) -> Float[Array, "B T D"]:
    """The experts' outputs, weighted and added up; each device runs the experts it has."""
    run = partial(_run_all, feed=feed)
    if capacity is not None:
        n_experts = weights.w_in.shape[0]
        run = partial(_run_seated, capacity=capacity, group=group, n_experts=n_experts, feed=feed, by_expert=by_expert)
    layout = current_layout()
    if layout is None:
        return run(weights, x, choices, places=Places())
    places, specs = _find_places(layout, x, weights, group)
    stream = P(places.batch or None, places.sequence or None)
    kept = None
    if choices.dropout_mask is not None:  # where the experts' inputs will be
        kept = P(places.groups or None, places.sequence or None, None, places.ff or None)
        if capacity is not None:
            kept = P(places.expert or None, places.groups or None, places.seats or None, places.ff or None)
            more = -capacity % math.prod(layout.mesh.shape[axis] for axis in places.seats)
            choices = choices._replace(kept=jnp.pad(choices.dropout_mask, ((0, 0), (0, 0), (0, more), (0, 0))))
    return jax.shard_map(
        partial(run, places=places),
        mesh=layout.mesh,
        in_specs=(specs, stream, Assignment(stream, stream, None if choices.rank_in_expert is None else stream, kept)),  # type: ignore[arg-type]
        out_specs=stream,
        check_vma=False,
    )(weights, x, choices)


def _find_places(layout: MeshLayout, x: Array, weights: Weights, group: int) -> tuple[Places, Any]:
    """Where tokens and weights lie. Weights are gathered along embed: what they are cut into there moves once."""

    def axes(names: tuple[str, ...], shape: tuple[int, ...], name: str) -> list[tuple[str, ...]]:
        spec = layout.spec(names, shape, name)
        return [axes_of(spec[i]) if i < len(spec) else () for i in range(len(names))]

    batch, sequence, _ = axes(("batch", "sequence", "activation_embed"), x.shape, "activation [experts]")
    expert, _, ff = axes(("expert", "activation_embed", "ff"), weights.w_in.shape, "experts/w_in")
    if not set(expert) <= set(batch):
        raise ConfigError(
            f"mesh.rules.expert: experts lie on {' and '.join(expert)}, along which the batch is not cut; "
            f"add it to mesh.rules.batch"
        )
    inward, outward = P(expert or None, None, ff or None), P(expert or None, ff or None)
    own = x.shape[0] // math.prod(layout.mesh.shape[axis] for axis in batch)
    spans: list[tuple[str, ...]] = [()]  # axes that a group may span, the last of the batch
    count = [own]  # and the sequences that their devices hold
    for axis in reversed(batch):
        spans.append((axis, *spans[-1]))
        count.append(count[-1] * layout.mesh.shape[axis])
    if own % group and group not in count:
        raise ConfigError(
            f"model.experts.group_size = {group}: on this mesh a device has {own} sequence(s), which such groups do not divide, "
            f"nor do they span whole devices along {' and '.join(batch)}; use a divisor of {own}, or one of {sorted(set(count))}"
        )
    spanned = () if own % group == 0 else spans[count.index(group)]
    specs: Any = (inward, None if weights.w_gate is None else inward, outward)
    return Places(batch, sequence, expert, ff, spanned), Weights(*specs)


def _feed(
    rows: Array,
    weights: Weights,
    product: Callable[..., Array],
    kept: Bool[Array, "..."] | None,
    *,
    activation: Callable[[Array], Array],
    dropout: float,
) -> Array:
    hidden = product(rows, weights.w_in)
    gated = weights.w_gate is not None
    hidden = activation(product(rows, weights.w_gate)) * hidden if gated else activation(hidden)
    hidden = hidden if kept is None else jnp.where(kept, hidden / (1.0 - dropout), 0).astype(hidden.dtype)
    return product(hidden, weights.w_out)


def _run_seated(
    weights: Weights,
    x: Array,
    choices: Assignment,
    *,
    capacity: int,
    group: int,
    n_experts: int,
    feed: Callable[..., Array],
    by_expert: bool,
    places: Places,
) -> Array:
    """Every expert has `capacity` seats for each group; a choice whose turn comes later contributes nothing.

    Between devices: B T k f D elements are sent to the experts along `expert` and as many back (all-to-all; each device
    keeps one piece of them), the same along `context` where sequences are cut (reduce-scatter, all-gather), and the sum
    over `tensor` of B T D elements that a dense layer has too. Devices that share a group have each all its seats, filled
    where a token is their own, so that they send as many times more.
    """
    gates, chosen, turns, kept = choices
    assert turns is not None
    shape, together = x.shape, min(group, x.shape[0])  # this device's sequences of a group
    x, gates, chosen, turns = (
        a.reshape(shape[0] // together, together * shape[1], -1) for a in (x, gates, chosen, turns)
    )
    batch, length, width = x.shape
    exchanged = tuple(axis for axis in places.expert if axis not in places.group)
    summed = tuple(axis for axis in places.expert if axis in places.group)
    pieces = jax.lax.axis_size(places.seats) if places.seats else 1
    seats = -(-capacity // pieces) * pieces  # as many for each piece; the last ones stay empty
    seat = jnp.where(turns < capacity, chosen * seats + turns, n_experts * seats).reshape(batch, -1)
    row, token = jnp.arange(batch)[:, None], jnp.arange(seat.shape[1])[None] // gates.shape[2]
    # Which token sits where (0: none, or one of another device's): indices are scattered, tokens gathered.
    taken = jnp.zeros((batch, n_experts * seats), jnp.int32).at[row, seat].set(token + 1, mode="drop")
    padded = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
    seated = padded[row, taken].reshape(batch, n_experts, seats, width).swapaxes(0, 1)
    if places.seats:
        seated = jax.lax.psum_scatter(seated, places.seats, scatter_dimension=2, tiled=True)
    if exchanged:
        seated = jax.lax.all_to_all(seated, exchanged, split_axis=0, concat_axis=1, tiled=True)
    if summed:
        seated = jax.lax.psum_scatter(seated, summed, scatter_dimension=0, tiled=True)
    product = partial(jnp.einsum, "ebci,eio->ebco", preferred_element_type=x.dtype)
    out = feed(seated, weights, product, kept)
    if summed:
        out = jax.lax.all_gather(out, summed, axis=0, tiled=True)
    if exchanged:
        out = jax.lax.all_to_all(out, exchanged, split_axis=1, concat_axis=0, tiled=True)
    if places.seats:
        out = jax.lax.all_gather(out, places.seats, axis=2, tiled=True)
    out = out.swapaxes(0, 1).reshape(batch, -1, width)
    if by_expert:  # from every seat to its token: there are fewer of them than of tokens times experts
        seat_gates = jnp.zeros(taken.shape, jnp.float32).at[row, seat].set(gates.reshape(batch, -1), mode="drop")
        weighed = out.astype(jnp.float32) * seat_gates[..., None]
        y = jnp.zeros((batch, length + 1, width)).at[row, taken].add(weighed)[:, 1:].astype(x.dtype)
    else:
        out = jnp.pad(out, ((0, 0), (0, 1), (0, 0)))  # the last seat: nobody's
        y = _weigh(out[row, seat].reshape(*gates.shape, width), gates, x.dtype)
    y = y.reshape(shape)
    return jax.lax.psum(y, places.ff) if places.ff else y


def _run_all(weights: Weights, x: Array, choices: Assignment, *, feed: Callable[..., Array], places: Places) -> Array:
    """Every token is taken: sorted by expert, each run of equal ones meets its expert's weights (jax.lax.ragged_dot).

    How many tokens an expert gets is known only then, so devices along `expert` gather each other's B T D elements
    (all-gather), apply their own experts and add up (reduce-scatter): n_expert_pieces / (2 k) of what an all-to-all with
    room for every token moves. On a CPU XLA multiplies every token by every expert: right, but slow with many of them.
    """
    gates, chosen, _, kept = choices
    own, n_experts_per_token = weights.w_in.shape[0], gates.shape[2]
    first = 0
    if places.expert:
        first = jax.lax.axis_index(places.expert) * own
        x, gates, chosen = (jax.lax.all_gather(a, places.expert, axis=0, tiled=True) for a in (x, gates, chosen))
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < own), local, own)  # others' come last, in no run
    order = jnp.argsort(local, stable=True)
    sizes = jnp.sum(local[None] == jnp.arange(own)[:, None], axis=1, dtype=jnp.int32)
    rows = x.reshape(-1, x.shape[2])[order // n_experts_per_token]
    product = partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=x.dtype)
    out = feed(rows, weights, product, None if kept is None else kept.reshape(order.size, -1)[order])
    out = jnp.where((local[order] < own)[:, None], out, 0)[jnp.argsort(order)]
    y = _weigh(out.reshape(*gates.shape, -1), gates, x.dtype)
    if places.expert:
        y = jax.lax.psum_scatter(y, places.expert, scatter_dimension=0, tiled=True)
    return jax.lax.psum(y, places.ff) if places.ff else y


def _weigh(out: Float[Array, "B T K D"], gates: Float[Array, "B T K"], dtype: Any) -> Float[Array, "B T D"]:
    """Weighted and added up in float32, and narrow again before it moves."""
    return jnp.sum(out.astype(jnp.float32) * gates[..., None], axis=2).astype(dtype)
