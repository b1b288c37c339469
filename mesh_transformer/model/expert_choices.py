# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The `[model.experts]` section of a run: how many experts there are, who is sent to them, and at what price."""

import dataclasses
from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.field_types import STRICT, Amount, Fraction, Positive, Rate

TRAINING_ONLY = ("capacity_factor", "balance_loss", "balance_over", "router_z_loss", "jitter")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertsConfig:
    """Experts in place of the dense feed-forward layer, d_ff wide each and without biases (model/moe.py)."""

    n_experts: Positive
    per_token: Positive = (
        1  # 1: as in Switch, by its probability; more: by the chosen probabilities, scaled to add up to 1
    )
    every: Positive = 1  # the last of so many layers has experts, the others are dense
    shared: bool = False  # a dense feed-forward layer beside the experts, which every token passes through
    # Tokens that an expert takes of a sequence, as a multiple of its even share; those beyond pass by. None: it takes all
    capacity_factor: Rate | None = None  # in training
    evaluation_capacity_factor: Rate | None = None  # elsewhere; not in decoding, where every token is taken
    balance_loss: Amount = 1e-2  # weight of n_experts x (share of tokens) x (mean probability), summed over experts
    balance_over: Literal["batch", "sequence"] = (
        "batch"  # what these are means of: a microbatch, or each of its sequences
    )
    router_z_loss: Amount = 1e-3  # weight of (log of the router's partition function)^2
    jitter: Fraction = 0.0  # in training the router's inputs are multiplied by values in [1 - jitter, 1 + jitter]

    @model_validator(mode="after")
    def check(self) -> "ExpertsConfig":
        """A token cannot go to more experts than there are."""
        if self.per_token > self.n_experts:
            raise ValueError(f"per_token={self.per_token} exceeds n_experts={self.n_experts}; lower it, or add experts")
        return self

    def describe_function(self) -> dict[str, Any]:
        """What of this determines the function that is sampled from."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in TRAINING_ONLY}
