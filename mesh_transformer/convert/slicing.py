# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Division of arrays into slices that fit into memory."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from mesh_transformer.checkpoint.manifest import ArrayRecord
from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.layout_views import Joined, Packed

COMPARE_BYTES = 16_000_000  # default size of a slice that is compared
SLICE_BYTES = 40_000_000  # default size of a slice that is read and written
MIN_SHARD_BYTES = 16_000_000  # shards of a checkpoint are not shrunk below this size


def slices_of_bytes(shape: tuple[int, ...], itemsize: int, max_bytes: int = COMPARE_BYTES) -> Iterator[Slices]:
    """Yield slices of about `max_bytes` or less that cover an array, in C order."""
    dims = list(shape)
    for dim in range(len(dims)):
        inner_bytes = math.prod(dims[dim + 1 :]) * itemsize
        dims[dim] = min(dims[dim], max(max_bytes // max(inner_bytes, 1), 1))
        if dims[dim] > 1:
            break
    return grid_slices(shape, dims)


def shard_slices(record: ArrayRecord) -> Iterator[Slices]:
    """Yield the slice of an array that each of its shard files holds."""
    return grid_slices(record.shape, record.shard)


def grid_slices(shape: Sequence[int], cell: Sequence[int]) -> Iterator[Slices]:
    """Yield the cells of a regular grid over an array; cells at the end of the array may be smaller."""
    starts = [range(0, dim, size) for dim, size in zip(shape, cell, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(low, min(low + size, dim)) for low, size, dim in zip(corner, cell, shape, strict=True))


def shrink_shard(shard: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype, slice_bytes: int) -> tuple[int, ...]:
    """Return a shard shape, a multiple of `chunk`, small enough that one file is one slice in memory."""
    shape = list(shard)
    for dim in range(len(shape)):
        while math.prod(shape) * dtype.itemsize > max(slice_bytes, MIN_SHARD_BYTES) and shape[dim] > chunk[dim]:
            shape[dim] -= chunk[dim]
    return tuple(shape)


def group_slices(tensor: Packed | Joined, slice_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """Yield lists of slices of a tensor, each list to be written by one worker.

    Slices along the first dimension are contiguous in the file, so each is in a separate list. Slices along another
    dimension interleave in the file, so one worker writes all of them. They are twice as large, because they are transposed
    a few rows at a time.
    """
    interleaved = bool(tensor.shape and tensor.chunking.dim)
    bounds = list(tensor.slice_bounds(slice_bytes * (2 if interleaved else 1)))
    yield from [bounds] if interleaved else [[bound] for bound in bounds]
