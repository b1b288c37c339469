# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights stored by bitsandbytes: NF4 and FP4 (QLoRA, arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339).

The 4-bit formats divide the values of a weight, in memory order, into blocks and store the largest magnitude of each block.
These magnitudes (`absmax`) may be quantized to 8 bits. LLM.int8 stores the largest magnitude of each row.
"""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.huggingface.quantized.decoding import (
    Stored,
    ceil_div,
    decode_lazily,
    each_block,
    pair_table,
    read_all,
)
from mesh_transformer.convert.lazy_arrays import FileArray, LazyArray

ROW_FORMAT = 0  # weight_format of LLM.int8 for rows in their order; the other formats are reordered for a GPU


class State(NamedTuple):
    """The `quant_state` of a 4-bit weight."""

    shape: tuple[int, int]
    blocksize: int  # values per block
    nested_blocksize: int  # values per block of a quantized `absmax`; 0: `absmax` is not quantized
    nested_offset: float  # added to `absmax`
    nested_code: np.ndarray | None = None  # the 256 float32 values of a quantized `absmax`


def decode_4bit(stored: Stored) -> LazyArray:
    """Return a weight of NF4 or FP4. Raises ValueError if its tensors do not belong together."""
    state = _read_state(stored)
    columns, size = state.shape[1], state.blocksize
    count = math.prod(state.shape)
    weight = stored.parts["weight"]
    if math.prod(weight.shape) != ceil_div(count, 2):
        raise ValueError(
            f"{math.prod(weight.shape)} bytes, expected {ceil_div(count, 2)} for shape {list(state.shape)}"
        )
    packed = weight.with_shape(ceil_div(count, 2))
    stored.require_shape("absmax", ceil_div(count, size))
    code = read_all(stored.require_shape("quant_map", 16)).astype(np.float32)
    pairs = pair_table(code, high_first=True)
    per_row = columns // size

    def decode(index: Slices) -> np.ndarray:
        rows, inner = index
        raw = packed.with_shape(state.shape[0], columns // 2).read((rows, slice(inner.start // 2, inner.stop // 2)))
        values = pairs.take(raw).view(np.float32)
        largest = _read_largest(stored, state, rows.start * per_row, rows.stop * per_row).reshape(-1, per_row)
        each_block(values, largest[:, inner.start // size : inner.stop // size], size, np.multiply)
        return values

    def decode_rows(index: Slices) -> np.ndarray:
        """Decode whole rows, of which the first and the last block may belong to other rows too."""
        start, stop = index[0].start * columns, index[0].stop * columns
        first, last = start // size, ceil_div(stop, size)
        raw = packed.read((slice(first * size // 2, min(last * size // 2, packed.shape[0])),))
        values = pairs.take(raw).view(np.float32)
        each_block(values, _read_largest(stored, state, first, last), size, np.multiply)
        return values[start - first * size : stop - first * size].reshape(-1, columns)

    if columns % size:
        return decode_lazily(stored, state.shape, (1, columns), decode_rows)
    return decode_lazily(stored, state.shape, (1, size), decode)


def _read_state(stored: Stored) -> State:
    try:
        table: dict[str, Any] = json.loads(bytes(read_all(stored.parts["quant_state"])))
        shape, size = table["shape"], table["blocksize"]
        nested = table.get("nested_blocksize", 0) if {"nested_absmax", "nested_quant_map"} <= stored.parts.keys() else 0
        state = State((shape[0], shape[1]), size, nested, float(table.get("nested_offset", 0.0)))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"quant_state is not valid: {type(error).__name__}: {error}") from None
    if len(shape) != 2 or size < 2 or size % 2:
        raise ValueError(
            f"quant_state has shape {shape} and blocks of {size}; expected a matrix and blocks of even size"
        )
    if (stored.parts["absmax"].dtype == np.uint8) != (nested > 0):
        raise ValueError(
            f"absmax has dtype {stored.parts['absmax'].dtype.name}; a uint8 absmax requires nested_absmax, nested_quant_map and "
            "nested_blocksize, and an absmax of another dtype must not have them"
        )
    if not nested:
        return state
    return state._replace(nested_code=read_all(stored.require_shape("nested_quant_map", 256)).astype(np.float32))


def _read_largest(stored: Stored, state: State, first: int, last: int) -> np.ndarray:
    """Return the largest magnitudes of the blocks from `first` to `last` - 1, float32."""
    absmax = stored.parts["absmax"].read((slice(first, last),))
    size = state.nested_blocksize
    if state.nested_code is None:
        return absmax.astype(np.float32)
    outer = stored.parts["nested_absmax"].read((slice(first // size, ceil_div(last, size)),))
    return state.nested_code[absmax] * outer[np.arange(first, last) // size - first // size] + np.float32(
        state.nested_offset
    )


def decode_llm_int8(stored: Stored) -> LazyArray:
    """Return a weight of LLM.int8: its values / 127 times SCB, the largest magnitude of each row."""
    layout = stored.parts.get("weight_format")
    if layout is not None and (weight_format := int(read_all(layout).flat[0])) != ROW_FORMAT:
        raise ValueError(
            f"weight_format is {weight_format}, expected {ROW_FORMAT} (row); save the model with a newer bitsandbytes"
        )
    weight: FileArray = stored.parts["weight"]
    largest = stored.require_shape("SCB", weight.shape[0])

    def decode(index: Slices) -> np.ndarray:
        values = weight.read(index).astype(np.float32)
        values *= largest.read(index[:1]).astype(np.float32)[:, None] * np.float32(1 / 127)
        return values

    return decode_lazily(stored, weight.shape, (1, 1), decode)
