# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer: a router sends every token to a few expert feed-forward networks.

Sources: Shazeer et al. 2017 (arXiv 1701.06538), GShard (2006.16668), Switch (2101.03961) and, for renormalized gates
without a capacity, Mixtral (2401.04088).

Tokens compete for capacity within a group of sequences (one sequence, unless experts.group_size is larger), not within a
device's shard: the output does not depend on the mesh. Assignments are ranked by sequence and then by token, so that a
later token never displaces an earlier token (GShard instead ranks the first choices of all tokens first). With expert choice
(Zhou et al. 2022, 2202.09368), each expert processes the most probable tokens of a group at any position. The output for a
token then depends on later tokens.

No array has the shape [tokens, experts, capacity]. With capacity factor f and k experts per token, it would have T^2 k f
elements per sequence of T tokens. The inputs of the experts, gathered by index, have T k f D elements.
"""

import math
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.mesh import current_layout
from mesh_transformer.model.attention.ring import to_zigzag
from mesh_transformer.model.moe.dispatch import DispatchOptions, ExpertWeights, run_experts
from mesh_transformer.model.moe.router import (
    Assignment,
    RoutingStats,
    expert_capacity,
    rank_for_expert,
    rank_in_expert,
    router_logits,
    router_scores,
    routing_stats,
    select_experts,
)
from mesh_transformer.model.params import Inits, param
from mesh_transformer.model.quantization import dequantize


class MoELayer(hk.Module):
    """Weighted sum over the selected experts: sum of gate * W_out activation(W_in x), or its gated form."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(name="experts")
        assert config.experts is not None
        self.config = config
        self.inits = inits
        self.experts = config.experts

    def __call__(
        self, x: Float[Array, "B T D"], *, training: bool, decoding: bool
    ) -> tuple[Float[Array, "B T D"], RoutingStats]:
        """Return the contribution to the residual stream, and the router's statistics.

        With `training`, the training capacity, router jitter and expert dropout apply. With `decoding`, every token is
        processed by its most probable experts: tokens are decoded one at a time, so they cannot compete for capacity.
        """
        e = self.experts
        key = hk.maybe_next_rng_key()  # drawn even if unused, so that initial weights do not depend on `training`
        key = key if training else None
        zeros = hk.initializers.Constant(0.0)
        w_router = param("w_router", self.inits.input, embed=self.config.d_model, router=e.n_experts)
        b_router = param("b_router", zeros, router=e.n_experts) if e.router_bias else None
        selection_bias = param("selection_bias", zeros, router=e.n_experts) if e.selection_bias else None
        weights = self._weights(x.dtype)
        logits = router_logits(x, w_router, b_router, key, e.router_jitter)
        scores = router_scores(logits, e)
        if e.scores == "sigmoid":  # softmax(log sigmoid) is the scores divided by their sum
            logits = jax.nn.log_sigmoid(logits)
        capacity, group_size = self._capacity(x, training=training, decoding=decoding)
        by_expert = e.routing == "expert-choice" and not decoding
        rank: Int[Array, "B T K"] | None
        if by_expert:
            gates = scores
            rank = rank_for_expert(scores, group_size)
            experts = jnp.broadcast_to(jnp.arange(e.n_experts), gates.shape)
        else:
            gates, experts = _select_locally(scores, selection_bias, e)
            rank = None if capacity is None else rank_in_expert(experts, group_size)
        processed = jnp.ones(experts.shape, bool) if rank is None or capacity is None else rank < capacity
        options = DispatchOptions(capacity, group_size, by_expert, self.config.activation, e.expert_dropout)
        dropout_mask = self._dropout_mask(key, experts.shape, options)
        y = run_experts(x, Assignment(gates, experts, rank, dropout_mask), weights, options)
        if e.dropped_tokens == "gated-input":
            y = y + (x * jnp.sum(jnp.where(processed, 0.0, gates), axis=-1, keepdims=True)).astype(y.dtype)
        over_batch = e.aux_loss_scope == "batch"
        if by_expert:
            return y, routing_stats(logits, processed, ~jnp.any(processed, axis=-1), over_batch=over_batch)
        counts = jnp.sum(jax.nn.one_hot(experts, e.n_experts), axis=2)
        return y, routing_stats(logits, counts, ~processed, over_batch=over_batch)

    def _weights(self, dtype: jnp.dtype) -> ExpertWeights:
        c = self.config
        n_experts = self.experts.n_experts
        ff_dim = c.expert_ff_dim
        zeros = hk.initializers.Constant(0.0)

        def bias(name: str, **axes: int) -> Array | None:
            return param(name, zeros, expert=n_experts, **axes) if self.experts.bias else None

        w_in = param("w_in", self.inits.input, expert=n_experts, embed=c.d_model, ff=ff_dim)
        w_gate = (
            param("w_gate", self.inits.input, expert=n_experts, embed=c.d_model, ff=ff_dim) if c.gated_ffn else None
        )
        w_out = param("w_out", self.inits.output, expert=n_experts, ff=ff_dim, embed=c.d_model)
        return ExpertWeights(
            w_in=dequantize(w_in, dtype),
            w_gate=None if w_gate is None else dequantize(w_gate, dtype),
            w_out=dequantize(w_out, dtype),
            b_in=bias("b_in", ff=ff_dim),
            b_gate=bias("b_gate", ff=ff_dim) if c.gated_ffn else None,
            b_out=bias("b_out", embed=c.d_model),
        )

    def _capacity(self, x: Float[Array, "B T D"], *, training: bool, decoding: bool) -> tuple[int | None, int]:
        """Return the slots of each expert per group (None: unlimited), and the number of sequences per group."""
        e = self.experts
        if decoding:
            return None, 1
        if e.eval_capacity is not None and not training:
            return min(e.eval_capacity, x.shape[1]), 1
        factor = e.capacity_factor if training else e.eval_capacity_factor
        if factor is None:
            return None, 1
        group_size = _group_size(e.group_size, x.shape[0])
        tokens = group_size * x.shape[1]
        return expert_capacity(factor, tokens, e.n_experts_per_token, e.n_experts), group_size

    def _dropout_mask(
        self, key: Array | None, shape: tuple[int, ...], options: DispatchOptions
    ) -> Bool[Array, "..."] | None:
        """Return the mask of hidden units to keep, sampled in the natural order of the sequence; None without dropout."""
        if key is None or not options.dropout:
            return None
        key = jax.random.fold_in(key, 1)
        keep = 1.0 - options.dropout
        ff_dim = self.config.expert_ff_dim
        if options.capacity is None:
            return to_zigzag(jax.random.bernoulli(key, keep, (*shape, ff_dim)))
        n_groups = shape[0] // options.group_size
        return jax.random.bernoulli(key, keep, (self.experts.n_experts, n_groups, options.capacity, ff_dim))


def _select_locally(
    scores: Float[Array, "B T E"], selection_bias: Float[Array, "E"] | None, experts: ExpertsConfig
) -> tuple[Array, Array]:
    """Return `select_experts(scores, selection_bias)`, computed on the device that holds each token.

    Without shard_map, XLA gathers the scores of all tokens on every GPU if the mesh has an axis that tokens are not
    sharded over.
    """
    select = partial(select_experts, experts=experts)
    layout = current_layout()
    if layout is None:
        return select(scores, selection_bias)
    spec = layout.spec(("batch", "sequence"), scores.shape[:2], "activation [experts]")
    run = jax.shard_map(select, mesh=layout.mesh, in_specs=(spec, P()), out_specs=(spec, spec), check_vma=False)
    return run(scores, selection_bias)


def _group_size(requested: int, batch: int) -> int:
    """Return the number of sequences per group. Raises ConfigError if it does not divide the batch."""
    group_size = min(requested, batch)
    if batch % group_size:
        raise ConfigError(
            f"model.experts.group_size={requested} does not divide the batch of {batch} sequences, and a group must be whole; "
            f"set it to {math.gcd(requested, batch)}, for example, or change train.batch_size"
        )
    return group_size
