# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of the noise scale with gradients of known mean and covariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError
from mesh_transformer.train.noise_scale import init_noise_scale, noise_scale, update_noise_scale


def synthetic_norms(rng, mean, deviation, *, micro_batch_size, n_microbatches):
    """Return the microbatch and full-batch squared norms of a step whose gradients are N(mean, deviation^2)."""
    gradients = mean + deviation * rng.normal(size=(n_microbatches, micro_batch_size, mean.size))
    microbatches = gradients.mean(axis=1)
    return np.mean(np.sum(microbatches**2, axis=1)), np.sum(microbatches.mean(axis=0) ** 2)


def test_estimates_are_unbiased():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=40)
    true_gradient, true_noise = float(np.sum(mean**2)), 40 * 3.0**2
    update = jax.jit(update_noise_scale, static_argnums=(3, 4))
    state = init_noise_scale()
    steps = 600
    for _ in range(steps):
        state = update(state, *synthetic_norms(rng, mean, 3.0, micro_batch_size=2, n_microbatches=4), 2, 8)
    weight = 1 - 0.99**steps
    assert float(state.gradient) / weight == pytest.approx(true_gradient, rel=0.1)
    assert float(state.noise) / weight == pytest.approx(true_noise, rel=0.05)
    assert float(noise_scale(state)) == pytest.approx(true_noise / true_gradient, rel=0.1)
    # The squared norm of the batch's gradient, without the correction, would be well outside.
    assert true_gradient + true_noise / 8 > 1.5 * true_gradient


@pytest.mark.parametrize(("micro", "full"), [(1, 2), (3, 12), (8, 64)])
def test_exact_norms_give_the_exact_scale_at_once(micro, full):
    gradient, noise = 5.0, 70.0
    state = update_noise_scale(init_noise_scale(), gradient + noise / micro, gradient + noise / full, micro, full)
    assert float(noise_scale(state)) == pytest.approx(noise / gradient, rel=1e-4)


def test_needs_two_microbatches():
    for micro, full in ((8, 8), (8, 4), (0, 4)):
        with pytest.raises(ConfigError, match=r"train\.grad_accum_steps to 2 or more"):
            update_noise_scale(init_noise_scale(), 1.0, 1.0, micro, full)


def test_a_norm_that_is_not_finite_leaves_the_averages_unchanged():
    state = update_noise_scale(init_noise_scale(), 4.0, 2.0, 1, 4)
    for bad in (np.nan, np.inf):
        assert update_noise_scale(state, bad, 2.0, 1, 4) == state
        assert update_noise_scale(state, 4.0, bad, 1, 4) == state
    assert update_noise_scale(state, 5.0, 2.0, 1, 4) != state


def test_a_scale_that_is_undetermined_is_nan():
    assert jnp.isnan(noise_scale(init_noise_scale()))
    assert jnp.isnan(noise_scale(update_noise_scale(init_noise_scale(), 8.0, 1.0, 1, 2)))  # |G|^2 estimated as -6
