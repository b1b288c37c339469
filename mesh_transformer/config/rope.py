# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of `[model.rope_scaling]`: frequency scaling of rotary position embeddings, with the types of transformers."""

import dataclasses
import json
import math
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT

# Required and optional fields of each type. All other fields must be unset.
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

    # linear: all frequencies are divided by `factor`. dynamic: NTK-aware, with a base computed for model.seq_len tokens.
    # yarn: arXiv 2309.00071. longrope: arXiv 2402.13753 (Phi 3). llama3: Llama 3.1
    type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"] = "llama3"
    factor: PositiveFloat | None = None  # divisor of the frequencies; llama3, yarn: of low frequencies only
    # llama3: frequencies with wavelengths above original_seq_len / low_freq_factor are divided by factor
    low_freq_factor: PositiveFloat | None = None
    # llama3: frequencies with wavelengths below original_seq_len / high_freq_factor are unchanged
    high_freq_factor: PositiveFloat | None = None
    original_seq_len: PositiveInt | None = None  # context length before scaling
    # yarn: channel pairs with more rotations than this in original_seq_len tokens are unchanged; None: 32
    beta_fast: PositiveFloat | None = None
    # yarn: frequencies of channel pairs with fewer rotations than this are divided by factor; None: 1
    beta_slow: PositiveFloat | None = None
    # yarn, longrope: factor of the rotated channels of queries and keys; required for longrope; None (yarn): see mscale
    attention_factor: PositiveFloat | None = None
    # yarn: with both set, attention_factor is (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1)
    mscale: NonNegativeFloat | None = None
    # yarn: if this or mscale is None or 0, attention_factor is 0.1 ln factor + 1
    mscale_all_dim: NonNegativeFloat | None = None
    truncate: bool | None = None  # yarn: round the bounds of the interpolated channel pairs to integers; None: true
    # longrope: divisor of the frequency of each rotated pair in sequences of at most original_seq_len tokens
    short_factor: tuple[PositiveFloat, ...] | None = None
    # longrope: divisor of the frequency of each rotated pair in longer sequences
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
                value = json.dumps(getattr(self, field.name))
                raise ValueError(f'{field.name}={value} has no effect with type="{self.type}"; remove it')
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
