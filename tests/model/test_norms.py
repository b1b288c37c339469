# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The norms equal the formulas of their papers in float64."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.norms import Norm


def make_norm(**choices):
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=9, seq_len=8, **choices)
    return hk.without_apply_rng(hk.transform(lambda x: Norm(config, name="norm")(x)))


X = np.random.default_rng(0).normal(size=(2, 3, 16)) * 3 + 1
SCALE, BIAS = np.random.default_rng(1).normal(size=(2, 16))
FORMULAS = {
    "layernorm": (
        dict(scale=SCALE, bias=BIAS),
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * SCALE + BIAS,
    ),
    "rmsnorm": (dict(scale=SCALE), lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * SCALE),
    "scalenorm": (
        dict(scale=np.array(1.7)),
        lambda x: 1.7 * x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 0.1),
    ),
}
FORMULAS |= {  # RMSNorm of mesh-transformer-jax, with a scale per channel or a single one
    f"gptj-{name}": (
        dict(scale=scale, bias=bias),
        lambda x, scale=scale, bias=bias: x / (np.linalg.norm(x, axis=-1, keepdims=True) + 0.1) * scale + bias,
    )
    for name, scale, bias in (("rmsnorm", SCALE, BIAS), ("scalenorm", np.array(1.7), np.array(0.3)))
}


@pytest.mark.parametrize("name", FORMULAS)
def test_norm_equals_its_formula(name):
    params, formula = FORMULAS[name]
    norm = make_norm(norm=name, norm_eps=0.1)
    initial = norm.init(None, jnp.asarray(X, jnp.float32))["norm"]
    assert {key: value.shape for key, value in initial.items()} == {key: value.shape for key, value in params.items()}
    found = norm.apply(
        {"norm": {key: jnp.asarray(value, jnp.float32) for key, value in params.items()}}, jnp.asarray(X, jnp.float32)
    )
    np.testing.assert_allclose(found, formula(X), atol=5e-6)


@pytest.mark.parametrize("name", ["scalenorm", "gptj-scalenorm", "gptj-rmsnorm"])
def test_initial_scale_of_norms_by_length_is_sqrt_d_model(name):
    norm = make_norm(norm=name)
    assert (norm.init(None, jnp.asarray(X, jnp.float32))["norm"]["scale"] == 4.0).all()


@pytest.mark.parametrize("name", ["layernorm", "gptj-rmsnorm", "gptj-scalenorm"])
def test_norms_without_bias_have_only_a_scale(name):
    assert set(make_norm(norm=name, norm_bias=False).init(None, jnp.zeros((1, 1, 16)))["norm"]) == {"scale"}


@pytest.mark.parametrize("name", FORMULAS)
def test_norm_of_zeros_has_finite_gradients(name):
    norm = make_norm(norm=name)
    x = jnp.zeros((1, 1, 16))
    params = norm.init(None, x)
    gradient = jax.grad(lambda x: jnp.sum(norm.apply(params, x) * jnp.arange(16.0)[None, None]))(x)
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize("name", FORMULAS)
def test_statistics_are_float32_and_the_result_keeps_its_dtype(name):
    """The mean is large and the deviation small: statistics in bfloat16 would lose the deviation."""
    norm = make_norm(norm=name)
    x = jnp.asarray(64.0 + np.random.default_rng(2).integers(0, 2, size=(1, 1, 16)), jnp.bfloat16)
    params = norm.init(None, x)
    y_bfloat16 = norm.apply(params, x)
    y_float32 = norm.apply(params, x.astype(jnp.float32))
    assert y_bfloat16.dtype == jnp.bfloat16
    assert y_float32.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(y_bfloat16), np.asarray(y_float32.astype(jnp.bfloat16)))
