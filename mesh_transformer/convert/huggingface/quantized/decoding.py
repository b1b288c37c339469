# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Shared functions to dequantize weights: stored tensors of a weight, tiles that bound memory, packed integers, block scales."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.lazy_arrays import Decoded, FileArray, LazyArray, full_index
from mesh_transformer.convert.slicing import grid_slices
from mesh_transformer.storage.errors import CheckpointError

TILE = 1 << 18  # values decoded at once: their float32 temporaries stay in a core's cache and out of the memory limit
WORD = 32  # bits of a word of packed integers


class Stored(NamedTuple):
    """The tensors that files have for one quantized weight, and the quantization_config of the model."""

    name: str  # of the weight
    parts: Mapping[str, FileArray]  # by their keys in Format.parts and Format.optional (formats.py)
    table: Mapping[str, Any]  # quantization_config
    dtype: np.dtype  # of the dequantized values

    def require_shape(self, part: str, *shape: int) -> FileArray:
        """Return the tensor `part`. Raise ValueError if it has another shape."""
        if self.parts[part].shape != shape:
            raise ValueError(f"{part} has shape {list(self.parts[part].shape)}, expected {list(shape)}")
        return self.parts[part]


def decode_lazily(
    stored: Stored,
    shape: Sequence[int],
    granularity: Sequence[int],
    decode: Callable[[Slices], np.ndarray],
    order: Sequence[int] | None = None,
) -> LazyArray:
    """Return a weight whose values `decode` computes, one tile at a time.

    `order` lists the dimensions from the slowest to the fastest in the file; default: the order of the weight's dimensions.
    """

    def decode_tiles(index: Slices) -> np.ndarray:
        dims = [part.stop - part.start for part in index]
        values = np.empty(dims, stored.dtype)
        for tile in grid_slices(dims, _tile_shape(dims, granularity, order or range(len(dims)))):
            outer = (
                slice(whole.start + part.start, whole.start + part.stop)
                for part, whole in zip(tile, index, strict=True)
            )
            values[tile] = decode(tuple(outer))
        return values

    is_local = all(part.is_local for part in stored.parts.values())
    return Decoded(tuple(shape), stored.dtype, tuple(granularity), is_local, decode_tiles)


def _tile_shape(dims: Sequence[int], granularity: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return the shape of tiles of about TILE values for an array, in multiples of the granularity."""
    tile = list(dims)
    for dim in order:
        inner = math.prod(tile) // max(tile[dim], 1)
        unit = granularity[dim]
        tile[dim] = min(tile[dim], max(TILE // max(inner, 1) // unit, 1) * unit)
        if tile[dim] > unit:
            break
    return [max(size, 1) for size in tile]


def values_per_period(bits: int) -> int:
    """Return how many integers of `bits` bits fill a whole number of words."""
    return WORD // math.gcd(bits, WORD)


def unpack_words(words: np.ndarray, bits: int, dim: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Return the unsigned integers in 32-bit words, as float32, along one dimension.

    The first integer is in the lowest bits of the first word; an integer that does not fit into the rest of a word continues
    in the next word. `order` has the index in the result of each integer of a period, by default in sequence. The result has
    all integers of the last period.
    """
    per_period = values_per_period(bits)
    n_words = per_period * bits // WORD
    if rest := -words.shape[dim] % n_words:
        words = np.pad(words, [(0, rest if i == dim else 0) for i in range(words.ndim)])
    before, after = words.shape[:dim], words.shape[dim + 1 :]
    periods = words.view(np.uint32).reshape(*before, words.shape[dim] // n_words, n_words, *after)
    values = np.empty((*before, words.shape[dim] // n_words, per_period, *after), np.float32)

    def at(i: int) -> tuple[Any, ...]:
        return (*(slice(None),) * (dim + 1), i)

    for i in range(per_period):
        word, shift = divmod(i * bits, WORD)
        shifted = periods[at(word)] >> np.uint32(shift)
        if shift + bits > WORD:
            shifted |= periods[at(word + 1)] << np.uint32(WORD - shift)
        values[at(order[i] if order else i)] = shifted & np.uint32((1 << bits) - 1)
    return values.reshape(*before, -1, *after)


def pair_table(values: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Return the two float32 values of each byte, joined in one uint64; `values` lists the values of four bits.

    The first of the two is in the low bits of the byte, or with `high_first` in the high bits.
    """
    byte = np.arange(256)
    pair = [values[byte & 15], values[byte >> 4]]
    return np.stack(pair[::-1] if high_first else pair, axis=-1).view(np.uint64)[:, 0]


def read_all(array: FileArray) -> np.ndarray:
    """Return all values of a small tensor."""
    return array.read(full_index(array))


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def read_block_rows(scales: FileArray, index: Slices, block: tuple[int, int]) -> np.ndarray:
    """Return float32 scales [..., rows, blocks] of the rows and of the blocks of columns that `index` of a weight selects."""
    rows, columns = index[-2:]
    outer = [
        slice(part.start // size, ceil_div(part.stop, size)) for part, size in zip((rows, columns), block, strict=True)
    ]
    of_blocks = to_float(scales.read((*index[:-2], *outer)))
    if block[0] == 1:
        return of_blocks
    return of_blocks[..., np.arange(rows.start, rows.stop) // block[0] - outer[0].start, :]


def to_float(scales: np.ndarray) -> np.ndarray:
    """Return scales as float32; bytes are the exponents of powers of two (E8M0 of the OCP MX specification)."""
    if scales.dtype == np.uint8:
        return np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    return scales.astype(np.float32)


def each_block(values: np.ndarray, factors: np.ndarray, size: int, apply: np.ufunc) -> None:
    """Apply `apply` in place to values [..., n] and factors [..., ceil(n / size)], one per block of `size` values."""
    whole = values.shape[-1] // size
    blocks = values[..., : whole * size].reshape(*values.shape[:-1], whole, size)  # a view
    apply(blocks, factors[..., :whole, None], out=blocks)
    if whole * size < values.shape[-1]:
        rest = values[..., whole * size :]
        apply(rest, factors[..., whole:], out=rest)


def check_groups(groups: np.ndarray, count: int, stored: Stored) -> np.ndarray:
    """Return the group of each input. Raise CheckpointError if a group has no scales."""
    if groups.size and not 0 <= groups.min() <= groups.max() < count:
        raise CheckpointError(
            f"{stored.name}: g_idx has groups from {groups.min()} to {groups.max()}, but there are scales of {count} "
            "groups; the file is damaged, download it again"
        )
    return groups
