# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Encode values as the stored rows of each GGUF type.

`gguf.quants` quantizes the types with one scale per block. For Q4_K, which gguf lacks, `quantize_q4_k` follows
quantize_row_q4_K_ref of ggml-quants.c: the same search in the same order, in float32. If llama.cpp is compiled with fused
multiply-add, which rounds once instead of twice, the scales of a few blocks can differ by the smallest step.
"""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

from mesh_transformer.convert.gguf.tensors import UNQUANTIZED, dequantize_rows
from mesh_transformer.convert.lazy_arrays import to_dtype
from mesh_transformer.storage.errors import CheckpointError

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K")
SUPER, SUB = 256, 32  # values in a block and a sub-block of Q4_K
LEVELS, SCALE_LEVELS = 15, 63  # largest 4-bit level of a value, largest 6-bit level of a scale
STEPS, FIRST_STEP, STEP = 20, np.float32(-1.0), np.float32(0.1)  # of the search for a sub-block's scale
BLOCKS_AT_ONCE = 2048  # bounds the memory of the search


def encode_rows(values: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """Return values [..., n] as stored rows [..., bytes], uint8. Raise CheckpointError if a value overflows float16."""
    if kind in UNQUANTIZED:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values.astype(to_dtype(UNQUANTIZED[kind]), copy=False))
        if kind == GGMLQuantizationType.F16 and np.isinf(stored).any() and not np.isinf(values).any():
            raise CheckpointError(f"{name} has values beyond the range of float16; write it with --gguf-type BF16")
        return stored.view(np.uint8).reshape(*values.shape[:-1], -1)
    wide = np.ascontiguousarray(values, np.float32)
    rows = quantize_q4_k(wide) if kind == GGMLQuantizationType.Q4_K else quantize(wide, kind)
    return rows.reshape(*values.shape[:-1], -1)


def decode_rows(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the values [..., n] of stored rows [..., bytes]."""
    if kind in UNQUANTIZED:
        return np.ascontiguousarray(rows).view(to_dtype(UNQUANTIZED[kind]))
    return dequantize_rows(rows, kind)


def quantize_q4_k(values: np.ndarray) -> np.ndarray:
    """Return float32 values [..., n], n a multiple of 256, as blocks of Q4_K [..., n / 256 * 144], uint8."""
    blocks = values.reshape(-1, SUPER)
    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_K][1]
    stored = np.empty((len(blocks), block_bytes), np.uint8)
    for first in range(0, len(blocks), BLOCKS_AT_ONCE):
        stored[first : first + BLOCKS_AT_ONCE] = _quantize_blocks(blocks[first : first + BLOCKS_AT_ONCE])
    return stored.reshape(*values.shape[:-1], -1)


def _quantize_blocks(blocks: np.ndarray) -> np.ndarray:
    n_subs = SUPER // SUB
    x = np.ascontiguousarray(blocks.reshape(-1, SUB).T)  # [values of a sub-block, sub-blocks]: sums are in ggml's order
    searched, scales, minima = _search_scales(x)
    scales, minima = scales.reshape(-1, n_subs), minima.reshape(-1, n_subs)
    largest = [part.max(axis=1, keepdims=True, initial=0) for part in (scales, minima)]
    levels = [
        np.minimum(np.rint(part * _divide(np.float32(SCALE_LEVELS), top)).astype(np.int32) & 255, SCALE_LEVELS)
        for part, top in zip((scales, minima), largest, strict=True)
    ]
    factors = [(top / np.float32(SCALE_LEVELS)).astype(np.float16) for top in largest]
    d, minimum = (
        (factor.astype(np.float32) * level.astype(np.float32)).reshape(-1)
        for factor, level in zip(factors, levels, strict=True)
    )
    rounded = np.clip(np.rint(_divide(x + minimum, d)), 0, LEVELS)
    quants = np.where(d != 0, rounded, searched).astype(np.uint8).T.reshape(len(blocks), n_subs // 2, 2, SUB)
    packed = quants[:, :, 0] | (quants[:, :, 1] << 4)
    parts = [
        factors[0].view(np.uint8),
        factors[1].view(np.uint8),
        _pack_scales(*levels),
        packed.reshape(len(blocks), -1),
    ]
    return np.concatenate(parts, axis=1)


def _search_scales(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the levels [32, n], scales [n] and negated minima [n] of sub-blocks x [32, n]: make_qkx2_quants of ggml.

    The initial scale and 21 other scales near it are tried; the scale with the least weighted squared error is returned.
    """
    total = np.add.reduce  # over the first dimension, in order
    weights = np.sqrt(total(x * x) / np.float32(SUB)) + np.abs(x)
    low, high = np.minimum(x.min(axis=0), 0), x.max(axis=0)
    is_flat = high == low
    width = np.where(is_flat, np.float32(1), high - low)
    sum_w, sum_x = total(weights), total(weights * x)
    inverse = np.float32(LEVELS) / width
    scale, minimum = np.float32(1) / inverse, low
    levels = np.clip(np.rint(inverse * (x - low)), 0, LEVELS)
    error = total(weights * np.square(scale * levels + minimum - x))
    for step in range(STEPS + 1):
        inverse = (FIRST_STEP + STEP * np.float32(step) + np.float32(LEVELS)) / width
        tried = np.clip(np.rint(inverse * (x - low)), 0, LEVELS)
        sum_l, sum_l2 = total(weights * tried), total(weights * tried * tried)
        sum_xl = total(weights * tried * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = _divide(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_minimum = _divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        is_positive = new_minimum > 0
        new_scale = np.where(is_positive, _divide(sum_xl, sum_l2), new_scale)
        new_minimum = np.where(is_positive, np.float32(0), new_minimum)
        new_error = total(weights * np.square(new_scale * tried + new_minimum - x))
        is_better = (determinant > 0) & (new_error < error)
        levels = np.where(is_better, tried, levels)
        scale, minimum, error = (
            np.where(is_better, new, old)
            for new, old in ((new_scale, scale), (new_minimum, minimum), (new_error, error))
        )
    return np.where(is_flat, 0, levels), np.where(is_flat, np.float32(0), scale), -np.where(is_flat, low, minimum)


def _divide(a: np.ndarray | np.float32, b: np.ndarray) -> np.ndarray:
    """Return a / b, float32, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), b.shape), np.float32), where=b != 0)


def _pack_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Return 6-bit scales and minima [n, 8] of sub-blocks as bytes [n, 12]."""
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    high = (s[:, 4:] >> 4) << 6, (m[:, 4:] >> 4) << 6
    low = (s[:, 4:] & 0xF) | ((m[:, 4:] & 0xF) << 4)
    return np.concatenate([s[:, :4] | high[0], m[:, :4] | high[1], low], axis=1)
