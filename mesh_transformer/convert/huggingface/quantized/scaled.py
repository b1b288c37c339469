# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights stored as FP8 or int8 values with a scale for each block, row or tensor: w = (q - zero) * scale.

Blocks of a fixed size are those of DeepSeek V3 (arXiv 2412.19437, section 3.3.2; `weight_dequant` of its inference code);
the last blocks of a dimension may be smaller. compressed-tensors and FBGEMM have a scale for each row or tensor.
"""

import json
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.huggingface.quantized.decoding import (
    Stored,
    ceil_div,
    decode_lazily,
    each_block,
    read_block_rows,
)
from mesh_transformer.convert.lazy_arrays import FileArray, LazyArray

SIGN_AND_VALUE = np.int32(-0x78100000)  # bits of a shifted, sign-extended e4m3: sign, 4 + 3 value bits
EXPONENT_DIFFERENCE = np.float32(2.0**120)  # 2^(127 - 7), for the exponent biases of float32 and e4m3


def fp8_to_float(values: np.ndarray) -> np.ndarray:
    """Return FP8 or int8 values as float32. The cast of ml_dtypes takes five times as long for e4m3."""
    if values.dtype != ml_dtypes.float8_e4m3fn:
        return values.astype(np.float32)
    raw = values.view(np.int8)
    bits = raw.astype(np.int32)
    bits <<= 20
    bits &= SIGN_AND_VALUE
    floats = bits.view(np.float32)
    floats *= EXPONENT_DIFFERENCE  # also normalizes subnormal values
    is_nan = (raw & 0x7F) == 0x7F
    if is_nan.any():
        floats[is_nan] = np.nan
    return floats


def decode_blocks(stored: Stored, scale: FileArray, block: tuple[int, int], zero: FileArray | None = None) -> LazyArray:
    """Return the weight [..., R, C] for scales [..., ceil(R / block[0]), ceil(C / block[1])].

    Raises ValueError for another shape.
    """
    weight = stored.parts["weight"]
    if len(weight.shape) < 2:
        raise ValueError(f"shape {list(weight.shape)}, expected a matrix")
    *outer, rows, columns = weight.shape
    expected = (*outer, ceil_div(rows, block[0]), ceil_div(columns, block[1]))
    for name, array in (("scales", scale), ("zero points", zero)):
        if array is not None and array.shape != expected:
            raise ValueError(
                f"shape {list(weight.shape)}, {name} {list(array.shape)}, expected {list(expected)} for blocks of {list(block)}"
            )

    def decode(index: Slices) -> np.ndarray:
        values = fp8_to_float(weight.read(index))
        if zero is not None:
            each_block(values, read_block_rows(zero, index, block), block[1], np.subtract)
        each_block(values, read_block_rows(scale, index, block), block[1], np.multiply)
        return values

    columns_at_once = block[1] if block[1] < columns else 1
    return decode_lazily(stored, weight.shape, (*(1,) * (len(outer) + 1), columns_at_once), decode)


def reshape_scales(scale: FileArray, shape: Sequence[int]) -> tuple[FileArray, tuple[int, int]]:
    """Return the scales of a weight [..., R, C] as [..., 1, 1] or [..., R, 1], and the size (rows, columns) of a block.

    Raises ValueError unless there is one scale, or one scale for each row.
    """
    *outer, rows, columns = shape
    for n, size in ((rows, 1), (1, rows)):
        if scale.shape in ((*outer, n, 1), (*outer, n), *([()] if n == 1 and not outer else [])):
            return scale.with_shape(*outer, n, 1), (size, columns)
    raise ValueError(f"scales {list(scale.shape)}, expected one, or one for each of {rows} rows")


def decode_fp8(stored: Stored) -> LazyArray:
    """Return a weight of quant_method "fp8" with scales of blocks (`weight_block_size`), or else of rows or the whole tensor."""
    block = stored.table.get("weight_block_size")
    if block is None:
        return decode_rows(stored)
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise ValueError(f"weight_block_size is {json.dumps(block)}, expected two sizes")
    return decode_blocks(stored, stored.parts["scale"], (block[0], block[1]))


def decode_rows(stored: Stored) -> LazyArray:
    """Return a weight with one scale, or with one scale for each row."""
    scale, block = reshape_scales(stored.parts["scale"], stored.parts["weight"].shape)
    return decode_blocks(stored, scale, block)
