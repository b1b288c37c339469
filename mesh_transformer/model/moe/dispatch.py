# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Dispatch of tokens to experts and combination of their outputs, with a capacity per expert or dropless."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from mesh_transformer.config import ConfigError
from mesh_transformer.mesh import MeshLayout, axes_of, current_layout
from mesh_transformer.model.feed_forward import activate
from mesh_transformer.model.moe.router import Assignment


class ExpertWeights(NamedTuple):
    """Weights of all experts, or of a device's shard of them."""

    w_in: Float[Array, "E D F"]
    w_gate: Float[Array, "E D F"] | None
    w_out: Float[Array, "E F D"]
    b_in: Float[Array, "E F"] | None = None
    b_gate: Float[Array, "E F"] | None = None
    b_out: Float[Array, "E D"] | None = None


class DispatchOptions(NamedTuple):
    """Static parameters of a dispatch."""

    capacity: int | None  # slots of each expert per group; None: dropless
    group_size: int  # sequences that share the slots
    # expert choice: every token is assigned to all experts, and ranks of at least `capacity` are dropped
    by_expert: bool
    activation: str
    dropout: float  # rate of the assignment's dropout mask


class MeshAxes(NamedTuple):
    """Mesh axes over which a layer's arrays are sharded; empty on one device."""

    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    ff: tuple[str, ...] = ()
    group: tuple[str, ...] = ()  # the last axes of `batch`: the sequences of one group are sharded over them

    @property
    def slots(self) -> tuple[str, ...]:
        """Axes whose devices fill the same slots of an expert. Each of these devices computes a shard of the slots."""
        return tuple(axis for axis in self.group if axis not in self.expert) + self.sequence

    @property
    def groups(self) -> tuple[str, ...]:
        """Axes whose devices hold different groups after tokens are sent to their experts."""
        return tuple(axis for axis in self.batch if axis not in (*self.group, *self.expert))

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Expert axes whose devices hold different groups: tokens are exchanged by all-to-all."""
        return tuple(axis for axis in self.expert if axis not in self.group)

    @property
    def summed(self) -> tuple[str, ...]:
        """Expert axes whose devices share groups: slots are summed by reduce-scatter."""
        return tuple(axis for axis in self.expert if axis in self.group)


def run_experts(
    x: Float[Array, "B T D"], assignment: Assignment, weights: ExpertWeights, options: DispatchOptions
) -> Float[Array, "B T D"]:
    """Return the weighted sum of the outputs of each token's experts. Each device runs the experts that it holds."""
    if options.capacity is None:
        run = partial(_dispatch_dropless, options=options)
    else:
        run = partial(_dispatch_with_capacity, options=options, n_experts=weights.w_in.shape[0])
    layout = current_layout()
    if layout is None:
        return run(weights, x, assignment, axes=MeshAxes())
    axes, weight_specs = _find_axes(layout, x, weights, options.group_size)
    tokens = P(axes.batch or None, axes.sequence or None)
    mask_spec = None
    if assignment.dropout_mask is not None:  # sharded like the hidden units of the experts
        mask_spec = P(axes.groups or None, axes.sequence or None, None, axes.ff or None)
        if options.capacity is not None:
            mask_spec = P(axes.expert or None, axes.groups or None, axes.slots or None, axes.ff or None)
            padding = -options.capacity % math.prod(layout.mesh.shape[axis] for axis in axes.slots)
            mask = jnp.pad(assignment.dropout_mask, ((0, 0), (0, 0), (0, padding), (0, 0)))
            assignment = assignment._replace(dropout_mask=mask)
    rank_spec = None if assignment.rank_in_expert is None else tokens
    return jax.shard_map(
        partial(run, axes=axes),
        mesh=layout.mesh,
        in_specs=(weight_specs, tokens, Assignment(tokens, tokens, rank_spec, mask_spec)),  # type: ignore[arg-type]
        out_specs=tokens,
        check_vma=False,
    )(weights, x, assignment)


def _find_axes(layout: MeshLayout, x: Array, weights: ExpertWeights, group_size: int) -> tuple[MeshAxes, Any]:
    """Return the mesh axes of tokens and weights, and the specs of the weights, which are gathered along embed."""

    def axes(names: tuple[str, ...], shape: tuple[int, ...], name: str) -> list[tuple[str, ...]]:
        spec = layout.spec(names, shape, name)
        return [axes_of(spec[i]) if i < len(spec) else () for i in range(len(names))]

    batch, sequence, _ = axes(("batch", "sequence", "activation_embed"), x.shape, "activation [experts]")
    expert, _, ff = axes(("expert", "activation_embed", "ff"), weights.w_in.shape, "experts/w_in")
    if not set(expert) <= set(batch):
        raise ConfigError(
            f"mesh.rules.expert: experts are sharded over {' and '.join(expert)}, but the batch is not; "
            "add these mesh axes to mesh.rules.batch"
        )
    w_in = P(expert or None, None, ff or None)
    w_out = P(expert or None, ff or None)
    b_in = P(expert or None, ff or None)
    all_specs = ExpertWeights(w_in, w_in, w_out, b_in, b_in, P(expert or None))  # type: ignore[arg-type]
    specs: Any = (None if weight is None else spec for weight, spec in zip(weights, all_specs, strict=True))
    group = _group_axes(layout, batch, x.shape[0], group_size)
    return MeshAxes(batch, sequence, expert, ff, group), ExpertWeights(*specs)


def _group_axes(layout: MeshLayout, batch: tuple[str, ...], batch_size: int, group_size: int) -> tuple[str, ...]:
    """Return the last mesh axes of `batch`, over which one group is sharded. Raises ConfigError for an uneven division."""
    local_size = batch_size // math.prod(layout.mesh.shape[axis] for axis in batch)
    if local_size % group_size == 0:
        return ()
    axes: tuple[str, ...] = ()
    # Number of sequences that the devices along the last axes of `batch` hold together -> these axes.
    axes_by_size: dict[int, tuple[str, ...]] = {local_size: axes}
    size = local_size
    for axis in reversed(batch):
        axes = (axis, *axes)
        size *= layout.mesh.shape[axis]
        axes_by_size.setdefault(size, axes)
    if group_size not in axes_by_size:
        raise ConfigError(
            f"model.experts.group_size={group_size} does not divide evenly: a device holds {local_size} sequence(s), and the batch "
            f"is sharded over {' and '.join(batch)}; set model.experts.group_size to a divisor of {local_size}, or to one of "
            f"{sorted(axes_by_size)}"
        )
    return axes_by_size[group_size]


def _dispatch_with_capacity(
    weights: ExpertWeights,
    x: Float[Array, "B T D"],
    assignment: Assignment,
    *,
    options: DispatchOptions,
    n_experts: int,
    axes: MeshAxes,
) -> Float[Array, "B T D"]:
    """Compute the experts on `capacity` slots per group. Assignments with a rank of at least the capacity are dropped.

    Communication per device, with k experts per token and the capacity factor f: B T k f D elements are sent to the
    experts along `expert`, and the same number back (all-to-all). The same number is sent along `context` if sequences are
    sharded (reduce-scatter, all-gather). The sum of B T D elements over `tensor` is the same as in a dense layer. Devices
    that share a group send a multiple of this, because each of them has all slots of the group and fills only the slots of
    the tokens in its shard.
    """
    gates, experts, rank, dropout_mask = assignment
    assert rank is not None
    assert options.capacity is not None
    shape = x.shape
    n_together = min(options.group_size, shape[0])  # sequences of one group on this device
    x, gates, experts, rank = (
        a.reshape(shape[0] // n_together, n_together * shape[1], -1) for a in (x, gates, experts, rank)
    )
    n_groups, length, width = x.shape
    n_shards = jax.lax.axis_size(axes.slots) if axes.slots else 1
    n_slots = -(-options.capacity // n_shards) * n_shards  # a multiple of n_shards; the last slots stay empty
    slot = jnp.where(rank < options.capacity, experts * n_slots + rank, n_experts * n_slots).reshape(n_groups, -1)
    group = jnp.arange(n_groups)[:, None]
    token = jnp.arange(slot.shape[1])[None] // gates.shape[2]
    # The token in each slot, counted from 1 (0: none, or a token of another device). Scattering indices and gathering
    # tokens is cheaper than scattering tokens.
    token_in_slot = jnp.zeros((n_groups, n_experts * n_slots), jnp.int32).at[group, slot].set(token + 1, mode="drop")
    padded = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
    dispatched = padded[group, token_in_slot].reshape(n_groups, n_experts, n_slots, width).swapaxes(0, 1)
    dispatched = _send_to_experts(dispatched, axes)
    matmul = partial(jnp.einsum, "ebci,eio->ebco", preferred_element_type=x.dtype)

    def add_bias(x: Array, bias: Array) -> Array:
        return (x + bias[:, None, None]).astype(x.dtype)

    weights = _without_repeated_bias(weights, axes)
    out = _send_back(_feed_forward(dispatched, weights, (matmul, add_bias), dropout_mask, options), axes)
    out = out.swapaxes(0, 1).reshape(n_groups, -1, width)
    if options.by_expert:  # scatter from slots to tokens: there are fewer slots than token-expert pairs
        flat_gates = gates.reshape(n_groups, -1)
        slot_gates = jnp.zeros(token_in_slot.shape, jnp.float32).at[group, slot].set(flat_gates, mode="drop")
        weighted = out.astype(jnp.float32) * slot_gates[..., None]
        y = jnp.zeros((n_groups, length + 1, width)).at[group, token_in_slot].add(weighted)[:, 1:].astype(x.dtype)
    else:
        out = jnp.pad(out, ((0, 0), (0, 1), (0, 0)))  # an additional slot of zeros, for dropped assignments
        y = _combine(out[group, slot].reshape(*gates.shape, width), gates, x.dtype)
    y = y.reshape(shape)
    return jax.lax.psum(y, axes.ff) if axes.ff else y


def _send_to_experts(x: Float[Array, "E G C D"], axes: MeshAxes) -> Float[Array, "e g c D"]:
    if axes.slots:
        x = jax.lax.psum_scatter(x, axes.slots, scatter_dimension=2, tiled=True)
    if axes.exchanged:
        x = jax.lax.all_to_all(x, axes.exchanged, split_axis=0, concat_axis=1, tiled=True)
    if axes.summed:
        x = jax.lax.psum_scatter(x, axes.summed, scatter_dimension=0, tiled=True)
    return x


def _send_back(x: Float[Array, "e g c D"], axes: MeshAxes) -> Float[Array, "E G C D"]:
    if axes.summed:
        x = jax.lax.all_gather(x, axes.summed, axis=0, tiled=True)
    if axes.exchanged:
        x = jax.lax.all_to_all(x, axes.exchanged, split_axis=1, concat_axis=0, tiled=True)
    if axes.slots:
        x = jax.lax.all_gather(x, axes.slots, axis=2, tiled=True)
    return x


def _dispatch_dropless(
    weights: ExpertWeights,
    x: Float[Array, "B T D"],
    assignment: Assignment,
    *,
    options: DispatchOptions,
    axes: MeshAxes,
) -> Float[Array, "B T D"]:
    """Compute the experts on all tokens, sorted by expert (jax.lax.ragged_dot).

    The number of tokens per expert is known only at run time. Devices along `expert` therefore gather each other's B T D
    elements (all-gather), apply their own experts and sum the results (reduce-scatter). With k experts per token, this is
    n_expert_shards / (2 k) times the elements that an all-to-all with space for every token would send. On a CPU, XLA
    multiplies every token by every expert, which is slow with many experts.
    """
    gates, experts, _, dropout_mask = assignment
    n_local = weights.w_in.shape[0]
    n_experts_per_token = gates.shape[2]
    first = 0
    if axes.expert:
        first = jax.lax.axis_index(axes.expert) * n_local
        x, gates, experts = (jax.lax.all_gather(a, axes.expert, axis=0, tiled=True) for a in (x, gates, experts))
    local_expert = experts.reshape(-1) - first
    is_local = (local_expert >= 0) & (local_expert < n_local)
    local_expert = jnp.where(is_local, local_expert, n_local)  # experts of other devices sort last
    order = jnp.argsort(local_expert, stable=True)
    group_sizes = jnp.sum(local_expert[None] == jnp.arange(n_local)[:, None], axis=1, dtype=jnp.int32)
    tokens = x.reshape(-1, x.shape[2])[order // n_experts_per_token]
    matmul = partial(jax.lax.ragged_dot, group_sizes=group_sizes, preferred_element_type=x.dtype)
    mask = None if dropout_mask is None else dropout_mask.reshape(order.size, -1)[order]
    expert_of_row = jnp.minimum(local_expert[order], n_local - 1)

    def add_bias(x: Array, bias: Array) -> Array:
        return (x + bias[expert_of_row]).astype(x.dtype)

    weights = _without_repeated_bias(weights, axes)
    out = _feed_forward(tokens, weights, (matmul, add_bias), mask, options)
    out = jnp.where((local_expert[order] < n_local)[:, None], out, 0)[jnp.argsort(order)]
    y = _combine(out.reshape(*gates.shape, -1), gates, x.dtype)
    if axes.expert:
        y = jax.lax.psum_scatter(y, axes.expert, scatter_dimension=0, tiled=True)
    return jax.lax.psum(y, axes.ff) if axes.ff else y


def _without_repeated_bias(weights: ExpertWeights, axes: MeshAxes) -> ExpertWeights:
    """Return the weights with b_out on only one device along `ff`, because the outputs are summed over `ff`."""
    if weights.b_out is None or not axes.ff:
        return weights
    return weights._replace(b_out=jnp.where(jax.lax.axis_index(axes.ff) == 0, weights.b_out, 0))


def _feed_forward(
    x: Array,
    weights: ExpertWeights,
    functions: tuple[Callable[..., Array], Callable[..., Array]],
    dropout_mask: Bool[Array, "..."] | None,
    options: DispatchOptions,
) -> Array:
    """Return the outputs of the experts. `functions`: (multiply rows by the weights of their experts, add biases)."""
    matmul, add_bias = functions

    def linear(x: Array, w: Array, b: Array | None) -> Array:
        return matmul(x, w) if b is None else add_bias(matmul(x, w), b)

    hidden = linear(x, weights.w_in, weights.b_in)
    gate = None if weights.w_gate is None else linear(x, weights.w_gate, weights.b_gate)
    hidden = activate(hidden, gate, options.activation)
    if dropout_mask is not None:
        hidden = jnp.where(dropout_mask, hidden / (1.0 - options.dropout), 0).astype(hidden.dtype)
    return linear(hidden, weights.w_out, weights.b_out)


def _combine(out: Float[Array, "B T K D"], gates: Float[Array, "B T K"], dtype: Any) -> Float[Array, "B T D"]:
    """Return the sum over each token's experts, weighted by the gates, computed in float32 and cast to `dtype`."""
    return jnp.sum(out.astype(jnp.float32) * gates[..., None], axis=2).astype(dtype)
