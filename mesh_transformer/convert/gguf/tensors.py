# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tensors of GGUF files as lazy arrays; quantized tensors are dequantized to float32, by `gguf.quants`, as they are read.

Also the functions that undo the changes of llama.cpp's converter to tensors, and `to_pairs`, which makes one of these changes.
"""

from collections.abc import Mapping

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.gguf.container import TensorInfo
from mesh_transformer.convert.import_plan import raise_problems
from mesh_transformer.convert.lazy_arrays import FLOAT32, Decoded, FileArray, LazyArray, to_dtype

UNQUANTIZED = {  # types that are not quantized -> NumPy dtype
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
QUANTIZED = tuple(
    GGMLQuantizationType[name]
    for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
)
TILE = (
    1 << 17
)  # values that `dequantize` gets at once: its temporaries stay in a core's cache and out of the memory limit


def open_tensors(infos: Mapping[str, TensorInfo], where: object) -> dict[str, LazyArray]:
    """Return the tensors as lazy arrays. Raise CheckpointError with the tensors whose type is not supported."""
    supported = (*UNQUANTIZED, *QUANTIZED)
    problems = [
        f"{name} is {info.type.name}; supported: {', '.join(each.name for each in supported)}"
        for name, info in infos.items()
        if info.type not in supported
    ]
    raise_problems(
        f"{where}: tensors of types that are not supported; quantize the model to a supported type", problems
    )
    return {name: open_tensor(info) for name, info in infos.items()}


def open_tensor(info: TensorInfo) -> LazyArray:
    """Return a tensor as a lazy array; the values of a quantized tensor are float32."""
    if info.type in UNQUANTIZED:
        return FileArray(info.path, info.offset, info.shape, to_dtype(UNQUANTIZED[info.type]))
    block, block_bytes = GGML_QUANT_SIZES[info.type]
    stored = FileArray(info.path, info.offset, (*info.shape[:-1], info.row_bytes), np.dtype(np.uint8))

    def decode(index: Slices) -> np.ndarray:
        columns = slice(index[-1].start // block * block_bytes, index[-1].stop // block * block_bytes)
        return dequantize_rows(stored.read((*index[:-1], columns)), info.type)

    granularity = (*(1,) * (len(info.shape) - 1), block)
    return Decoded(info.shape, FLOAT32, granularity, stored.is_local, decode)


def dequantize_rows(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the float32 values [..., n] of stored rows [..., bytes]."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    shape = (*rows.shape[:-1], rows.shape[-1] // block_bytes * block)
    if not rows.size:  # `dequantize` cannot reshape an empty array
        return np.empty(shape, np.float32)
    data = np.ascontiguousarray(rows).reshape(-1, block_bytes)
    values = np.empty((len(data), block), np.float32)
    step = TILE // block
    for first in range(0, len(data), step):
        row = data[first : first + step].reshape(1, -1)
        values[first : first + step] = dequantize(row, kind).reshape(-1, block)
    return values.reshape(shape)


def undo_rope_order(tensor: LazyArray, n_heads: int) -> LazyArray:
    """Return a query or key projection [heads * d_head, ...] with the row order of transformers' rotate_half.

    For the architecture "llama", llama.cpp rotates neighboring pairs, and its converter interleaves the rows of each head.
    """
    d_head = tensor.shape[0] // n_heads

    def decode(index: Slices) -> np.ndarray:
        return from_pairs(tensor.read(index), d_head)

    granularity = (d_head, *tensor.read_granularity[1:])
    return Decoded(tensor.shape, tensor.dtype, granularity, tensor.is_local, decode)


def from_pairs(values: np.ndarray, d_head: int) -> np.ndarray:
    """Undo `to_pairs`: return interleaved rows [heads * d_head, ...] with the two halves of each head one after the other."""
    heads = values.reshape(-1, d_head // 2, 2, *values.shape[1:])
    return heads.swapaxes(1, 2).reshape(values.shape)


def to_pairs(values: np.ndarray, d_head: int) -> np.ndarray:
    """Return rows [heads * d_head, ...] with the halves of each head interleaved, the layout of llama.cpp's "llama"."""
    heads = values.reshape(-1, 2, d_head // 2, *values.shape[1:])
    return heads.swapaxes(1, 2).reshape(values.shape)


def subtract_one(tensor: LazyArray) -> LazyArray:
    """Return a norm's scale minus 1 in float32, because llama.cpp's converter adds 1 for Gemma."""

    def decode(index: Slices) -> np.ndarray:
        return tensor.read(index).astype(FLOAT32) - FLOAT32.type(1)

    return Decoded(tensor.shape, FLOAT32, tensor.read_granularity, tensor.is_local, decode)
