# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Named arrays on disk: written by the slices a process owns, read by the slices a device wants.

Every array is a zarr3 array of TensorStore, without compression. An outer chunk is one file and holds what one device
held when it was saved; inside it, inner chunks of at most 8 MB can be read alone, so that a small slice of a large
array costs little memory on any other mesh. Every inner chunk and the index of every file end in a crc32c. A chunk that
is not there is an error, never zeros.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts

INNER_BYTES = 8 * 2**20
READ_AHEAD_BYTES = 256 * 2**20  # slices of this size together are read at the same time
_CHECKED = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or another model's; the message names the array or file."""


class HostArray(NamedTuple):
    """The parts of a global array that this process owns, copied to host memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    piece: tuple[int, ...]  # shape of each part
    parts: list[tuple[tuple[slice, ...], np.ndarray]]


def copy_to_host(arrays: Mapping[str, jax.Array]) -> dict[str, HostArray]:
    """This process's parts of every array, each once; real copies, so that the arrays may be donated at once."""
    for array in arrays.values():
        array.copy_to_host_async()
    found = {}
    for name, array in arrays.items():
        owned = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        parts = [(shard.index, np.array(shard.data, copy=True)) for shard in owned]
        found[name] = HostArray(array.shape, array.dtype, array.sharding.shard_shape(array.shape), parts)
    return found


def write_array(folder: Path, array: HostArray) -> None:
    """Write the owned parts below `folder`; returns when they are on disk."""
    spec = _spec(folder) | {
        "metadata": _metadata(array.shape, array.dtype, array.piece),
        "create": True,
        "store_data_equal_to_fill_value": True,  # else all-zero chunks are left out and look lost
    }
    store = ts.open(spec).result()
    for future in [store[index].write(part, can_reference_source_data_indefinitely=True) for index, part in array.parts]:
        future.result()


def read_arrays(root: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The named arrays below `root` on the shardings of `wanted`; a slice that several devices hold is read once.

    Raises CheckpointError naming the array that cannot be read, and TensorStore's word on the file.
    """
    found: dict[str, jax.Array] = {}
    for group in _group_by_size(wanted):
        reading = {name: _start_reading(root, name, wanted[name]) for name in group}
        for name, slices in reading.items():
            found[name] = _finish_reading(name, wanted[name], slices)
    return found


def _start_reading(root: Path, name: str, wanted: jax.ShapeDtypeStruct) -> dict[Any, Any]:
    try:
        store = ts.open(_spec(root / name)).result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"array {name}: cannot be opened: {_brief(error)}") from error
    if store.shape != wanted.shape or store.dtype.numpy_dtype != wanted.dtype:
        raise CheckpointError(f"array {name}: the file holds {store.dtype.name}{list(store.shape)}, not what its manifest says")
    assert wanted.sharding is not None, f"{name} has no sharding to restore onto"
    places = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    return {key: store[index].read() for key, index in {_hashable(index): index for index in places.values()}.items()}


def _finish_reading(name: str, wanted: jax.ShapeDtypeStruct, slices: dict[Any, Any]) -> jax.Array:
    try:
        ready = {key: future.result() for key, future in slices.items()}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"array {name} is damaged: {_brief(error)}") from error
    assert wanted.sharding is not None
    places = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    pieces = [jax.device_put(ready[_hashable(index)], device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, pieces)


def read_slices(root: Path, name: str) -> Iterator[np.ndarray]:
    """An array in parts along its first axis, of about READ_AHEAD_BYTES each, for comparing in bounded memory."""
    store = ts.open(_spec(root / name)).result()
    rows = store.shape[0] if store.shape else 1
    step = max(1, READ_AHEAD_BYTES * rows // max(1, store.size * store.dtype.numpy_dtype.itemsize))
    for start in range(0, max(rows, 1), step):
        part = store[start : min(start + step, rows)] if store.shape else store
        try:
            yield part.read().result()
        except ValueError as error:
            raise CheckpointError(f"array {name} is damaged: {_brief(error)}") from error


def _spec(folder: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "fill_missing_data_reads": False,
        "recheck_cached_data": "open",
    }


def _metadata(shape: Sequence[int], dtype: np.dtype, piece: Sequence[int]) -> dict[str, Any]:
    outer = [max(size, 1) for size in piece]
    sharded = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": inner_shape(outer, dtype.itemsize),
            "codecs": _CHECKED,
            "index_codecs": _CHECKED,
            "index_location": "end",
        },
    }
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "codecs": [sharded] if shape else _CHECKED,
        "fill_value": False if dtype == np.bool_ else 0,
    }


def inner_shape(outer: Sequence[int], itemsize: int) -> list[int]:
    """The largest inner chunk of at most INNER_BYTES that divides `outer`, cut along leading axes first."""
    inner = list(outer)
    for axis, size in enumerate(outer):
        others = math.prod(inner[:axis] + inner[axis + 1 :]) * itemsize
        if others * size <= INNER_BYTES:
            break
        fitting = max(INNER_BYTES // others, 1)
        inner[axis] = next(divisor for divisor in range(min(fitting, size), 0, -1) if size % divisor == 0)
    return inner


def _group_by_size(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, array in wanted.items():
        own = math.prod(array.shape) * array.dtype.itemsize
        if group and size + own > READ_AHEAD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group


def _hashable(index: tuple[slice, ...]) -> tuple[Any, ...]:
    return tuple((part.start, part.stop) for part in index)


def _brief(error: Exception) -> str:
    """The first line of TensorStore's message, without the specification that follows it."""
    return str(error).splitlines()[0].split(" [tensorstore_spec", 1)[0].split(" [source locations", 1)[0]
