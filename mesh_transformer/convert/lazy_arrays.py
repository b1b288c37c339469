# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Arrays that are read a slice at a time: bytes of a file, parts put together, and an array seen in another layout.

Whatever another program's checkpoint holds is an array of ours made of these; nothing here ever reads more than the
slice asked for needs, so that a conversion's memory is bounded by its slices.
"""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from mesh_transformer.checkpoint.arrays import StoredArray
from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.storage.paths import Place, map_bytes, read_into

FLOAT32 = np.dtype(np.float32)
TILE = 16
MAPPED_BYTES = 1 << 23  # of a file at once, where only some columns of its rows are wanted


class Lazy(Protocol):
    """An array that is somewhere else."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dims."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Kind of its values; bfloat16 is ml_dtypes'."""
        ...

    def read(self, index: Slices) -> np.ndarray:
        """The values at `index`, in memory of their own and in any order there (see `pack`)."""
        ...


def whole(array: Lazy) -> Slices:
    """The index of everything."""
    return tuple(slice(0, dim) for dim in array.shape)


def grain_of(array: Lazy) -> tuple[int, ...]:
    """How many places of each dim are decoded together; 1 where each place can be read by itself."""
    match array:
        case StoredArray():
            return array.record.chunk
        case Row():
            return grain_of(array.base)[1:]
        case _:
            return (1,) * len(array.shape)


def is_here(array: Lazy) -> bool:
    """Whether its values can be read again for little: not those of a checkpoint in an object store."""
    if isinstance(array, Row):
        return is_here(array.base)
    return not isinstance(array, StoredArray) or isinstance(array.folder, Path)


class FileArray(NamedTuple):
    """Values that lie in a file one after the other, the last dim fastest."""

    path: Place
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Slices) -> np.ndarray:
        """Mapped for this one read, so that pages of the file do not stay in memory; ValueError if the file is too short.

        Of an object only the rows that `index` meets are fetched.
        """
        if not self.shape:
            return np.array(map_bytes(self.path, self.offset, self.offset + self.dtype.itemsize).view(self.dtype)[0])
        first, last, _ = index[0].indices(self.shape[0])
        dims = [len(range(*part.indices(dim))) for part, dim in zip(index, self.shape, strict=True)]
        values = np.empty(dims, self.dtype)
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        are_whole = values.size and values.shape[1:] == self.shape[1:]
        if isinstance(self.path, Path) and are_whole:  # they lie in one piece
            read_into(self.path, self.offset + first * row, values)
            return values
        step = max(MAPPED_BYTES // max(row, 1), 1)
        for start in range(first, last, step) if values.size else ():
            stop = min(start + step, last)
            raw = map_bytes(self.path, self.offset + start * row, self.offset + stop * row).view(self.dtype)
            values[start - first : stop - first] = raw.reshape(-1, *self.shape[1:])[(slice(None), *index[1:])]
        return values


class Held(NamedTuple):
    """Values that are in memory after all; for what is small."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dims."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """Kind of its values."""
        return self.values.dtype

    def read(self, index: Slices) -> np.ndarray:
        """A copy."""
        return np.array(self.values[index])


class Concat:
    """Arrays side by side along one dim."""

    def __init__(self, parts: Sequence[Lazy], axis: int):
        """ValueError if the parts differ in another dim or in dtype."""
        kinds = {(*part.shape[:axis], *part.shape[axis + 1 :], part.dtype) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"parts do not fit together: {[(part.shape, str(part.dtype)) for part in parts]}")
        self.parts, self.axis, self.dtype = parts, axis, parts[0].dtype
        self.shape = (*parts[0].shape[:axis], sum(p.shape[axis] for p in parts), *parts[0].shape[axis + 1 :])

    def read(self, index: Slices) -> np.ndarray:
        """Only from the parts that the slice meets."""
        start, stop, _ = index[self.axis].indices(self.shape[self.axis])
        found, begin = [], 0
        for part in self.parts:
            end = begin + part.shape[self.axis]
            low, high = max(start, begin), min(stop, end)
            if low < high or (start == stop and not found):
                inner = slice(low - begin, max(high, low) - begin)
                found.append(part.read((*index[: self.axis], inner, *index[self.axis + 1 :])))
            begin = end
        return found[0] if len(found) == 1 else np.concatenate(found, axis=self.axis)


class Stack:
    """Arrays of one shape, one for each place of a new first dim; float32 if they are of several types."""

    def __init__(self, rows: Sequence[Lazy]):
        """ValueError if the rows differ in shape."""
        if len({row.shape for row in rows}) != 1:
            raise ValueError(f"rows differ: {[row.shape for row in rows]}")
        self.rows, self.shape = rows, (len(rows), *rows[0].shape)
        self.dtype = rows[0].dtype if len({row.dtype for row in rows}) == 1 else FLOAT32

    def read(self, index: Slices) -> np.ndarray:
        """Only the rows of the slice."""
        rows = self.rows[index[0]]
        if len(rows) == 1:  # without one more copy
            return rows[0].read(index[1:])[None].astype(self.dtype, copy=False)
        values = np.empty((len(rows), *(s.stop - s.start for s in index[1:])), self.dtype)
        for place, row in enumerate(rows):
            values[place] = row.read(index[1:])
        return values


class Row(NamedTuple):
    """One place of an array's first dim."""

    base: Lazy
    place: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the other dims."""
        return self.base.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Kind of its values."""
        return self.base.dtype

    def read(self, index: Slices) -> np.ndarray:
        """The values at `index` of this place."""
        return self.base.read((slice(self.place, self.place + 1), *index))[0]


class Sum:
    """Arrays of one shape added up in float32, in their order, or their mean, in float64; the result is float32."""

    dtype = FLOAT32

    def __init__(self, parts: Sequence[Lazy], *, mean: bool = False):
        """ValueError if the parts differ in shape."""
        if len({part.shape for part in parts}) != 1:
            raise ValueError(f"parts differ: {[part.shape for part in parts]}")
        self.parts, self.shape, self.mean = parts, parts[0].shape, mean

    def read(self, index: Slices) -> np.ndarray:
        """The sum over the parts of the same slice; the mean of equal parts is exactly one of them."""
        kind = np.float64 if self.mean else FLOAT32
        total = self.parts[0].read(index).astype(kind)
        for part in self.parts[1:]:
            total += part.read(index).astype(kind)
        return (total / len(self.parts)).astype(FLOAT32) if self.mean else total


class AddRow(NamedTuple):
    """A matrix with one vector added to each row, in float32."""

    table: Lazy
    row: Lazy
    dtype: np.dtype = FLOAT32

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        return self.table.shape

    def read(self, index: Slices) -> np.ndarray:
        """The slice of both."""
        return self.table.read(index).astype(FLOAT32) + self.row.read(index[1:]).astype(FLOAT32)


class View:
    """An array of ours inside another one, in its layout.

    `pattern` says how the other lies, a dim a word or a group of words: "embed (3 heads head_dim)" is a matrix whose
    columns are 3 x heads x head_dim. Words are ours (`axes`, in our order) or one number, a dim of which we are the
    place `pick`. A word of ours that is missing has size 1.
    """

    def __init__(self, base: Lazy, pattern: str, axes: Sequence[str], sizes: Sequence[int], pick: int = 0):
        """ValueError if the other array has not the shape that the pattern asks for."""
        self.base, self.pattern, self.pick, self.dtype = base, parse_pattern(pattern), pick, base.dtype
        self.axes, self.shape = tuple(axes), tuple(sizes)
        self._sizes = dict(zip(axes, sizes, strict=True))
        expected = tuple(math.prod(self._size(word) for word in group) for group in self.pattern)
        if base.shape != expected:
            raise ValueError(f"shape {base.shape}, where {pattern!r} of {self._sizes} is {expected}")

    def read(self, index: Slices) -> np.ndarray:
        """Each group is cut along its first word on reading, along the others after it."""
        wanted = dict(zip(self.axes, index, strict=True))
        outer, split, inner = [], [], []
        for group in self.pattern:
            rest = math.prod(self._size(word) for word in group[1:])
            first = self._place(group[0], wanted)
            outer.append(slice(first.start * rest, first.stop * rest))
            split += [first.stop - first.start, *(self._size(word) for word in group[1:])]
            inner += [slice(None), *(self._place(word, wanted) for word in group[1:])]
        values = self.base.read(tuple(outer)).reshape(split)[tuple(inner)]
        words = [word for group in self.pattern for word in group]
        values = values.squeeze(tuple(i for i, word in enumerate(words) if word.isdigit()))
        ours = [word for word in words if not word.isdigit()]
        values = values.transpose([ours.index(axis) for axis in self.axes if axis in ours])
        return values.reshape([part.stop - part.start for part in index])  # dims of size 1 come in: nothing is copied

    def _size(self, word: str) -> int:
        return int(word) if word.isdigit() else self._sizes[word]

    def _place(self, word: str, wanted: dict[str, slice]) -> slice:
        return slice(self.pick, self.pick + 1) if word.isdigit() else wanted[word]


class Composed:
    """The other way round: an array of another program made of ours, each the place `pick` of the pattern's number."""

    def __init__(self, parts: Sequence[Lazy], pattern: str, axes: Sequence[Sequence[str]]):
        """`axes` are the words of each part's dims; ValueError if there are fewer parts than the pattern's number."""
        self.parts, self.pattern, self.axes, self.dtype = parts, parse_pattern(pattern), axes, parts[0].dtype
        self._sizes = dict(zip(axes[0], parts[0].shape, strict=True))
        numbers = [int(word) for group in self.pattern for word in group if word.isdigit()]
        if (numbers or [1]) != [len(parts)]:
            raise ValueError(f"{len(parts)} parts for {pattern!r}")
        self.shape = tuple(
            math.prod(len(parts) if word.isdigit() else self._sizes[word] for word in group) for group in self.pattern
        )

    @property
    def cut(self) -> tuple[int, int]:
        """The dim along which it is read in parts, and what these must be multiples of.

        It is the first of theirs, whose parts lie in one piece in their files: to decode chunks again costs less than to
        write rows in pieces. Of objects, which are fetched, the first dim of ours with several chunks says which.
        """
        for part, axes in zip(self.parts, self.axes, strict=True):
            for size, grain, axis in zip(part.shape, grain_of(part), axes, strict=True):
                dims = [dim for dim in range(len(self.pattern)) if _same_heads(self.pattern[dim][0], axes) == axis]
                if 1 < grain < size and dims and (dims[0] == 0 or not is_here(part)):
                    return dims[0], grain * self._rest(dims[0])
        lead = self.pattern[0][0]
        return 0, self.shape[0] if lead.isdigit() else self._rest(0)

    def _rest(self, dim: int) -> int:
        """Places of `dim` for one of its first word."""
        return self.shape[dim] // max(self._sizes[self.pattern[dim][0]], 1)

    def read_part(self, dim: int, first: int, last: int) -> np.ndarray:
        """Places `first` to `last` of one of its dims, all of the others, in any order in memory; see `cut`, `pack`."""
        words = [word for group in self.pattern for word in group]
        lead, place = self.pattern[dim][0], next((i for i, word in enumerate(words) if word.isdigit()), None)
        found = []
        for part, axes in zip(self.parts, self.axes, strict=True):
            ours = [_same_heads(word, axes) for word in words if not word.isdigit()]
            index = list(whole(part))
            if not lead.isdigit():
                rest = self._rest(dim)
                index[list(axes).index(_same_heads(lead, axes))] = slice(first // rest, last // rest)
            values = part.read(tuple(index)).transpose([list(axes).index(word) for word in ours])
            found.append(values if place is None else np.expand_dims(values, place))
        joined = found[0] if place is None else np.concatenate(found, axis=place)
        shape = list(self.shape)
        shape[dim] = last - first
        return joined.reshape(shape)

    def list_parts(self, most: int) -> Iterator[tuple[int, int]]:
        """(first, last) of parts of about `most` bytes along the dim of `cut`; one, if it has no dims."""
        if not self.shape:
            yield 0, 1
            return
        dim, unit = self.cut
        place = math.prod(self.shape) * self.dtype.itemsize // max(self.shape[dim], 1)
        step = max(most // max(place, 1) // unit, 1) * unit
        for first in range(0, self.shape[dim], step):
            yield first, min(first + step, self.shape[dim])


def _same_heads(word: str, axes: Sequence[str]) -> str:
    """Fused projections have as many key-value heads as heads, under one word of the pattern."""
    return "kv_heads" if word == "heads" and "heads" not in axes else word


def pack(values: np.ndarray) -> np.ndarray:
    """The values in C order. Transposed ones are copied TILE rows of the original at a time: three times as fast as all at
    once, which uses four bytes of each cache line that it loads."""
    if values.ndim < 2 or values.flags.c_contiguous or values.strides[-1] == values.itemsize:
        return np.ascontiguousarray(values)
    packed = np.empty(values.shape, values.dtype)
    for first in range(0, values.shape[-1], TILE):
        packed[..., first : first + TILE] = values[..., first : first + TILE]
    return packed


def parse_pattern(pattern: str) -> list[list[str]]:
    """The words of each dim: "embed (3 heads)" -> [["embed"], ["3", "heads"]]."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", pattern)]


def to_dtype(name: str) -> np.dtype:
    """numpy's dtype of a name such as "bfloat16"."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
