# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Matmuls with quantized weights equal those with the dequantized weights; rounding costs at most half a level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.model import quantization
from mesh_transformer.model.linear import linear
from mesh_transformer.model.quantization import dequantize, quantize


def sample(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape)


def test_rounding_costs_half_a_level_of_each_output():
    w = sample(24, 4, 8) * jnp.exp(3 * sample(4, 8))[None]
    quantized = quantize(w, (0,))
    assert quantized.values.dtype == jnp.int8
    assert quantized.scale.shape == (1, 4, 8)
    error = np.abs(np.asarray(dequantize(quantized, "float32") - w))
    assert error.max() > 0
    assert np.all(error <= 0.501 * np.asarray(quantized.scale))
    assert np.all(np.abs(np.asarray(quantized.values)).max(axis=0) == 127)  # each output uses the full range


def test_zeros_stay_zeros():
    quantized = quantize(jnp.zeros((3, 5)), (0,))
    np.testing.assert_array_equal(dequantize(quantized, "float32"), np.zeros((3, 5)))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("shape", "inputs"), [((24, 7), 1), ((24, 3, 5), 1), ((4, 6, 7), 2), ((10, 301), 1)])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_blocked_matmul_equals_the_dequantized_matmul(monkeypatch, rows, shape, inputs, kind):
    monkeypatch.setattr(quantization, "BLOCK_SIZE", 64)
    monkeypatch.setattr(quantization, "MAX_BLOCK_COLUMNS", 16)  # 301 columns: strips, of which the last two overlap
    w = sample(*shape)
    stored = quantize(w, tuple(range(inputs))) if kind == "int8" else w.astype(jnp.bfloat16)
    dense = dequantize(stored, "float32")
    x = sample(1, rows, *shape[:inputs])
    found = jax.jit(lambda x, w: linear(x, w, inputs=inputs))(x, stored)
    assert found.shape == (1, rows, *shape[inputs:])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, linear(x, dense, inputs=inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_transposed_matmul_equals_the_dequantized_matmul(monkeypatch, kind):
    monkeypatch.setattr(quantization, "BLOCK_SIZE", 64)  # 101 rows of 24: blocks of two, of which the last two overlap
    w = sample(101, 24)
    stored = quantize(w, (1,)) if kind == "int8" else w.astype(jnp.bfloat16)
    dense = dequantize(stored, "float32")
    x = sample(2, 1, 24)
    found = jax.jit(lambda x, w: linear(x, w, transposed=True, dtype="float32"))(x, stored)
    np.testing.assert_allclose(found, x @ dense.T, atol=1e-5, rtol=1e-5)
