# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Division of an array into shards (one file each) and chunks (the checksummed parts of a shard).

No shard crosses the boundary of a slice that one device owns.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

DTYPES = {  # bytes per value; JAX and Zarr use the same names
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip
MAX_CHUNK_BYTES = 8_000_000  # bytes to read and check in order to access one value
MAX_SHARD_BYTES = 64_000_000  # size of a file, and of the encoder's buffer in addition to the values
MAX_CHUNKS = 1 << 24  # per shard


def count_bytes(shape: Sequence[int], dtype: str) -> int:
    """Return the size of an array's values in bytes."""
    return math.prod(shape) * DTYPES[dtype]


def count_shards(shape: Sequence[int], shard: Sequence[int]) -> int:
    """Return the number of files of an array."""
    return math.prod(-(-dim // part) for dim, part in zip(shape, shard, strict=True))


def shard_keys(shape: Sequence[int], shard: Sequence[int]) -> Iterator[str]:
    """Yield the file names of an array: "c" for a scalar, "c.<i>.<j>" for a matrix."""
    counts = [range(-(-dim // part)) for dim, part in zip(shape, shard, strict=True)]
    return (shard_key(cell) for cell in itertools.product(*counts))


def shard_key(cell: Sequence[int]) -> str:
    """Return the file name of the shard at index `cell` of the shard grid."""
    return ".".join(["c", *map(str, cell)])


def plan_chunks(shape: Sequence[int], owned: Sequence[int], dtype: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes (shard, chunk) for an array of `shape` that devices own in slices of shape `owned`.

    Along a dimension that is sharded over devices, the sizes of shards and chunks divide the slice; along any other, the
    last shard or chunk may extend beyond the array's end. A chunk larger than MAX_CHUNK_BYTES is split along the first
    dimension that leaves at least half of this size, because such slices are contiguous in memory. Shards are runs of chunks.
    """
    is_unsharded = [part == dim for part, dim in zip(owned, shape, strict=True)]
    chunk = [max(part, 1) for part in owned]
    while count_bytes(chunk, dtype) > MAX_CHUNK_BYTES:
        limits = [part * MAX_CHUNK_BYTES / count_bytes(chunk, dtype) for part in chunk]
        first = next(dim for dim, part in enumerate(chunk) if part > 1)
        if limits[first] < 1:
            chunk[first] = 1
            continue
        parts = {
            dim: _part_size(chunk[dim], int(limit), is_unsharded[dim]) for dim, limit in enumerate(limits) if limit >= 1
        }
        filled = {dim: part / limits[dim] for dim, part in parts.items()}
        split = next((dim for dim in filled if filled[dim] >= 0.5), max(filled, key=lambda dim: filled[dim]))
        chunk[split] = parts[split]
    shard = list(chunk)
    for dim in reversed(range(len(chunk))):
        count = max(-(-owned[dim] // chunk[dim]), 1)
        limit = min(count, MAX_SHARD_BYTES // count_bytes(shard, dtype))
        times = _part_size(count, limit, is_unsharded[dim])
        shard[dim] *= times
        if times < count:
            break
    return tuple(shard), tuple(chunk)


def _part_size(size: int, limit: int, may_exceed_end: bool) -> int:
    """Return the size of equal parts, at most `limit`: the largest divisor of `size`.

    If the last part may exceed the end and this divisor is below limit / 2: the size of the fewest equal parts instead.
    """
    divisor = _largest_divisor(size, limit)
    return -(-size // -(-size // limit)) if may_exceed_end and 2 * divisor < limit else divisor


def _largest_divisor(number: int, limit: int) -> int:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return max(n for n in (*small, *(number // n for n in small)) if n <= limit)
