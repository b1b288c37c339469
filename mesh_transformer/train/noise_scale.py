# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Gradient noise scale: approximately the batch size above which larger batches give diminishing returns.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1. The mean gradient over a batch of b sequences has the expected
squared norm |G|^2 + tr(S) / b, where G is the true gradient and S the covariance of one sequence's gradient. Two batch
sizes, the microbatch (b) and the full batch (B), therefore give the unbiased estimates

    |G|^2  =  (B full - b micro) / (B - b)
    tr(S)  =  (micro - full) / (1/b - 1/B)

where micro and full are the squared norms at b and B. Both estimates are averaged over steps before their ratio is
taken, because the ratio of two noisy numbers is biased: B_simple = tr(S) / |G|^2, in sequences.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mesh_transformer.config import ConfigError


class NoiseScaleState(NamedTuple):
    """Exponential averages of the two estimates; both start at zero, so their ratio needs no bias correction."""

    gradient: Float[Array, ""]  # of |G|^2
    noise: Float[Array, ""]  # of tr(S), per sequence


def init_noise_scale() -> NoiseScaleState:
    """Return the state before the first step."""
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
    """Return the averages after one more step.

    `micro_sq_norm` is the mean over microbatches of the squared gradient norm of a microbatch's mean loss;
    `full_sq_norm` is the squared gradient norm of the full batch's mean loss, before clipping. The batch sizes are in
    sequences. A step where either norm is not finite leaves the averages unchanged. Raises ConfigError if the
    microbatch is not smaller than the batch.
    """
    if not 0 < micro_batch_size < full_batch_size:
        raise ConfigError(
            f"train.log_grad_noise_scale needs a batch larger than a microbatch ({micro_batch_size} sequences), but the "
            f"batch has {full_batch_size} sequences; set train.grad_accum_steps to 2 or more, or "
            "train.log_grad_noise_scale = false"
        )
    micro = jnp.asarray(micro_sq_norm, jnp.float32)
    full = jnp.asarray(full_sq_norm, jnp.float32)
    gradient = (full_batch_size * full - micro_batch_size * micro) / (full_batch_size - micro_batch_size)
    noise = (micro - full) / (1.0 / micro_batch_size - 1.0 / full_batch_size)
    is_finite = jnp.isfinite(gradient) & jnp.isfinite(noise)
    averages = NoiseScaleState(
        decay * state.gradient + (1.0 - decay) * gradient,
        decay * state.noise + (1.0 - decay) * noise,
    )
    return NoiseScaleState(*(jnp.where(is_finite, new, old) for new, old in zip(averages, state, strict=True)))


def noise_scale(state: NoiseScaleState) -> Float[Array, ""]:
    """Return B_simple in sequences; NaN while the estimate of |G|^2 is not positive."""
    is_positive = state.gradient > 0.0
    return jnp.where(is_positive, state.noise / jnp.where(is_positive, state.gradient, 1.0), jnp.nan)
