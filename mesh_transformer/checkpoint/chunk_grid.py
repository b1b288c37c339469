# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""How an array is cut: shards, one file each, none crossing a slice that a device owns; chunks in them, each with a checksum."""

import itertools
import math
from collections.abc import Iterator, Sequence

DTYPES = {  # bytes of a value; the names are JAX's and Zarr's alike
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip
MAX_CHUNK_BYTES = 8_000_000  # what must be read and checked to see one value
MAX_SHARD_BYTES = 64_000_000  # what the encoder holds beside the values themselves; the size of a file
MAX_CHUNKS = 1 << 24  # of a shard


def count_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of the values of an array."""
    return math.prod(shape) * DTYPES[dtype]


def count_shards(shape: Sequence[int], shard: Sequence[int]) -> int:
    """Number of files of an array."""
    return math.prod(-(-dim // part) for dim, part in zip(shape, shard, strict=True))


def shard_keys(shape: Sequence[int], shard: Sequence[int]) -> Iterator[str]:
    """Names of the files of an array: "c" of a scalar, "c.<i>.<j>" of a matrix."""
    counts = [range(-(-dim // part)) for dim, part in zip(shape, shard, strict=True)]
    return (shard_key(place) for place in itertools.product(*counts))


def shard_key(place: Sequence[int]) -> str:
    """Name of the file of the shard at `place` in the grid of shards."""
    return ".".join(["c", *map(str, place)])


def plan_chunks(shape: Sequence[int], piece: Sequence[int], dtype: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes (shard, chunk) for an array of `shape` that devices own in slices of shape `piece`.

    On a dim that is cut between devices both divide the piece; on one that is not they may overhang the end. Chunks are
    cut along the first dims, as values lie in memory, unless that would make them small; shards are runs of chunks.
    """
    is_whole = [part == dim for part, dim in zip(piece, shape, strict=True)]
    chunk = [max(part, 1) for part in piece]
    while count_bytes(chunk, dtype) > MAX_CHUNK_BYTES:
        room = [part * MAX_CHUNK_BYTES / count_bytes(chunk, dtype) for part in chunk]
        first = next(axis for axis, part in enumerate(chunk) if part > 1)
        if room[first] < 1:
            chunk[first] = 1
            continue
        parts = {axis: _fit(chunk[axis], int(most), is_whole[axis]) for axis, most in enumerate(room) if most >= 1}
        filled = {axis: part / room[axis] for axis, part in parts.items()}
        axis = next((axis for axis in filled if filled[axis] >= 0.5), max(filled, key=lambda axis: filled[axis]))
        chunk[axis] = parts[axis]
    shard = list(chunk)
    for axis in reversed(range(len(chunk))):
        count = max(-(-piece[axis] // chunk[axis]), 1)
        most = min(count, MAX_SHARD_BYTES // count_bytes(shard, dtype))
        times = _fit(count, most, is_whole[axis])
        shard[axis] *= times
        if times < count:
            break
    return tuple(shard), tuple(chunk)


def _fit(dim: int, most: int, may_overhang: bool) -> int:
    """Size of the parts of `dim`, at most `most`: a divisor, unless that would be small and parts may overhang the end."""
    divisor = _largest_divisor(dim, most)
    return -(-dim // -(-dim // most)) if may_overhang and 2 * divisor < most else divisor


def _largest_divisor(number: int, most: int) -> int:
    """Largest divisor of `number` that is at most `most`."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return max(n for n in (*small, *(number // n for n in small)) if n <= most)
