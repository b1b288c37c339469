# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of the `[model.latent_attention]` section: the sizes of multi-head latent attention."""

from pydantic import PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LatentAttentionConfig:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values are projected from a latent vector.

    The KV cache stores one latent vector per token. A key is the concatenation of unrotated channels, which are separate
    for each head, and of rotated channels, which all heads share.
    """

    kv_rank: PositiveInt  # size of the latent vector of keys and values
    q_rank: PositiveInt | None = None  # size of the latent vector of queries; None: queries are projected from d_model
    d_unrotated: PositiveInt  # channels of each head's query and key that are not rotated
    d_rotated: PositiveInt  # channels of each head's query, and of the key that all heads share, that are rotated
    d_value: PositiveInt  # size of each head's value

    @model_validator(mode="after")
    def check(self) -> "LatentAttentionConfig":
        """Raise ValueError if `d_rotated` is odd."""
        if self.d_rotated % 2:
            raise ValueError(f"d_rotated={self.d_rotated} must be even, because pairs of channels are rotated")
        return self
