# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Arrays that are read one slice at a time: byte ranges of files, and arrays combined from others.

A conversion describes each array of its result as a combination of these classes. A read loads only the values that the
requested slice needs, so the size of the slices bounds the memory of a conversion.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices, grid_cells
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath, map_bytes, read_into

FLOAT32 = np.dtype(np.float32)
COPY_ROWS, COPY_ROW_BYTES = 128, 1024  # of a tile of a transposed array, which fits in a core's cache
MIN_TRANSPOSED = 1 << 13  # values of a matrix, below which tiles cost more than they save
COPY_PADDING = 32  # values between the columns of a tile, so that they are not in the same cache set
MAX_MAPPED_BYTES = 1 << 23  # mapped at a time if only some columns of a file's rows are needed
MIN_REQUEST_BYTES = 1 << 22  # of an object, unless an array is smaller


class LazyArray(Protocol):
    """An array whose values are read on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype:
        """Return the type of the values; bfloat16 is `ml_dtypes.bfloat16`."""
        ...

    @property
    def read_granularity(self) -> tuple[int, ...]:
        """Return the number of indices along each dimension that are decoded together; 1 if every index can be read alone."""
        ...

    @property
    def is_local(self) -> bool:
        """Return whether repeated reads are cheap: True for local files, False for arrays in an object store."""
        ...

    def read(self, index: Slices) -> np.ndarray:
        """Return the values at `index` in new memory, with any strides (see `to_c_order`)."""
        ...


def full_index(array: LazyArray) -> Slices:
    """Return the index that selects all of an array."""
    return tuple(slice(0, dim) for dim in array.shape)


def array_bytes(array: LazyArray) -> int:
    """Return the size of an array's values in bytes."""
    return math.prod(array.shape) * array.dtype.itemsize


class _Elementwise:
    """Base class of arrays whose elements can be read one by one."""

    shape: tuple[int, ...]

    @property
    def read_granularity(self) -> tuple[int, ...]:
        return (1,) * len(self.shape)


@dataclasses.dataclass(frozen=True)
class FileArray(_Elementwise):
    """Values stored contiguously in a file or an object, in C order."""

    path: AnyPath
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def is_local(self) -> bool:
        return isinstance(self.path, Path)

    def with_shape(self, *shape: int) -> "FileArray":
        """Return the same values in another shape. Raise ValueError if the shape has another number of values."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"shape {list(self.shape)}, expected {list(shape)}")
        return dataclasses.replace(self, shape=shape)

    def read(self, index: Slices) -> np.ndarray:
        """Return the values at `index`. Raise ValueError if the file is too short.

        The file is mapped for this read only, so its pages do not stay in memory. Of an object, the selected rows are
        downloaded, but at least MIN_REQUEST_BYTES of the array.
        """
        if not self.shape:
            return np.array(map_bytes(self.path, self.offset, self.offset + self.dtype.itemsize).view(self.dtype)[0])
        first, last, _ = index[0].indices(self.shape[0])
        dims = [len(range(*part.indices(dim))) for part, dim in zip(index, self.shape, strict=True)]
        values = np.empty(dims, self.dtype)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        has_full_rows = values.size and values.shape[1:] == self.shape[1:]
        if isinstance(self.path, Path) and has_full_rows:  # the slice is contiguous in the file
            read_into(self.path, self.offset + first * row_bytes, values)
            return values
        step = max(MAX_MAPPED_BYTES // max(row_bytes, 1), 1)
        for start in range(first, last, step) if values.size else ():
            stop = min(start + step, last)
            raw = self._read_bytes(start * row_bytes, stop * row_bytes)
            rows = raw.view(self.dtype).reshape(-1, *self.shape[1:])
            values[start - first : stop - first] = rows[(slice(None), *index[1:])]
        return values

    def _read_bytes(self, start: int, stop: int) -> np.ndarray:
        """Return bytes [start, stop) of the values.

        A small part of an object is taken from blocks that later calls find in a cache. Otherwise each tile of a quantized
        weight would need its own requests.
        """
        if isinstance(self.path, Path) or stop - start >= MIN_REQUEST_BYTES:
            return map_bytes(self.path, self.offset + start, self.offset + stop)
        first = start // MIN_REQUEST_BYTES * MIN_REQUEST_BYTES
        blocks: list[np.ndarray] = []
        for low in range(first, stop, MIN_REQUEST_BYTES):
            high = min(low + MIN_REQUEST_BYTES, array_bytes(self))
            blocks.append(map_bytes(self.path, self.offset + low, self.offset + high))
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return joined[start - first : stop - first]


class InMemory(_Elementwise):
    """A NumPy array with the `LazyArray` interface, for small arrays."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.shape = values.shape
        self.dtype = values.dtype
        self.is_local = True

    def read(self, index: Slices) -> np.ndarray:
        return np.array(self.values[index])


class Concat(_Elementwise):
    """Arrays concatenated along one existing dimension."""

    def __init__(self, arrays: Sequence[LazyArray], dim: int):
        """Raise ValueError if the arrays differ in another dimension or in dtype."""
        if len({(*array.shape[:dim], *array.shape[dim + 1 :], array.dtype) for array in arrays}) != 1:
            given = [(array.shape, str(array.dtype)) for array in arrays]
            raise ValueError(
                f"cannot concatenate along dimension {dim}: shapes and types are {given}; other dimensions and types must be equal"
            )
        self.arrays = arrays
        self.dim = dim
        self.dtype = arrays[0].dtype
        length = sum(array.shape[dim] for array in arrays)
        self.shape = (*arrays[0].shape[:dim], length, *arrays[0].shape[dim + 1 :])

    @property
    def is_local(self) -> bool:
        return all(array.is_local for array in self.arrays)

    def read(self, index: Slices) -> np.ndarray:
        """Return the values at `index`. Only arrays that overlap the slice are read."""
        start, stop, _ = index[self.dim].indices(self.shape[self.dim])
        parts: list[np.ndarray] = []
        begin = 0
        for array in self.arrays:
            end = begin + array.shape[self.dim]
            low, high = max(start, begin), min(stop, end)
            if low < high or (start == stop and not parts):
                inner = slice(low - begin, max(high, low) - begin)
                parts.append(array.read((*index[: self.dim], inner, *index[self.dim + 1 :])))
            begin = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self.dim)


class Stack(_Elementwise):
    """Arrays of one shape, stacked along a new first dimension; the dtype is float32 if their dtypes differ."""

    def __init__(self, arrays: Sequence[LazyArray]):
        """Raise ValueError if the arrays differ in shape."""
        if len({array.shape for array in arrays}) != 1:
            raise ValueError(
                f"cannot stack arrays of shapes {[array.shape for array in arrays]}; all must have the same shape"
            )
        self.arrays = arrays
        self.shape = (len(arrays), *arrays[0].shape)
        self.dtype = arrays[0].dtype if len({array.dtype for array in arrays}) == 1 else FLOAT32

    @property
    def is_local(self) -> bool:
        return all(array.is_local for array in self.arrays)

    def read(self, index: Slices) -> np.ndarray:
        """Return the values at `index`. Only the selected arrays are read."""
        arrays = self.arrays[index[0]]
        if len(arrays) == 1:  # saves a copy
            return arrays[0].read(index[1:])[None].astype(self.dtype, copy=False)
        values = np.empty((len(arrays), *(part.stop - part.start for part in index[1:])), self.dtype)
        for i, array in enumerate(arrays):
            copy_values(values[i, ...], array.read(index[1:]).astype(self.dtype, copy=False))
        return values


class Index:
    """The sub-array at one position of the first dimension: base[position]."""

    def __init__(self, base: LazyArray, position: int):
        self.base = base
        self.position = position
        self.shape = base.shape[1:]
        self.dtype = base.dtype

    @property
    def read_granularity(self) -> tuple[int, ...]:
        return self.base.read_granularity[1:]

    @property
    def is_local(self) -> bool:
        return self.base.is_local

    def read(self, index: Slices) -> np.ndarray:
        return self.base.read((slice(self.position, self.position + 1), *index))[0]


class Sum(_Elementwise):
    """The float32 sum of arrays of one shape, added in order; or their mean, computed in float64 and cast to float32."""

    def __init__(self, arrays: Sequence[LazyArray], *, mean: bool = False):
        """Raise ValueError if the arrays differ in shape."""
        if len({array.shape for array in arrays}) != 1:
            raise ValueError(
                f"cannot add arrays of shapes {[array.shape for array in arrays]}; all must have the same shape"
            )
        self.arrays = arrays
        self.mean = mean
        self.shape = arrays[0].shape
        self.dtype = FLOAT32

    @property
    def is_local(self) -> bool:
        return all(array.is_local for array in self.arrays)

    def read(self, index: Slices) -> np.ndarray:
        """Return the sum or mean at `index`. The mean of equal arrays has exactly their values."""
        dtype = np.float64 if self.mean else FLOAT32
        total = self.arrays[0].read(index).astype(dtype)
        for array in self.arrays[1:]:
            total += array.read(index).astype(dtype)
        return (total / len(self.arrays)).astype(FLOAT32) if self.mean else total


class AddBias(_Elementwise):
    """A matrix [N, D] with a vector [D] added to each row, in float32."""

    def __init__(self, matrix: LazyArray, bias: LazyArray):
        self.matrix = matrix
        self.bias = bias
        self.shape = matrix.shape
        self.dtype = FLOAT32

    @property
    def is_local(self) -> bool:
        return self.matrix.is_local and self.bias.is_local

    def read(self, index: Slices) -> np.ndarray:
        return self.matrix.read(index).astype(FLOAT32) + self.bias.read(index[1:]).astype(FLOAT32)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Values that are computed from stored data, such as those of quantized tensors.

    `decode` returns the values at an index whose bounds are multiples of `read_granularity`, or the array's end, and reads
    only the stored data of these values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_granularity: tuple[int, ...]  # indices along each dimension that are decoded together
    is_local: bool
    decode: Callable[[Slices], np.ndarray]

    def read(self, index: Slices) -> np.ndarray:
        """Return the values at `index`, decoding the blocks that overlap it."""
        outer: list[slice] = []
        inner: list[slice] = []
        for part, dim, block in zip(index, self.shape, self.read_granularity, strict=True):
            start, stop, _ = part.indices(dim)
            low, high = start // block * block, min(-(-stop // block) * block, dim)
            outer.append(slice(low, high))
            inner.append(slice(start - low, max(stop, start) - low))
        return self.decode(tuple(outer))[tuple(inner)]


def to_c_order(values: np.ndarray) -> np.ndarray:
    """Return the values in C order."""
    if values.flags.c_contiguous:  # also scalars, to which ascontiguousarray would add a dimension
        return values
    packed = np.empty(values.shape, values.dtype)
    copy_values(packed, values)
    return packed


def copy_values(target: np.ndarray, source: np.ndarray) -> None:
    """Copy an array with any strides to an array of the same shape and dtype in C order.

    A transposed array is copied through tiles in the cache. This is two to five times as fast as a single copy, which
    uses only one value of each cache line that it loads.
    """
    shape: list[int] = []  # without dimensions of size 1, neighbors joined where the source allows it
    outer_stride = 0
    for dim, stride in zip(source.shape, source.strides, strict=True):
        if shape and outer_stride == dim * stride:
            shape[-1] *= dim
        elif dim != 1:
            shape.append(dim)
        outer_stride = stride if dim != 1 else outer_stride
    source, target = source.reshape(shape), target.reshape(shape)
    columns = COPY_ROW_BYTES // source.itemsize
    fastest = min(range(len(shape) - 1), key=source.strides.__getitem__, default=0)
    if len(shape) < 2 or source.strides[-1] == source.itemsize or shape[fastest] * shape[-1] < MIN_TRANSPOSED:
        target[...] = source
        return
    raw = np.dtype(f"u{source.itemsize}")
    order = [*(dim for dim in range(len(shape) - 1) if dim != fastest), fastest, len(shape) - 1]
    source, target = (array.view(raw).transpose(order) for array in (source, target))
    tile = np.empty((columns, COPY_ROWS + COPY_PADDING), raw)
    whole = (slice(0, shape[fastest]), slice(0, shape[-1]))
    for matrix in np.ndindex(*source.shape[:-2]):
        for _, index in grid_cells(whole, (COPY_ROWS, columns)):
            part = source[matrix][index].T
            block = tile[: part.shape[0], : part.shape[1]]
            block[...] = part
            target[matrix][index] = block.T


def cast_values(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return values in another dtype. Raise CheckpointError, with the array's `name`, if a finite value becomes infinite."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    overflow = np.isinf(cast) & np.isfinite(values)
    if overflow.any():
        value = float(values[overflow].ravel()[0])
        raise CheckpointError(
            f"{name}: the value {value:g} is too large for {dtype}; pass --dtype "
            f"{'bfloat16' if dtype == np.float16 else 'float32'}, whose range is larger"
        )
    return cast


def to_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype with this name, including "bfloat16" and the 8-bit floating point types."""
    return np.dtype(getattr(ml_dtypes, name, name))
