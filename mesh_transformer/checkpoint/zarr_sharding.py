# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The bytes of the files of an array: chunks one after the other, each with its crc32c, then where they are.

This is Zarr 3's `sharding_indexed` codec over `bytes` and `crc32c`. TensorStore reads these files, and would write the
same ones, which a test holds; it takes three times as long to, for it copies every chunk and has no fast crc32c.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from crc32c import crc32c

from mesh_transformer.checkpoint.chunk_grid import shard_key

MISSING = np.iinfo(np.uint64).max  # where a chunk that lies outside the array would be
CHECKSUM = 4  # bytes, little endian
Slices = tuple[slice, ...]  # with step 1, one for each dim


class DamageError(Exception):
    """A file is not what was written, or cannot be read; `args` are its path and why."""


def encode_shard(values: np.ndarray, shard: Sequence[int], chunk: Sequence[int]) -> Iterator[bytes | memoryview]:
    """The file of a shard, a piece at a time.

    `values` are the shard's, fewer than its shape where that passes the array's end; chunks are then filled with zeros,
    or left out. Both shapes have the values' dims, and `chunk` divides `shard`.
    """
    counts = [range(0, whole, part) for whole, part in zip(shard, chunk, strict=True)]
    places, end = [], 0
    for corner in itertools.product(*counts):
        block = values[tuple(slice(low, low + part) for low, part in zip(corner, chunk, strict=True))]
        if not block.size:
            places += [MISSING, MISSING]
            continue
        if block.shape != tuple(chunk):
            full = np.zeros(chunk, values.dtype)
            full[tuple(slice(dim) for dim in block.shape)] = block
            block = full
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        yield data
        yield _checksum(data)
        places += [end, len(data) + CHECKSUM]
        end += len(data) + CHECKSUM
    index = np.array(places, np.dtype("<u8")).tobytes()
    yield index
    yield _checksum(index)


def read_shards(folder: Path, shard: Sequence[int], chunk: Sequence[int], index: Slices, values: np.ndarray) -> None:
    """Fill `values` with what the array in `folder` holds at `index` (with starts and stops, step 1).

    Only the chunks that it meets are read, those that lie in one piece in `values` straight into it, each checked.
    DamageError if a file is damaged, lost or cannot be read.
    """
    for place, part in meet(index, shard):
        path = folder / shard_key(place)
        target = part_of(values, index, part)
        inside = tuple(slice(p.start - at * n, p.stop - at * n) for p, at, n in zip(part, place, shard, strict=True))
        try:
            with open(path, "rb", buffering=0) as file:
                _read_shard(file.fileno(), [n // m for n, m in zip(shard, chunk, strict=True)], chunk, inside, target)
        except OSError as error:
            raise DamageError(path, error.strerror or str(error)) from error
        except ValueError as error:
            raise DamageError(path, str(error)) from None


def _read_shard(file: int, counts: Sequence[int], chunk: Sequence[int], index: Slices, values: np.ndarray) -> None:
    table = np.empty((*counts, 2), np.dtype("<u8"))
    size = os.fstat(file).st_size
    _read_checked(file, max(size - table.nbytes - CHECKSUM, 0), table, "its index")
    for place, part in meet(index, chunk):
        offset, nbytes = (int(number) for number in table[place])
        target = part_of(values, index, part)
        fits = target.shape == tuple(chunk) and target.flags.c_contiguous
        block = target if fits else np.empty(chunk, values.dtype)
        if offset + nbytes > size or nbytes != block.nbytes + CHECKSUM:  # MISSING is larger than any file
            raise ValueError(f"chunk {place} is not there, or not of {block.nbytes} bytes")
        _read_checked(file, offset, block, f"chunk {place}")
        if not fits:
            target[...] = block[
                tuple(slice(p.start - at * n, p.stop - at * n) for p, at, n in zip(part, place, chunk, strict=True))
            ]


def _read_checked(file: int, offset: int, values: np.ndarray, what: str) -> None:
    """Fill `values` (in C order) from a file; its checksum lies behind it."""
    data = values.reshape(-1).view(np.uint8).data
    checksum = bytearray(CHECKSUM)
    rest = [data, memoryview(checksum)]
    while rest:
        count = os.preadv(file, rest, offset)
        if not count:
            raise ValueError(f"{what} is cut short")
        offset += count
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:
            rest[0] = rest[0][count:]
    if bytes(checksum) != _checksum(data):
        raise ValueError(f"{what} has another checksum")


def part_of(values: np.ndarray, index: Slices, part: Slices) -> np.ndarray:
    """Where `part` of an array is in `values`, which are those at `index`; always a view."""
    return values[(*(slice(p.start - i.start, p.stop - i.start) for p, i in zip(part, index, strict=True)), ...)]


def meet(index: Slices, grid: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Slices]]:
    """The cells of a grid that `index` meets, each with its part of it."""
    cells = [range(i.start // n, -(-i.stop // n)) for i, n in zip(index, grid, strict=True)]
    for place in itertools.product(*cells):
        yield (
            place,
            tuple(
                slice(max(i.start, at * n), min(i.stop, at * n + n))
                for i, at, n in zip(index, place, grid, strict=True)
            ),
        )


def _checksum(data: bytes | memoryview) -> bytes:
    return crc32c(data).to_bytes(CHECKSUM, "little")
