# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The `[model.experts]` section of a run: how many experts there are, who is sent to them, and at what price."""

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
WITH_CAPACITY = {"dropped_tokens": "zero", "group_size": 1}  # without one these say nothing


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertsConfig:
    """Experts in place of the dense feed-forward layer, d_ff wide each and without biases (model/moe/layer.py)."""

    n_experts: Positive
    n_experts_per_token: Positive = (
        1  # 1: as in Switch, by its probability; more: by the chosen probabilities, scaled to add up to 1
    )
    # Who chooses: tokens their experts, or experts their tokens (capacity_factor x n_experts_per_token of each group's tokens,
    # divided evenly), which looks at tokens to come: a text cannot be generated in that way, see allow_noncausal
    routing: Literal["token-choice", "expert-choice"] = "token-choice"
    allow_noncausal: bool = (
        False  # routing = "expert-choice" all the same; in decoding tokens choose, which is another function
    )
    layer_interval: Positive = 1  # the last of so many layers has experts, the others are dense
    shared_expert: bool = False  # a dense feed-forward layer beside the experts, which every token passes through
    # Tokens that an expert takes of a group, as a multiple of its even share; those beyond pass by. None: it takes all
    capacity_factor: Amount | None = None  # in training
    eval_capacity_factor: Amount | None = None  # elsewhere; not in decoding, where every token is taken
    # Instead of the last: so many of every sequence, however long it is (SwitchTransformers in transformers)
    eval_capacity: Positive | None = None
    # Sequences of a microbatch that share these seats, the first of them served first; a smaller batch is one group. Tokens
    # of one kind come in bursts: a sequence's own seats overflow at one expert while those of others stay empty
    group_size: Positive = 1
    # What a choice that finds its expert full adds to the stream: nothing (Switch, section 2.2), or the layer's input times
    # its gate (SwitchTransformers in transformers 4; since 5 it passes)
    dropped_tokens: Literal["zero", "gated-input"] = "zero"
    aux_loss_weight: Amount = 1e-2  # weight of n_experts x (share of tokens) x (mean probability), summed over experts
    aux_loss_scope: Literal["batch", "sequence"] = (
        "batch"  # what these are means of: a microbatch, or each of its sequences
    )
    router_z_loss: Amount = 1e-3  # weight of (log of the router's partition function)^2
    expert_dropout: Fraction = 0.0  # on the hidden units of experts (Switch, section 3: 0.4 in fine-tuning)
    router_jitter: Fraction = (
        0.0  # in training the router's inputs are multiplied by values in [1 - jitter, 1 + jitter]
    )

    @model_validator(mode="after")
    def check(self) -> "ExpertsConfig":
        """A token cannot go to more experts than there are, nor to one without seats; experts that choose must have some."""
        if self.n_experts_per_token > self.n_experts:
            raise ValueError(
                f"n_experts_per_token={self.n_experts_per_token} exceeds n_experts={self.n_experts}; lower it, or add experts"
            )
        if self.eval_capacity is not None and self.eval_capacity_factor is not None:
            raise ValueError("eval_capacity and eval_capacity_factor say the same thing twice; remove one")
        for field in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, field) == 0:
                raise ValueError(
                    f"{field}=0 leaves no expert a token; take 1 or more (1.25 is usual), or remove it: then all are taken"
                )
        if self.routing == "expert-choice":
            if not self.allow_noncausal:
                raise ValueError(
                    'routing="expert-choice" looks at tokens that are still to come; set allow_noncausal=true to train such a model all '
                    'the same (in decoding its tokens then choose), or take routing="token-choice"'
                )
            if self.capacity_factor is None or self.eval_capacity_factor is None:
                raise ValueError(
                    'routing="expert-choice" needs capacity_factor and eval_capacity_factor: how many tokens each takes'
                )
            if self.dropped_tokens == "gated-input":
                raise ValueError(
                    'dropped_tokens="gated-input" has no effect with routing="expert-choice", where none is full; remove it'
                )
        elif self.allow_noncausal:
            raise ValueError('allow_noncausal=true has no effect with routing="token-choice"; remove it')
        return self

    def check_divides(self, pieces: int) -> None:
        """As many experts on each of `pieces` devices along the mesh axis `expert`; ValueError otherwise."""
        if self.n_experts % pieces:
            raise ValueError(
                f"model.experts.n_experts={self.n_experts} does not divide over mesh.expert={pieces}; use a multiple of "
                f"{pieces}, or mesh.expert={math.gcd(self.n_experts, pieces)}"
            )

    @property
    def scales_gates(self) -> bool:
        """Whether the gates of a token's experts are made to add up to 1."""
        return self.routing == "token-choice" and self.n_experts_per_token > 1

    def describe_function(self) -> dict[str, Any]:
        """What of this determines the function that is sampled from."""
        table = {key: value for key, value in dataclasses.asdict(self).items() if key not in TRAINING_ONLY}
        takes_all = self.eval_capacity_factor is None and self.eval_capacity is None
        return table | (WITH_CAPACITY if takes_all else {})
