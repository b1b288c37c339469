# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""logits -> loss: cross entropy in float32, with the z-loss that keeps log Z near zero."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLosses(NamedTuple):
    """Sums over the tokens that count, so that parts of a batch add up to the whole."""

    nats: Float[Array, ""]  # cross entropy
    z_squares: Float[Array, ""]  # (log Z)^2
    tokens: Float[Array, ""]  # sum of the mask


def cross_entropy(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> tuple[Array, Array]:
    """-log p(target) in nats, and log Z, for every token; both [*batch] in float32."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - target_logits, log_z


def sum_losses(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], mask: Float[Array, "*batch"]
) -> TokenLosses:
    """The sums over a (micro)batch; tokens with mask 0 count for nothing."""
    nats, log_z = cross_entropy(logits, targets)
    return TokenLosses(jnp.sum(nats * mask), jnp.sum(jnp.square(log_z) * mask), jnp.sum(mask))
