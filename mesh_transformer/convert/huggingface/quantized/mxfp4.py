# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights stored as MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 e2m1 values with a shared power of two."""

import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.huggingface.quantized.decoding import (
    Stored,
    ceil_div,
    decode_lazily,
    pair_table,
    to_float,
)
from mesh_transformer.convert.lazy_arrays import LazyArray

BLOCK = 32  # values per scale
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


PAIRS = pair_table(E2M1)


def decode_mxfp4(stored: Stored) -> LazyArray:
    """Return experts [E, C, R] of blocks [E, R, C / 32, 16] and scales [E, R, C / 32], transposed as transformers does.

    Raises ValueError for other shapes.
    """
    blocks = stored.parts["blocks"]
    if len(blocks.shape) != 4 or blocks.shape[3] != BLOCK // 2:
        raise ValueError(f"blocks have shape {list(blocks.shape)}, expected [experts, outputs, inputs / 32, 16]")
    n_experts, outputs, n_blocks, _ = blocks.shape
    scales = stored.require_shape("scales", n_experts, outputs, n_blocks)

    def decode(index: Slices) -> np.ndarray:
        experts, inputs, rows = index
        inner = (experts, rows, slice(inputs.start // BLOCK, ceil_div(inputs.stop, BLOCK)))
        values = PAIRS.take(blocks.read((*inner, slice(0, BLOCK // 2)))).view(np.float32)
        values *= to_float(scales.read(inner))[..., None]
        return values.reshape(*values.shape[:2], -1).swapaxes(1, 2)

    return decode_lazily(stored, (n_experts, n_blocks * BLOCK, outputs), (1, BLOCK, 1), decode, (0, 2, 1))
