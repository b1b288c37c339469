# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Shard files of an array: chunks one after the other, each followed by its crc32c, then the index of their positions.

This is Zarr 3's `sharding_indexed` codec over `bytes` and `crc32c`. TensorStore reads these files and writes identical
files, which a test verifies. This module is used instead, because TensorStore copies every chunk, has no fast crc32c and
therefore takes three times as long.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from crc32c import crc32c

from mesh_transformer.checkpoint.chunk_grid import shard_key

MISSING = np.iinfo(np.uint64).max  # offset and size of a chunk that is outside the array
CHECKSUM = 4  # bytes, little endian
Slices = tuple[slice, ...]  # with step 1, one per dimension


class DamageError(Exception):
    """A file was changed after it was written, or cannot be read; `args` are its path and the reason."""


def encode_shard(values: np.ndarray, shard: Sequence[int], chunk: Sequence[int]) -> Iterator[bytes | memoryview]:
    """Yield the content of a shard's file in parts.

    `values` has the shape `shard`, or is smaller if the shard extends beyond the array's end; chunks across the end are
    then filled up with zeros, and chunks beyond the end are left out. `shard` and `chunk` have one size per dimension;
    `chunk` divides `shard`.
    """
    starts = [range(0, outer, inner) for outer, inner in zip(shard, chunk, strict=True)]
    positions: list[int] = []  # offset and size of each chunk in turn
    end = 0
    for corner in itertools.product(*starts):
        block = values[tuple(slice(low, low + part) for low, part in zip(corner, chunk, strict=True))]
        if not block.size:
            positions += [MISSING, MISSING]
            continue
        if block.shape != tuple(chunk):
            full = np.zeros(chunk, values.dtype)
            full[tuple(slice(dim) for dim in block.shape)] = block
            block = full
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        yield data
        yield _checksum(data)
        positions += [end, len(data) + CHECKSUM]
        end += len(data) + CHECKSUM
    index = np.array(positions, np.dtype("<u8")).tobytes()
    yield index
    yield _checksum(index)


def read_shards(folder: Path, shard: Sequence[int], chunk: Sequence[int], index: Slices, values: np.ndarray) -> None:
    """Fill `values` with the array in `folder` at `index` (slices with start and stop, step 1).

    Only chunks that overlap `index` are read, and each is verified; a chunk that is contiguous in `values` is read directly
    into it. Raises DamageError if a file is damaged, missing or unreadable.
    """
    for cell, part in grid_cells(index, shard):
        path = folder / shard_key(cell)
        target = subview(values, index, part)
        inside = _relative(part, cell, shard)
        try:
            with open(path, "rb", buffering=0) as file:
                _read_shard(file.fileno(), [n // m for n, m in zip(shard, chunk, strict=True)], chunk, inside, target)
        except OSError as error:
            raise DamageError(path, error.strerror or str(error)) from error
        except ValueError as error:
            raise DamageError(path, str(error)) from None


def _read_shard(file: int, counts: Sequence[int], chunk: Sequence[int], index: Slices, values: np.ndarray) -> None:
    positions = np.empty((*counts, 2), np.dtype("<u8"))
    size = os.fstat(file).st_size
    _read_checked(file, max(size - positions.nbytes - CHECKSUM, 0), positions, "the index")
    for cell, part in grid_cells(index, chunk):
        offset, nbytes = (int(number) for number in positions[cell])
        target = subview(values, index, part)
        is_direct = target.shape == tuple(chunk) and target.flags.c_contiguous
        block = target if is_direct else np.empty(chunk, values.dtype)
        if offset + nbytes > size or nbytes != block.nbytes + CHECKSUM:  # MISSING is larger than any file
            raise ValueError(f"chunk {cell} is missing, or does not have {block.nbytes} bytes")
        _read_checked(file, offset, block, f"chunk {cell}")
        if not is_direct:
            target[...] = block[_relative(part, cell, chunk)]


def _read_checked(file: int, offset: int, values: np.ndarray, label: str) -> None:
    """Fill `values` (in C order) from a file and compare the checksum that follows them."""
    data = values.reshape(-1).view(np.uint8).data
    checksum = bytearray(CHECKSUM)
    rest = [data, memoryview(checksum)]
    while rest:
        count = os.preadv(file, rest, offset)
        if not count:
            raise ValueError(f"{label} is truncated")
        offset += count
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:
            rest[0] = rest[0][count:]
    if bytes(checksum) != _checksum(data):
        raise ValueError(f"{label} does not match its checksum")


def subview(values: np.ndarray, index: Slices, part: Slices) -> np.ndarray:
    """Return a view of `part` of an array, given its `values` at `index`."""
    return values[(*(slice(p.start - i.start, p.stop - i.start) for p, i in zip(part, index, strict=True)), ...)]


def grid_cells(index: Slices, grid: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Slices]]:
    """Yield the cells of a grid that `index` overlaps, each with the part of `index` in it."""
    cells = [range(i.start // n, -(-i.stop // n)) for i, n in zip(index, grid, strict=True)]
    for cell in itertools.product(*cells):
        part = tuple(
            slice(max(i.start, c * n), min(i.stop, c * n + n)) for i, c, n in zip(index, cell, grid, strict=True)
        )
        yield cell, part


def _relative(part: Slices, cell: Sequence[int], grid: Sequence[int]) -> Slices:
    """Return `part` of an array relative to the corner of its grid cell."""
    return tuple(slice(p.start - c * n, p.stop - c * n) for p, c, n in zip(part, cell, grid, strict=True))


def _checksum(data: bytes | memoryview) -> bytes:
    return crc32c(data).to_bytes(CHECKSUM, "little")
