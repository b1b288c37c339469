# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Quantization to every type: the error is that of the type, and Q4_K is no worse than its simplest form."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from mesh_transformer.convert.gguf import quantize
from mesh_transformer.convert.gguf.quantize import TYPES, decode_rows, encode_rows, quantize_q4_k


def draw(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


# root mean square error of normally distributed values
ERRORS = {
    "F32": 0,
    "F16": 3e-4,
    "BF16": 3e-3,
    "Q8_0": 6e-3,
    "Q4_0": 0.09,
    "Q4_1": 0.08,
    "Q5_0": 0.045,
    "Q5_1": 0.04,
    "Q4_K": 0.08,
}


@pytest.mark.parametrize("name", TYPES)
def test_error(name):
    kind = GGMLQuantizationType[name]
    values = draw(8, 512)
    rows = encode_rows(values, kind, name)
    block, size = GGML_QUANT_SIZES[kind]
    assert rows.dtype == np.uint8
    assert rows.shape == (8, 512 // block * size)
    error = float(np.sqrt(np.mean((decode_rows(rows, kind).astype(np.float32) - values) ** 2)))
    assert ERRORS[name] / 2 <= error <= ERRORS[name]


def test_q4_k_of_equal_values_and_of_zeros():
    values = np.zeros((3, 256), np.float32)
    values[1] = -0.5
    values[2, :32] = 1.25  # in a sub-block without a range, a positive minimum counts as 0
    decoded = decode_rows(quantize_q4_k(values), GGMLQuantizationType.Q4_K)
    np.testing.assert_array_equal(decoded[0], 0)
    np.testing.assert_allclose(decoded[1], -0.5, rtol=1e-3)
    np.testing.assert_allclose(decoded[2, :32], 1.25, rtol=1e-3)


def test_blocks_do_not_depend_on_how_many_are_quantized_at_once(monkeypatch):
    values = draw(16, 512)
    expected = quantize_q4_k(values)
    monkeypatch.setattr(quantize, "BLOCKS_AT_ONCE", 3)
    np.testing.assert_array_equal(quantize_q4_k(values), expected)


def test_the_search_reduces_the_error(monkeypatch):
    values = draw(16, 512) * np.exp(draw(16, 1))
    searched = decode_rows(quantize_q4_k(values), GGMLQuantizationType.Q4_K)
    monkeypatch.setattr(quantize, "STEPS", -1)
    simple = decode_rows(quantize_q4_k(values), GGMLQuantizationType.Q4_K)
    assert np.mean((searched - values) ** 2) < 0.95 * np.mean((simple - values) ** 2)
