# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of the `[model.experts]` section: number of experts, routing, capacity and auxiliary losses."""

import dataclasses
import math
from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT, Amount, Fraction, Positive

TRAINING_ONLY = (
    "capacity_factor",
    "aux_loss_weight",
    "aux_loss_scope",
    "router_z_loss",
    "router_jitter",
    "expert_dropout",
    "allow_noncausal",
)
WITH_CAPACITY = {"dropped_tokens": "zero", "group_size": 1}  # values of fields that only matter with a capacity


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertsConfig:
    """Mixture of experts instead of the dense feed-forward layer, each of hidden size d_ff and without biases."""

    n_experts: Positive  # per layer that has experts
    # top-k. 1: the expert's output is scaled by its router probability (Switch); more: probabilities sum to 1 per token
    n_experts_per_token: Positive = 1
    # token-choice: each token selects its experts. expert-choice: each expert selects tokens (Zhou et al. 2022), which
    # is not causal: an expert compares tokens of different positions, so text cannot be generated this way
    routing: Literal["token-choice", "expert-choice"] = "token-choice"
    allow_noncausal: bool = False  # accept expert-choice; decoding uses token-choice, which is another function
    layer_interval: Positive = 1  # every N-th layer has experts, the others are dense
    shared_expert: bool = False  # also a dense feed-forward layer that processes every token
    # Expert capacity as a multiple of an even share of the group's tokens; tokens above it are dropped. None: dropless
    capacity_factor: Amount | None = None  # in training
    eval_capacity_factor: Amount | None = None  # in evaluation; decoding is always dropless
    # instead of eval_capacity_factor: tokens per sequence and expert (SwitchTransformers in transformers)
    eval_capacity: Positive | None = None
    # sequences of a microbatch that share one capacity, filled in order; a smaller batch is one group. Similar tokens
    # are often in the same sequence: alone, it overflows one expert while the capacity of others stays unused
    group_size: Positive = 1
    # output of a dropped (token, expert) pair. zero: nothing (Switch, section 2.2). gated-input: the layer's input times
    # the gate (SwitchTransformers in transformers 4)
    dropped_tokens: Literal["zero", "gated-input"] = "zero"
    aux_loss_weight: Amount = 1e-2  # of n_experts x sum over experts (fraction of tokens) x (mean router probability)
    aux_loss_scope: Literal["batch", "sequence"] = (
        "batch"  # the fractions and means are over a microbatch or a sequence
    )
    router_z_loss: Amount = 1e-3  # weight of (log Z of the router)^2
    expert_dropout: Fraction = 0.0  # on the hidden units of experts (Switch, section 3: 0.4 in fine-tuning)
    router_jitter: Fraction = 0.0  # in training, router inputs are multiplied by values in [1 - jitter, 1 + jitter]

    @model_validator(mode="after")
    def check(self) -> "ExpertsConfig":
        """Raise ValueError where top-k, capacity and routing contradict each other."""
        if self.n_experts_per_token > self.n_experts:
            raise ValueError(
                f"n_experts_per_token={self.n_experts_per_token} exceeds n_experts={self.n_experts}; lower it, or add experts"
            )
        if self.eval_capacity is not None and self.eval_capacity_factor is not None:
            raise ValueError("eval_capacity and eval_capacity_factor are alternatives; remove one")
        for field in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, field) == 0:
                raise ValueError(
                    f"{field}=0 drops every token; use 1 or more (1.25 is typical), or remove it for dropless routing"
                )
        if self.routing == "expert-choice":
            if not self.allow_noncausal:
                raise ValueError(
                    'routing="expert-choice" is not causal; set allow_noncausal=true to accept that (decoding then uses token '
                    'choice), or use routing="token-choice"'
                )
            if self.capacity_factor is None or self.eval_capacity_factor is None:
                raise ValueError(
                    'routing="expert-choice" requires capacity_factor and eval_capacity_factor, which set the number of '
                    "tokens that each expert selects"
                )
            if self.dropped_tokens == "gated-input":
                raise ValueError(
                    'dropped_tokens="gated-input" has no effect with routing="expert-choice", which drops none; remove it'
                )
        elif self.allow_noncausal:
            raise ValueError('allow_noncausal=true has no effect with routing="token-choice"; remove it')
        return self

    def check_divides(self, n_shards: int) -> None:
        """Raise ValueError unless the experts divide evenly over `n_shards` devices of the mesh axis `expert`."""
        if self.n_experts % n_shards:
            raise ValueError(
                f"model.experts.n_experts={self.n_experts} is not divisible by mesh.expert={n_shards}; use a multiple of "
                f"{n_shards}, or mesh.expert={math.gcd(self.n_experts, n_shards)}"
            )

    @property
    def scales_gates(self) -> bool:
        """True if the gates of a token are normalized to sum to 1."""
        return self.routing == "token-choice" and self.n_experts_per_token > 1

    def describe_function(self) -> dict[str, Any]:
        """Return the fields that determine the function at inference."""
        table = {key: value for key, value in dataclasses.asdict(self).items() if key not in TRAINING_ONLY}
        dropless = self.eval_capacity_factor is None and self.eval_capacity is None
        return table | (WITH_CAPACITY if dropless else {})
