# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of `[model.rope_scaling]`: frequency scaling of rotary position embeddings, by its type in transformers."""

import dataclasses
import math
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT

# Fields of each type: required and optional ones. All others must be absent.
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor", "original_seq_len"), ()),
    "yarn": (
        ("factor", "original_seq_len"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", "original_seq_len", "attention_factor"), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_seq_len"), ()),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeScalingConfig:
    """Frequency scaling of rotary position embeddings for contexts longer than the trained length."""

    # linear: all frequencies are divided by `factor`. dynamic: a larger base for sequences of model.seq_len tokens (NTK).
    # yarn: arXiv 2309.00071. longrope: arXiv 2402.13753 (Phi 3). llama3: Llama 3.1
    type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"] = "llama3"
    factor: PositiveFloat | None = None  # by which frequencies are divided: all (linear), low ones (llama3, yarn)
    # llama3: wavelengths above original_seq_len / this are low frequencies
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None  # llama3: wavelengths below original_seq_len / this stay as they are
    original_seq_len: PositiveInt | None = None  # the trained length
    # yarn: pairs with more rotations in original_seq_len stay as they are; None: 32
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None  # yarn: pairs with fewer rotations are divided by factor; None: 1
    # yarn, longrope: factor of the rotated channels of queries and keys; yarn: None: from factor and mscale
    attention_factor: PositiveFloat | None = None
    # yarn: attention_factor is (0.1 mscale ln factor + 1) / (the same of mscale_all_dim)
    mscale: NonNegativeFloat | None = None
    # yarn: None or 0, like mscale: attention_factor is 0.1 ln factor + 1
    mscale_all_dim: NonNegativeFloat | None = None
    truncate: bool | None = None  # yarn: round the bounds of the interpolated pairs to whole pairs; None: true
    # longrope: divisor of the frequency of each rotated pair in sequences of at most original_seq_len tokens
    short_factor: tuple[PositiveFloat, ...] | None = None
    # longrope: the same in longer sequences
    long_factor: tuple[PositiveFloat, ...] | None = None

    @model_validator(mode="after")
    def check(self) -> "RopeScalingConfig":
        """Raise ValueError if a field of the type is missing, a field has no effect, or the fields contradict each other."""
        required, optional = FIELDS[self.type]
        for field in dataclasses.fields(self):
            is_set = getattr(self, field.name) is not None
            if field.name in required and not is_set:
                raise ValueError(f'type="{self.type}" requires {field.name}; set it')
            if is_set and field.name not in ("type", *required, *optional):
                raise ValueError(f'{field.name} has no effect with type="{self.type}"; remove it')
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}"
            )
        return self

    @property
    def rotation_scale(self) -> float:
        """Factor of the rotated channels of queries and keys."""
        if self.attention_factor is not None or self.type != "yarn" or self.factor is None:
            return self.attention_factor or 1.0

        def length_scale(mscale: float) -> float:
            return 1.0 if self.factor is None or self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return length_scale(self.mscale) / length_scale(self.mscale_all_dim)
        return length_scale(1.0)

    def effective_fields(self) -> dict[str, Any]:
        """Return the fields that affect the rotation, with defaults filled in."""
        table = {name: getattr(self, name) for name in ("type", *FIELDS[self.type][0])}
        if self.type == "yarn":
            truncate = True if self.truncate is None else self.truncate
            table |= dict(beta_fast=self.beta_fast or 32.0, beta_slow=self.beta_slow or 1.0, truncate=truncate)
        return table | dict(attention_factor=self.rotation_scale)
