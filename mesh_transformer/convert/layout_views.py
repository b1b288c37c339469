# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Views of external tensors as native arrays, and of native arrays as external tensors.

A pattern describes the layout of an external tensor. The grammar is close to that of einops: one entry per dimension,
each a word, or several words in parentheses whose sizes are multiplied, the first varying slowest. Words are the logical
axes of the native array. A number N is a dimension of size N along which N native arrays lie, for example q, k and v; the
index of a native array along this dimension is its component. A native axis that is not in the pattern has size 1.

    "(heads head_dim) embed"   torch.nn.Linear's [H*C, D] for a native [embed, heads, head_dim]
    "embed (3 heads head_dim)" GPT-2's fused c_attn [D, 3*H*C]; w_q is component 0, w_k 1 and w_v 2

`LayoutView` reads a native array from an external tensor; `Packed`, the inverse, is an external tensor made of native arrays.
An external tensor may also join tensors with different numbers of rows, such as q, k and v with fewer key-value heads. A
`Split` describes the rows of such a tensor: `Part` reads one of the joined tensors, from which a `LayoutView` reads a native
array; `Joined`, the inverse of `Part`, joins several `Packed`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.lazy_arrays import LazyArray, full_index


def parse_pattern(pattern: str) -> list[list[str]]:
    """Return the words of each dimension: "embed (3 heads)" -> [["embed"], ["3", "heads"]]."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", pattern)]


class LayoutView:
    """A native array inside an external tensor with another layout."""

    def __init__(
        self,
        base: LazyArray,
        pattern: str,
        axes: Sequence[str],
        shape: Sequence[int],
        *,
        component: int = 0,
        name: str = "tensor",
    ):
        """Raise ValueError, with the external tensor's `name`, if this tensor does not have the shape that the pattern requires.

        `axes` and `shape` belong to the native array; `component` is its index along the dimension that a number stands for.
        """
        self.base = base
        self.pattern = parse_pattern(pattern)
        self.component = component
        self.axes = tuple(axes)
        self.shape = tuple(shape)
        self.dtype = base.dtype
        self._sizes = dict(zip(axes, shape, strict=True))
        expected = tuple(math.prod(self._size(word) for word in group) for group in self.pattern)
        if base.shape != expected:
            sizes = ", ".join(f"{axis} = {size}" for axis, size in self._sizes.items())
            raise ValueError(f"{name}: shape {base.shape}, expected {expected} for layout {pattern!r} with {sizes}")

    @property
    def read_granularity(self) -> tuple[int, ...]:
        return (1,) * len(self.shape)

    @property
    def is_local(self) -> bool:
        return self.base.is_local

    def read(self, index: Slices) -> np.ndarray:
        """Return the values at `index`.

        Each external dimension is sliced along its first word when it is read, and along its other words afterwards.
        """
        wanted = dict(zip(self.axes, index, strict=True))
        outer: list[slice] = []
        dims: list[int] = []
        inner: list[slice] = []
        for group in self.pattern:
            rest = math.prod(self._size(word) for word in group[1:])
            first = self._slice(group[0], wanted)
            outer.append(slice(first.start * rest, first.stop * rest))
            dims += [first.stop - first.start, *(self._size(word) for word in group[1:])]
            inner += [slice(None), *(self._slice(word, wanted) for word in group[1:])]
        values = self.base.read(tuple(outer)).reshape(dims)[tuple(inner)]
        words = [word for group in self.pattern for word in group]
        values = values.squeeze(tuple(i for i, word in enumerate(words) if word.isdigit()))
        axes = [word for word in words if not word.isdigit()]
        values = values.transpose([axes.index(axis) for axis in self.axes if axis in axes])
        return values.reshape([part.stop - part.start for part in index])  # adds dimensions of size 1 without a copy

    def _size(self, word: str) -> int:
        return int(word) if word.isdigit() else self._sizes[word]

    def _slice(self, word: str, wanted: dict[str, slice]) -> slice:
        return slice(self.component, self.component + 1) if word.isdigit() else wanted[word]


class Chunking(NamedTuple):
    """A division of a tensor into slices along one dimension."""

    dim: int
    multiple: int  # each slice starts at a multiple of this number of indices


class Split(NamedTuple):
    """Division of the first dimension of an external tensor into equal blocks, and of each block into the same parts."""

    blocks: int
    sizes: tuple[int, ...]  # rows of each part in one block


class Part:
    """One of the tensors that an external tensor joins: the rows of one part, from all blocks in order."""

    def __init__(self, base: LazyArray, split: Split, component: int, *, name: str = "tensor"):
        """Raise ValueError, with the tensor's `name`, if its number of rows is not the number that the split requires."""
        self.base = base
        self.block_rows = sum(split.sizes)
        if base.shape[:1] != (split.blocks * self.block_rows,):
            rows = split.blocks * self.block_rows
            raise ValueError(
                f"{name}: shape {base.shape}, expected {rows} rows = {split.blocks} x ({' + '.join(map(str, split.sizes))})"
            )
        self.first = sum(split.sizes[:component])  # first row of this part in each block
        self.rows = split.sizes[component]  # rows of this part in each block
        self.shape = (split.blocks * self.rows, *base.shape[1:])
        self.dtype = base.dtype

    @property
    def read_granularity(self) -> tuple[int, ...]:
        return (1,) * len(self.shape)

    @property
    def is_local(self) -> bool:
        return self.base.is_local

    def read(self, index: Slices) -> np.ndarray:
        """Return the values at `index`; each block is read separately."""
        start, stop, _ = index[0].indices(self.shape[0])
        parts: list[np.ndarray] = []
        for block in range(start // self.rows, max(-(-stop // self.rows), start // self.rows + 1)):
            low, high = (min(max(row - block * self.rows, 0), self.rows) for row in (start, stop))
            offset = block * self.block_rows + self.first
            parts.append(self.base.read((slice(offset + low, offset + high), *index[1:])))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Packed:
    """An external tensor packed from N native arrays in the order of their components; N is the number in the pattern, or 1."""

    def __init__(self, arrays: Sequence[LazyArray], pattern: str, axes: Sequence[Sequence[str]]):
        """Raise ValueError if the number in the pattern, or 1, is not the number of arrays. `axes` has the axes of each array."""
        self.arrays = arrays
        self.pattern = parse_pattern(pattern)
        self.axes = axes
        self.dtype = arrays[0].dtype
        self._sizes = dict(zip(axes[0], arrays[0].shape, strict=True))
        numbers = [int(word) for group in self.pattern for word in group if word.isdigit()]
        if (numbers or [1]) != [len(arrays)]:
            raise ValueError(f"the layout {pattern!r} needs {(numbers or [1])[0]} arrays, got {len(arrays)}")
        self.shape = tuple(
            math.prod(len(arrays) if word.isdigit() else self._sizes[word] for word in group) for group in self.pattern
        )

    @property
    def chunking(self) -> Chunking:
        """Division of the tensor into slices for reading and writing.

        Slices along the first dimension are contiguous in the file that is written. This dimension is preferred for local
        arrays, because decoding a chunk several times costs less than writing many short rows. Arrays in an object store
        are sliced along the first native axis that is divided into several chunks, so that each chunk is downloaded once.
        """
        for array, axes in zip(self.arrays, self.axes, strict=True):
            for size, granularity, axis in zip(array.shape, array.read_granularity, axes, strict=True):
                dims = [dim for dim in range(len(self.pattern)) if _native_axis(self.pattern[dim][0], axes) == axis]
                if 1 < granularity < size and dims and (dims[0] == 0 or not array.is_local):
                    return Chunking(dims[0], granularity * self._inner_size(dims[0]))
        return self.row_chunking

    @property
    def row_chunking(self) -> Chunking:
        """Division along the first dimension into the smallest slices that can be read alone."""
        return Chunking(0, self.shape[0] if self.pattern[0][0].isdigit() else self._inner_size(0))

    def _inner_size(self, dim: int) -> int:
        """Return the number of indices of `dim` for each index of its first word."""
        return self.shape[dim] // max(self._sizes[self.pattern[dim][0]], 1)

    @property
    def row_multiple(self) -> int:
        """Return the number of rows that are read together; slices along the first dimension start at multiples of it."""
        return self._inner_size(0)

    def read_slice(self, dim: int, first: int, last: int) -> np.ndarray:
        """Return indices [first, last) of one dimension and all indices of the others, with any strides.

        `first` is a multiple of `chunking.multiple`, and `last` is a multiple of it or the size of the dimension.
        """
        words = [word for group in self.pattern for word in group]
        lead = self.pattern[dim][0]
        stack_dim = next((i for i, word in enumerate(words) if word.isdigit()), None)
        components: list[np.ndarray] = []
        for array, axes in zip(self.arrays, self.axes, strict=True):
            order = [_native_axis(word, axes) for word in words if not word.isdigit()]
            index = list(full_index(array))
            if not lead.isdigit():
                inner = self._inner_size(dim)
                index[list(axes).index(_native_axis(lead, axes))] = slice(first // inner, last // inner)
            values = array.read(tuple(index)).transpose([list(axes).index(axis) for axis in order])
            components.append(values if stack_dim is None else np.expand_dims(values, stack_dim))
        joined = components[0] if stack_dim is None else np.concatenate(components, axis=stack_dim)
        shape = list(self.shape)
        shape[dim] = last - first
        return joined.reshape(shape)

    def slice_bounds(self, max_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of slices of about `max_bytes` along the dimension of `chunking`; for a scalar, only (0, 1)."""
        return _slice_bounds(self, max_bytes)


class Joined:
    """An external tensor that joins the rows of several packed tensors in the order that a `Split` describes."""

    def __init__(self, parts: Sequence[Packed], split: Split):
        """Raise ValueError if a part does not have the number of rows that the split requires."""
        rows = [part.shape[0] for part in parts]
        if rows != [split.blocks * size for size in split.sizes]:
            raise ValueError(f"parts of {rows} rows, expected {[split.blocks * size for size in split.sizes]}")
        self.parts = parts
        self.split = split
        self.dtype = parts[0].dtype
        self.shape = (sum(rows), *parts[0].shape[1:])

    @property
    def chunking(self) -> Chunking:
        """Division into slices of the first dimension: whole blocks, or whole heads if there is only one block."""
        if self.split.blocks > 1:
            return Chunking(0, sum(self.split.sizes))
        return Chunking(0, math.gcd(*(part.row_multiple for part in self.parts)))

    def read_slice(self, dim: int, first: int, last: int) -> np.ndarray:
        """Return the rows [first, last), whose bounds are as in `Packed.read_slice`; `dim` is 0."""
        assert dim == 0
        sizes = self.split.sizes
        if self.split.blocks == 1:
            starts = np.cumsum([0, *sizes])
            bounds = [
                (max(first - start, 0), min(last - start, size)) for start, size in zip(starts, sizes, strict=False)
            ]
            return np.concatenate(
                [part.read_slice(0, a, b) for part, (a, b) in zip(self.parts, bounds, strict=True) if a < b]
            )
        first_block, last_block = first // sum(sizes), last // sum(sizes)
        blocks = [
            part.read_slice(0, first_block * size, last_block * size).reshape(-1, size, *self.shape[1:])
            for part, size in zip(self.parts, sizes, strict=True)
        ]
        return np.concatenate(blocks, axis=1).reshape(last - first, *self.shape[1:])

    def slice_bounds(self, max_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of slices of about `max_bytes` along the first dimension."""
        return _slice_bounds(self, max_bytes)


def _slice_bounds(tensor: Packed | Joined, max_bytes: int) -> Iterator[tuple[int, int]]:
    if not tensor.shape:
        yield 0, 1
        return
    dim, multiple = tensor.chunking
    index_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize // max(tensor.shape[dim], 1)
    step = max(max_bytes // max(index_bytes, 1) // multiple, 1) * multiple
    for first in range(0, tensor.shape[dim], step):
        yield first, min(first + step, tensor.shape[dim])


def _native_axis(word: str, axes: Sequence[str]) -> str:
    """Return the native axis of a word. In a fused projection with as many key-value heads as heads, "heads" is used for both."""
    return "kv_heads" if word == "heads" and "heads" not in axes else word
