# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tensors of GGUF files: K-quants dequantize as in gguf, and the changes of llama.cpp's converter are undone."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, dequantize

from mesh_transformer.convert.gguf import tensors
from mesh_transformer.convert.gguf.container import TensorInfo
from mesh_transformer.convert.gguf.tensors import (
    QUANTIZED,
    dequantize_rows,
    from_pairs,
    open_tensor,
    subtract_one,
    to_pairs,
    undo_rope_order,
)
from mesh_transformer.convert.lazy_arrays import InMemory, full_index


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_dequantizes_as_gguf(kind, tmp_path, monkeypatch):
    block, size = GGML_QUANT_SIZES[kind]
    monkeypatch.setattr(tensors, "TILE", 5 * block)
    rows = np.random.default_rng(0).integers(0, 60, (12, 2 * size), np.uint8)  # any bytes are valid; small: no NaN
    (tmp_path / "rows").write_bytes(b"head" + rows.tobytes())
    array = open_tensor(TensorInfo(tmp_path / "rows", 4, (3, 4, 2 * block), kind))
    expected = dequantize(rows, kind).reshape(3, 4, 2 * block)
    assert np.isfinite(expected).all()
    assert np.std(expected) > 0
    np.testing.assert_array_equal(array.read(full_index(array)), expected)
    index = (slice(1, 3), slice(2, 4), slice(block + 3, block + 9))
    np.testing.assert_array_equal(array.read(index), expected[index])
    assert dequantize_rows(rows[:0], kind).shape == (0, 2 * block)


def test_rope_order():
    """As `LlamaModel.permute` of llama.cpp's conversion/llama.py."""
    n_heads, d_head = 3, 8
    weights = np.random.default_rng(0).standard_normal((n_heads * d_head, 5)).astype(np.float32)
    permuted = weights.reshape(n_heads, 2, d_head // 2, 5).swapaxes(1, 2).reshape(weights.shape)
    assert not np.array_equal(permuted, weights)
    np.testing.assert_array_equal(to_pairs(weights, d_head), permuted)
    np.testing.assert_array_equal(from_pairs(permuted, d_head), weights)
    array = undo_rope_order(InMemory(permuted), n_heads)
    for index in ((slice(0, 24), slice(0, 5)), (slice(3, 10), slice(1, 4)), (slice(8, 16), slice(0, 5))):
        np.testing.assert_array_equal(array.read(index), weights[index])


def test_the_one_of_gemma_is_subtracted():
    array = subtract_one(InMemory(np.array([1.5, 0.75, 1.0], np.float32)))
    np.testing.assert_array_equal(array.read((slice(0, 3),)), np.array([0.5, -0.25, 0.0], np.float32))
