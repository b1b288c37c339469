# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The residual form of a layer: how its norms and branches are combined, for JAX and NumPy arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mesh_transformer.config import ModelConfig


class Branches(NamedTuple):
    """The functions of one layer. Each branch returns its contribution to the residual stream [B, T, D]."""

    norm: Callable[[str, Any], Any]  # (name of the norm, x) -> normalized x
    attention: Callable[[Any], Any]
    feed_forward: Callable[[Any], Any]
    cross_attention: Callable[[Any], Any] | None = None  # in the decoder of an encoder-decoder model


def apply_branches(x: Any, branches: Branches, config: ModelConfig) -> Any:
    """Return the residual stream after one layer, by `config.residual`."""
    norm, attention, feed_forward, cross_attention = branches
    match config.residual:
        case "serial":
            x = x + attention(norm("norm_1", x))
            if cross_attention is not None:
                x = x + cross_attention(norm("norm_cross", x))
            return x + feed_forward(norm("norm_2", x))
        case "parallel":  # GPT-J: one norm for both branches
            normed = norm("norm_1", x)
            return x + attention(normed) + feed_forward(normed)
        case "parallel-two-norms":  # GPT-NeoX
            return x + attention(norm("norm_1", x)) + feed_forward(norm("norm_2", x))
