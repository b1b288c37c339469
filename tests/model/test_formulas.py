# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Logits, the attention scale and the residual form, each stated once for JAX and NumPy arrays."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.formulas import (
    Branches,
    apply_branches,
    attention_scale,
    finish_logits,
    scale_hidden_states,
)
from mesh_transformer.model.lm_head import LMHead, head_matrix, lm_head, lm_logits

CONFIG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=9, seq_len=8)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 16)).astype(np.float32)
W = RNG.normal(size=(16, 9)).astype(np.float32)
B = RNG.normal(size=9).astype(np.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", ["none", "rsqrt_d_model"])
def test_logits_equal_the_formula(tied, bias, scale):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied, head_bias=bias, logit_scale=scale)
    expected = (X * 0.25 if scale == "rsqrt_d_model" else X) @ W + (B if bias else 0)
    arrays = {"w_tokens": jnp.asarray(W.T)} if tied else {"w_tokens": jnp.zeros((9, 16)), "w_head": jnp.asarray(W)}
    head = lm_head({"transformer": arrays | ({"b_head": jnp.asarray(B)} if bias else {})}, config)
    logits = lm_logits(scale_hidden_states(jnp.asarray(X), config), head, config)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    product = scale_hidden_states(X, config) @ np.asarray(head_matrix(head, config))
    in_numpy = finish_logits(product, B if bias else None, config)
    assert isinstance(in_numpy, np.ndarray)
    assert in_numpy.dtype == np.float32
    np.testing.assert_allclose(in_numpy, expected, atol=1e-5)


def test_logits_are_float32_with_bfloat16_hidden_states():
    head = LMHead(jnp.asarray(W.T), None)
    assert lm_logits(jnp.asarray(X, jnp.bfloat16), head, CONFIG).dtype == jnp.float32


def test_attention_scale():
    assert attention_scale(CONFIG) == 8**-0.5
    assert attention_scale(dataclasses.replace(CONFIG, attention_scale="none")) == 1.0


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        ("serial", "x + a(norm_1(x)) + f(norm_2(x + a(norm_1(x))))"),
        ("parallel", "x + a(norm_1(x)) + f(norm_1(x))"),
        ("parallel-two-norms", "x + a(norm_1(x)) + f(norm_2(x))"),
    ],
)
def test_residual_forms(residual, expected):
    class Term(str):
        def __add__(self, other):
            return Term(f"{self!s} + {other!s}")

    branches = Branches(
        norm=lambda name, x: Term(f"{name}({x})"),
        attention=lambda x: Term(f"a({x})"),
        feed_forward=lambda x: Term(f"f({x})"),
    )
    assert apply_branches(Term("x"), branches, dataclasses.replace(CONFIG, residual=residual)) == expected


def test_cross_attention_is_between_attention_and_feed_forward():
    order = []

    def branch(name):
        return lambda x: order.append(name) or x

    branches = Branches(
        lambda name, x: order.append(name) or x, branch("self"), branch("feed_forward"), branch("cross")
    )
    assert apply_branches(1.0, branches, CONFIG) == 8.0
    assert order == ["norm_1", "self", "norm_cross", "cross", "norm_2", "feed_forward"]
