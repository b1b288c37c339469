# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""How an array is gone through in parts that fit into memory."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from mesh_transformer.checkpoint.manifest import ArrayRecord
from mesh_transformer.convert.lazy_arrays import Composed, Slices

CUT_BYTES = 16_000_000  # of an array, compared at once
PART_BYTES = 40_000_000  # of an array, read and written at once, where nothing else is said
MIN_BLOCK_BYTES = 16_000_000  # of a file of a checkpoint, written at once


def cut(shape: tuple[int, ...], itemsize: int, most: int = CUT_BYTES) -> Iterator[Slices]:
    """Slices of at most about `most` bytes that cover an array, in the order of its values."""
    part = list(shape)
    for axis in range(len(part)):
        rest = math.prod(part[axis + 1 :]) * itemsize
        part[axis] = min(part[axis], max(most // max(rest, 1), 1))
        if part[axis] > 1:
            break
    return slices_of(shape, part)


def shard_slices(record: ArrayRecord) -> Iterator[Slices]:
    """Where the files of an array are in it."""
    return slices_of(record.shape, record.shard)


def slices_of(shape: tuple[int, ...], part: tuple[int, ...] | list[int]) -> Iterator[Slices]:
    """A grid of parts over an array."""
    starts = [range(0, dim, size) for dim, size in zip(shape, part, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(low, min(low + size, dim)) for low, size, dim in zip(corner, part, shape, strict=True))


def shrink(shard: tuple[int, ...], chunk: tuple[int, ...], kind: np.dtype, part_bytes: int) -> tuple[int, ...]:
    """Files small enough that one is a block."""
    parts = list(shard)
    for axis in range(len(parts)):
        while math.prod(parts) * kind.itemsize > max(part_bytes, MIN_BLOCK_BYTES) and parts[axis] > chunk[axis]:
            parts[axis] -= chunk[axis]
    return tuple(parts)


def group_parts(tensor: Composed, part_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """The parts of a tensor that are written one after the other: each by itself, or all where they lie among each other.

    The latter are twice as large, for they are turned some rows at a time and not as a whole.
    """
    among = bool(tensor.shape and tensor.cut[0])
    parts = list(tensor.list_parts(part_bytes * (1 + among)))
    yield from [parts] if among else [[part] for part in parts]
