# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Products with narrow weights equal products with the same weights widened; rounding costs at most half a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.model.linear import linear
from mesh_transformer.model.quantization import quantize, dequantize


def draw(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape)


def test_rounding_costs_half_a_step_of_each_output():
    w = draw(24, 4, 8) * jnp.exp(3 * draw(4, 8))[None]
    small = quantize(w, (0,))
    assert small.values.dtype == jnp.int8
    assert small.scale.shape == (1, 4, 8)
    error = np.abs(np.asarray(dequantize(small, "float32") - w))
    assert error.max() > 0
    assert np.all(error <= 0.501 * np.asarray(small.scale))
    assert np.all(np.abs(np.asarray(small.values)).max(axis=0) == 127)  # the whole range, whatever an output's size


def test_zeros_stay_zeros():
    small = quantize(jnp.zeros((3, 5)), (0,))
    np.testing.assert_array_equal(dequantize(small, "float32"), np.zeros((3, 5)))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("shape", "inputs"), [((24, 7), 1), ((24, 3, 5), 1), ((4, 6, 7), 2), ((10, 301), 1)])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_product_in_blocks_equals_the_widened_product(monkeypatch, rows, shape, inputs, kind):
    monkeypatch.setattr(quantized, "BLOCK", 64)
    monkeypatch.setattr(quantized, "COLUMNS", 16)  # 301 columns: strips, of which the last two overlap
    w = draw(*shape)
    narrow = quantize(w, tuple(range(inputs))) if kind == "int8" else w.astype(jnp.bfloat16)
    wide = dequantize(narrow, "float32")
    x = draw(1, rows, *shape[:inputs])
    found = jax.jit(lambda x, w: linear(x, w, inputs=inputs))(x, narrow)
    assert found.shape == (1, rows, *shape[inputs:])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, linear(x, wide, inputs=inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_a_flipped_table_scores_with_its_rows(monkeypatch, kind):
    monkeypatch.setattr(quantized, "BLOCK", 64)  # 101 rows of 24: blocks of two, of which the last two overlap
    table = draw(101, 24)
    narrow = quantize(table, (1,)) if kind == "int8" else table.astype(jnp.bfloat16)
    wide = dequantize(narrow, "float32")
    x = draw(2, 1, 24)
    found = jax.jit(lambda x, w: linear(x, w, flipped=True, dtype="float32"))(x, narrow)
    np.testing.assert_allclose(found, x @ wide.T, atol=1e-5, rtol=1e-5)
