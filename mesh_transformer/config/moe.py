# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of the `[model.experts]` section: number of experts, routing, capacity and auxiliary losses."""

import dataclasses
import json
import math
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT, FractionBelowOne

# Fields without effect at inference.
TRAINING_ONLY = (
    "capacity_factor",
    "aux_loss_weight",
    "aux_loss_scope",
    "router_z_loss",
    "router_jitter",
    "expert_dropout",
    "allow_noncausal",
)
CAPACITY_DEFAULTS = {"dropped_tokens": "zero", "group_size": 1}  # fields that only have an effect with a capacity


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertsConfig:
    """Mixture of experts instead of the dense feed-forward layer."""

    n_experts: PositiveInt  # experts in each layer that has experts
    n_experts_per_token: PositiveInt = 1  # experts that process each token (top-k)
    d_ff: PositiveInt | None = None  # hidden size of each expert; None: model.d_ff
    bias: bool = False  # biases of the experts
    # -- router --
    scores: Literal["softmax", "sigmoid"] = "softmax"  # function from router logits to scores (sigmoid: DeepSeek V3)
    # true: the gates of a token are its scores divided by their sum (Mixtral); false: its scores; None: true with two or more
    # experts per token, so that the output of a single expert is scaled by its router probability (Switch)
    normalize_gates: bool | None = None
    gate_scale: PositiveFloat = 1.0  # factor of the gates after normalization (DeepSeek)
    router_bias: bool = False  # bias of the router's logits (gpt-oss)
    # each expert has a bias that is added to its scores for the selection, not in the gates (DeepSeek V3). It has no
    # gradient, so training does not change it
    selection_bias: bool = False
    # number of groups of consecutive experts; a token selects its experts from the n_groups_per_token groups with the
    # highest group_score (DeepSeek V2)
    n_expert_groups: PositiveInt = 1
    n_groups_per_token: PositiveInt | None = None  # None: all groups
    # score of a group: the highest score of its experts (DeepSeek V2), or the sum of the two highest (DeepSeek V3)
    group_score: Literal["max", "sum-of-top-2"] = "max"
    # token-choice: each token selects its experts. expert-choice: each expert selects tokens (Zhou et al. 2022), which
    # is not causal: an expert compares tokens of different positions, so text cannot be generated with it
    routing: Literal["token-choice", "expert-choice"] = "token-choice"
    allow_noncausal: bool = False  # accept expert-choice, although decoding uses token-choice, a different function
    layer_interval: PositiveInt = 1  # every N-th layer has experts; the others are dense
    dense_layers: tuple[
        NonNegativeInt, ...
    ] = ()  # indices, from 0, of layers that are dense regardless of layer_interval
    shared_expert: bool = False  # add a dense feed-forward layer that processes every token
    # hidden size of the shared expert; None: model.d_ff
    shared_d_ff: PositiveInt | None = None
    # multiply the shared expert's output by a sigmoid of a linear function of its input (Qwen2-MoE)
    shared_gate: bool = False
    # expert capacity in training as a multiple of an even share of the group's tokens; tokens above it are dropped. None:
    # dropless
    capacity_factor: NonNegativeFloat | None = None
    eval_capacity_factor: NonNegativeFloat | None = None  # expert capacity in evaluation; decoding is always dropless
    # instead of eval_capacity_factor: capacity in tokens per sequence and expert (SwitchTransformers in transformers)
    eval_capacity: PositiveInt | None = None
    # consecutive sequences of a microbatch that share one capacity; a smaller batch is one group. Similar tokens are often
    # in the same sequence, which alone would overflow one expert while others have unused capacity
    group_size: PositiveInt = 1
    # output of a dropped (token, expert) pair. zero: nothing (Switch, section 2.2). gated-input: the layer's input times
    # the gate (SwitchTransformers in transformers 4)
    dropped_tokens: Literal["zero", "gated-input"] = "zero"
    # weight of n_experts x sum over experts of (fraction of tokens) x (mean router probability)
    aux_loss_weight: NonNegativeFloat = 1e-2
    # the fractions and means are over a microbatch ("batch") or a sequence
    aux_loss_scope: Literal["batch", "sequence"] = "batch"
    router_z_loss: NonNegativeFloat = 1e-3  # weight of (log Z of the router)^2
    # dropout rate of the hidden units of experts (Switch, section 3: 0.4 in fine-tuning)
    expert_dropout: FractionBelowOne = 0.0
    # in training, router inputs are multiplied by values in [1 - jitter, 1 + jitter]
    router_jitter: FractionBelowOne = 0.0

    @model_validator(mode="after")
    def check(self) -> "ExpertsConfig":
        """Raise ValueError if fields contradict each other."""
        if self.n_experts_per_token > self.n_experts:
            raise ValueError(
                f"n_experts_per_token={self.n_experts_per_token} exceeds n_experts={self.n_experts}; lower it, or add experts"
            )
        if self.eval_capacity is not None and self.eval_capacity_factor is not None:
            raise ValueError(
                f"eval_capacity={self.eval_capacity} and eval_capacity_factor={self.eval_capacity_factor} are both set; remove one"
            )
        for field in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, field) == 0:
                raise ValueError(
                    f"{field}=0 drops every token; use 1 or more (1.25 is typical), or remove it for dropless routing"
                )
        self._check_groups()
        for field in ("shared_d_ff", "shared_gate"):
            if getattr(self, field) and not self.shared_expert:
                value = json.dumps(getattr(self, field))
                raise ValueError(f"{field}={value} has no effect without shared_expert=true; remove it")
        if self.routing == "expert-choice":
            self._check_expert_choice_scores()
            if not self.allow_noncausal:
                raise ValueError(
                    'routing="expert-choice" is not causal; set allow_noncausal=true to accept that (decoding then uses token '
                    'choice), or use routing="token-choice"'
                )
            if self.capacity_factor is None or self.eval_capacity_factor is None:
                raise ValueError(
                    'routing="expert-choice" requires capacity_factor and eval_capacity_factor, which set the number of '
                    "tokens that each expert selects; set both"
                )
            if self.dropped_tokens == "gated-input":
                raise ValueError('dropped_tokens="gated-input" has no effect with routing="expert-choice"; remove it')
        elif self.allow_noncausal:
            raise ValueError('allow_noncausal=true has no effect with routing="token-choice"; remove it')
        return self

    def _check_groups(self) -> None:
        """Raise ValueError if the groups have unequal sizes, or too few experts for `n_experts_per_token` or `group_score`."""
        groups, chosen = self.n_expert_groups, self.groups_per_token
        if self.n_experts % groups:
            raise ValueError(f"n_expert_groups={groups} must divide n_experts={self.n_experts}; change one of them")
        size = self.n_experts // groups
        if chosen > groups:
            raise ValueError(f"n_groups_per_token={chosen} exceeds n_expert_groups={groups}; lower n_groups_per_token")
        if chosen * size < self.n_experts_per_token:
            raise ValueError(
                f"n_groups_per_token={chosen} groups of {size} experts have fewer experts than n_experts_per_token="
                f"{self.n_experts_per_token}; change one of them"
            )
        if self.limits_groups and self.group_score == "sum-of-top-2" and size < 2:
            raise ValueError(
                f'group_score="sum-of-top-2" requires groups of two or more experts, but n_expert_groups={groups} makes groups '
                f"of {size}; lower n_expert_groups"
            )

    def _check_expert_choice_scores(self) -> None:
        defaults = dict(scores="softmax", normalize_gates=None, selection_bias=False, n_groups_per_token=None)
        for field, default in defaults.items():
            if getattr(self, field) != default:
                value = json.dumps(getattr(self, field))
                raise ValueError(f'{field}={value} has no effect with routing="expert-choice"; remove it')

    def check_divides(self, n_shards: int) -> None:
        """Raise ValueError if the number of experts is not divisible by `n_shards`, the size of the mesh axis `expert`."""
        if self.n_experts % n_shards:
            raise ValueError(
                f"model.experts.n_experts={self.n_experts} is not divisible by mesh.expert={n_shards}; use a multiple of "
                f"{n_shards}, or mesh.expert={math.gcd(self.n_experts, n_shards)}"
            )

    @property
    def normalizes_gates(self) -> bool:
        """True if the gates of a token are normalized to sum to 1, before `gate_scale`."""
        if self.normalize_gates is not None:
            return self.normalize_gates
        return self.routing == "token-choice" and self.n_experts_per_token > 1

    @property
    def groups_per_token(self) -> int:
        """Number of groups from which a token selects its experts: `n_groups_per_token`, or its default."""
        return self.n_groups_per_token or self.n_expert_groups

    @property
    def limits_groups(self) -> bool:
        """True if a token selects its experts from a subset of the groups."""
        return self.groups_per_token < self.n_expert_groups

    def effective_fields(self) -> dict[str, Any]:
        """Return the fields that affect the output at inference, with defaults filled in."""
        table = {key: value for key, value in dataclasses.asdict(self).items() if key not in TRAINING_ONLY}
        table |= {"normalize_gates": self.normalizes_gates, "n_groups_per_token": self.groups_per_token}
        if not self.limits_groups:
            table |= {"n_expert_groups": 1, "n_groups_per_token": 1, "group_score": "max"}
        dropless = self.eval_capacity_factor is None and self.eval_capacity is None
        return table | (CAPACITY_DEFAULTS if dropless else {})
