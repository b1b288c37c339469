# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale: about the batch size above which more sequences per step stop paying off.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1. The mean gradient over a batch of b sequences has the expected
squared norm |G|^2 + tr(S) / b, where G is the true gradient and S the covariance of one sequence's gradient. Two batch
sizes, the microbatch and the batch it is a part of, therefore give unbiased estimates

    |G|^2  from  (B big - b small) / (B - b)
    tr(S)  from  (small - big) / (1/b - 1/B)

with small and big the squared norms at b and B. Both are averaged over steps before their ratio is taken, because the
ratio of two noisy numbers is biased: B_simple = tr(S) / |G|^2, in sequences.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mesh_transformer.config import ConfigError


class NoiseScaleState(NamedTuple):
    """Exponential averages of the two estimates, both started at zero, so that their ratio needs no correction."""

    gradient: Float[Array, ""]  # of |G|^2
    noise: Float[Array, ""]  # of tr(S), per sequence


def init_noise_scale() -> NoiseScaleState:
    """Nothing seen yet."""
    return NoiseScaleState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def update_noise_scale(
    state: NoiseScaleState,
    micro_sq_norm: ArrayLike,
    full_sq_norm: ArrayLike,
    micro_batch_size: int,
    full_batch_size: int,
    *,
    decay: float = 0.99,
) -> NoiseScaleState:
    """The averages after one more step.

    `small_sq_norm` is the mean, over the step's microbatches, of the squared norm of the gradient of a microbatch's
    mean loss; `big_sq_norm` the squared norm of the gradient of the batch's mean loss, before clipping; `small_batch`
    and `big_batch` are their sequences. A step where either norm is not finite leaves the averages alone. Raises
    ConfigError if the two batches are the same: with one batch size there is nothing to compare.
    """
    if not 0 < micro_batch_size < full_batch_size:
        raise ConfigError(
            f"train.log_grad_noise_scale compares microbatches with the batch, but here they have {micro_batch_size} and {full_batch_size} "
            "sequences; set train.grad_accum_steps to 2 or more, or train.log_grad_noise_scale = false"
        )
    small, big = jnp.asarray(micro_sq_norm, jnp.float32), jnp.asarray(full_sq_norm, jnp.float32)
    gradient = (full_batch_size * big - micro_batch_size * small) / (full_batch_size - micro_batch_size)
    noise = (small - big) / (1.0 / micro_batch_size - 1.0 / full_batch_size)
    usable = jnp.isfinite(gradient) & jnp.isfinite(noise)
    averages = NoiseScaleState(
        decay * state.gradient + (1.0 - decay) * gradient,
        decay * state.noise + (1.0 - decay) * noise,
    )
    return NoiseScaleState(*(jnp.where(usable, new, old) for new, old in zip(averages, state, strict=True)))


def noise_scale(state: NoiseScaleState) -> Float[Array, ""]:
    """B_simple in sequences; NaN while the averages do not determine it (|G|^2 not above zero)."""
    known = state.gradient > 0.0
    return jnp.where(known, state.noise / jnp.where(known, state.gradient, 1.0), jnp.nan)
