# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The noise scale of gradients whose mean and covariance are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_transformer.train.noise_scale import init_noise_scale, noise_scale, update_noise_scale

from mesh_transformer.config import ConfigError


def synthetic_norms(rng, mean, deviation, *, small, pieces):
    """Squared norms of one step: mean over microbatches, and of their mean; gradients ~ N(mean, deviation^2)."""
    gradients = mean + deviation * rng.normal(size=(pieces, small, mean.size))
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
        state = update(state, *synthetic_norms(rng, mean, 3.0, small=2, pieces=4), 2, 8)
    weight = 1 - 0.99**steps
    assert float(state.gradient) / weight == pytest.approx(true_gradient, rel=0.1)
    assert float(state.noise) / weight == pytest.approx(true_noise, rel=0.05)
    assert float(noise_scale(state)) == pytest.approx(true_noise / true_gradient, rel=0.1)
    # the naive squared norm of the batch's gradient would be well outside
    assert true_gradient + true_noise / 8 > 1.5 * true_gradient


@pytest.mark.parametrize(("small", "big"), [(1, 2), (3, 12), (8, 64)])
def test_exact_norms_give_the_exact_scale_at_once(small, big):
    gradient, noise = 5.0, 70.0
    state = update_noise_scale(init_noise_scale(), gradient + noise / small, gradient + noise / big, small, big)
    assert float(noise_scale(state)) == pytest.approx(noise / gradient, rel=1e-4)


def test_needs_two_microbatches():
    for small, big in ((8, 8), (8, 4), (0, 4)):
        with pytest.raises(ConfigError, match=r"train\.accumulation to 2 or more"):
            update_noise_scale(init_noise_scale(), 1.0, 1.0, small, big)


def test_rejected_steps_leave_the_averages():
    state = update_noise_scale(init_noise_scale(), 4.0, 2.0, 1, 4)
    for bad in (np.nan, np.inf):
        assert update_noise_scale(state, bad, 2.0, 1, 4) == state
        assert update_noise_scale(state, 4.0, bad, 1, 4) == state
    assert update_noise_scale(state, 5.0, 2.0, 1, 4) != state


def test_undetermined_is_nan():
    assert jnp.isnan(noise_scale(init_noise_scale()))
    assert jnp.isnan(noise_scale(update_noise_scale(init_noise_scale(), 8.0, 1.0, 1, 2)))  # |G|^2 estimated as -6
