# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One array <-> its files: Zarr 3, written in the slices a process owns, read in those a device needs.

Codecs: `sharding_indexed` (index at the end, crc32c) over chunks of `bytes` (little endian) and crc32c; no compression;
chunks of zeros are stored as any other, else they would look lost. Keys are "c.<i>.<j>". Files are read by
shard_files.py, objects by TensorStore. Both take shape, dtype and codecs from the checked manifest, never from
zarr.json, which is there for other programs.
"""

import collections
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Sharding, SingleDeviceSharding

from mesh_transformer.checkpoint.backends import backend_for
from mesh_transformer.checkpoint.chunk_grid import DTYPES, plan_chunks, shard_key
from mesh_transformer.checkpoint.local_backend import LocalBackend
from mesh_transformer.checkpoint.manifest import ArrayRecord, array_folder
from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.checkpoint.zarr_sharding import DamageError, Slices, encode_shard, meet, part_of, read_shards
from mesh_transformer.storage.digests import FileRecord
from mesh_transformer.storage.errors import CheckpointError, StorageError, explain_error
from mesh_transformer.storage.paths import AnyPath, RemotePath, kvstore_context, kvstore_spec, read_blocks

PART_BYTES = 1 << 23  # of a slice of a checkpoint in an object store, fetched at once
READ_AHEAD_BYTES = 1 << 29  # of slices on their way from disk to devices
READERS = 2  # slices read at once
ALIGNMENT = 64  # bytes; host memory that begins so becomes an array of a CPU device without a copy


class Piece(NamedTuple):
    """A slice of an array that this process owns, in host memory."""

    index: Slices
    values: np.ndarray


class StoredArray(NamedTuple):
    """An array of a checkpoint whose files have been looked at, read a slice at a time."""

    folder: AnyPath
    name: str
    record: ArrayRecord

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dims."""
        return self.record.shape

    @property
    def dtype(self) -> np.dtype:
        """Kind of its values; bfloat16 is ml_dtypes'."""
        return jax.numpy.dtype(self.record.dtype)

    def read(self, index: Slices) -> np.ndarray:
        """The values at `index` (slices with step 1), checked, at an address that a CPU device takes as it is.

        CheckpointError if they are damaged. Little else is in memory on the way: of files one chunk, of objects, which
        TensorStore fetches side by side, the chunks of some rows.
        """
        index = tuple(slice(*part.indices(dim)[:2]) for part, dim in zip(index, self.shape, strict=True))
        values = make_aligned([part.stop - part.start for part in index], self.dtype)
        where = array_folder(self.folder, self.name)
        if isinstance(where, Path):
            try:
                read_shards(where, self.record.shard, self.record.chunk, index, values)
            except DamageError as error:
                path, reason = error.args
                raise CheckpointError(f"{path}: damaged or unreadable, a file of {self.name}: {reason}") from error
            return values
        for part in self._cut(index):
            part_of(values, index, part)[...] = _fetch(where, self.name, self.record, part)
        return values

    def _cut(self, index: Slices) -> list[Slices]:
        """`index` in parts whose chunks are about PART_BYTES, along the first axis that has several of them."""
        chunks = self.record.chunk
        cover = [-(-i.stop // c) * c - i.start // c * c for i, c in zip(index, chunks, strict=True)]
        axis = next((i for i, chunk in enumerate(chunks) if cover[i] > chunk), None)
        if axis is None:
            return [index]
        rows = max(
            PART_BYTES * chunks[axis] // (math.prod(cover) // cover[axis] * chunks[axis] * self.dtype.itemsize), 1
        )
        step, (low, high) = max(rows // chunks[axis], 1) * chunks[axis], (index[axis].start, index[axis].stop)
        starts = range(low // chunks[axis] * chunks[axis], high, step)
        parts = [slice(max(first, low), min(first + step, high)) for first in starts]
        return [(*index[:axis], part, *index[axis + 1 :]) for part in parts]


def make_aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Room for values, at an address that a CPU device takes as it is."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)


def describe_array(name: str, array: jax.Array, axes: Sequence[str]) -> ArrayRecord:
    """The record of an array to be saved, files yet unknown; CheckpointError if its kind cannot be."""
    if not isinstance(array, jax.Array):
        raise CheckpointError(f"array {name}: a {type(array).__name__} is not a jax.Array")
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise CheckpointError(f"array {name}: save a random key as jax.random.key_data(key)")
    if array.dtype.name not in DTYPES:
        raise CheckpointError(f"array {name}: dtype {array.dtype.name} cannot be saved; it can be {', '.join(DTYPES)}")
    if len(axes) != array.ndim:
        raise CheckpointError(f"array {name}: {len(axes)} logical axes {tuple(axes)} for shape {array.shape}")
    if array.is_deleted():
        raise CheckpointError(f"array {name}: its buffer was donated or deleted before the save")
    shard, chunk = plan_chunks(array.shape, array.sharding.shard_shape(array.shape), array.dtype.name)
    return ArrayRecord(array.shape, array.dtype.name, tuple(axes), shard, chunk)


def copy_to_host(arrays: Mapping[str, jax.Array]) -> dict[str, list[Piece]]:
    """This process's slices of `arrays` (a replicated slice belongs to the device with replica 0), all copied on return.

    The copies share no memory with the arrays, which may be donated next.
    """
    owned = {
        name: [shard for shard in array.addressable_shards if shard.replica_id == 0] for name, array in arrays.items()
    }
    for shard in itertools.chain(*owned.values()):
        shard.data.copy_to_host_async()
    return {name: [Piece(shard.index, _copy(shard.data)) for shard in shards] for name, shards in owned.items()}


def list_shards(
    folder: AnyPath, name: str, record: ArrayRecord, pieces: list[Piece]
) -> Iterator[Callable[[], tuple[str, str, FileRecord]]]:
    """What writes each file of some slices of an array and returns (array, file, what was written); `pieces` is emptied.

    `settle` of the array's folder makes them durable.
    """
    target = backend_for(array_folder(folder, name))
    while pieces:
        for key, values in _cut(record, pieces.pop()):
            yield functools.partial(_write_shard, target, name, record, key, values)


def _write_shard(
    target: LocalBackend | ObjectStoreBackend, name: str, record: ArrayRecord, key: str, values: np.ndarray
) -> tuple[str, str, FileRecord]:
    return name, key, target.write_file(key, encode_shard(values, record.shard, record.chunk))


def copy_file(array: StoredArray, key: str, folder: AnyPath) -> dict[str, FileRecord]:
    """Copy one file of an array into the checkpoint in `folder`; CheckpointError if it is not what the array's record says."""
    source = array_folder(array.folder, array.name) / key
    wanted = array.record.files[key]
    found = backend_for(array_folder(folder, array.name)).write_file(key, read_blocks(source, wanted.size))
    if found != wanted:
        raise CheckpointError(f"{source}: damaged: {found} is not {wanted}")
    return {key: found}


def restore_arrays(
    folder: AnyPath, records: Mapping[str, ArrayRecord], shardings: Mapping[str, Sharding], *, rows: Collection[str] = ()
) -> dict[str, Any]:
    """Arrays as `shardings` place them. Each slice is read once and given to all devices that need it, several at a time.

    Of an array in `rows` every place of its first dim becomes an array of its own, in a tuple; its sharding is that of
    one. On a CPU little else is in memory beside what is restored.
    """
    placed = collections.defaultdict[tuple[str, int], list[jax.Array]](list)
    flying: collections.deque[tuple[str, int, list[Sharding], int, Future[np.ndarray]]] = collections.deque()
    ahead = 0

    def land() -> int:
        name, first, places, size, future = flying.popleft()
        values = future.result() if name in rows else future.result()[None]
        for place, row in enumerate(values):
            placed[name, first + place] += place_copies(row if len(values) == 1 else np.array(row), places)
        return size

    with ThreadPoolExecutor(READERS) as readers:
        for name, record in records.items():
            array, split = StoredArray(folder, name, record), name in rows
            step = record.chunk[0] if split else 1  # rows of a chunk are decoded together
            for first in range(0, record.shape[0], step) if split else (0,):
                lead = (slice(first, min(first + step, record.shape[0])),) if split else ()
                for ends, places in _places(shardings[name], record.shape[split:]).items():
                    size = DTYPES[record.dtype] * step * math.prod(stop - start for start, stop in ends)
                    while flying and ahead + size > READ_AHEAD_BYTES:
                        ahead -= land()
                    index = (*lead, *(slice(*pair) for pair in ends))
                    flying.append((name, first, places, size, readers.submit(array.read, index)))
                    ahead += size
        while flying:
            land()

    def join(name: str, place: int) -> jax.Array:
        shape = records[name].shape[name in rows :]
        kind = records[name].dtype
        return jax.make_array_from_single_device_arrays(shape, shardings[name], placed[name, place], dtype=kind)

    return {
        name: tuple(join(name, place) for place in range(record.shape[0])) if name in rows else join(name, 0)
        for name, record in records.items()
    }


def place_copies(values: np.ndarray, places: Sequence[Sharding]) -> list[jax.Array]:
    """`values` on each of `places`, there on return; the caller gives them up.

    JAX may take a well aligned host buffer as it is, whatever may_alias says; replicas are not to share one by such luck.
    """
    copies = [
        jax.device_put(values.copy() if i and _is_host_memory(place) else values, place)
        for i, place in enumerate(places)
    ]
    return jax.block_until_ready(copies)  # so that host memory is free before the next slice is read


def _copy(data: jax.Array) -> np.ndarray:
    """Host values that outlive the array. A view of host memory must be copied; what came from a device is a copy."""
    return np.array(data) if _is_host_memory(data.sharding) else np.asarray(data)


def _is_host_memory(sharding: Sharding) -> bool:
    on_cpu = next(iter(sharding.device_set)).platform == "cpu"
    return on_cpu or sharding.memory_kind in ("pinned_host", "unpinned_host")


def _cut(record: ArrayRecord, piece: Piece) -> Iterator[tuple[str, np.ndarray]]:
    """File name and values of each shard of a piece."""
    index = tuple(slice(*part.indices(dim)[:2]) for part, dim in zip(piece.index, record.shape, strict=True))
    for place, part in meet(index, record.shard):
        yield shard_key(place), part_of(piece.values, index, part)


def _places(sharding: Sharding, shape: tuple[int, ...]) -> dict[tuple[tuple[int, int], ...], list[Sharding]]:
    """The devices of this process that need each slice of an array."""
    places: dict[tuple[tuple[int, int], ...], list[Sharding]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts = index if index is not None else (slice(None),) * len(shape)
        ends = tuple(part.indices(dim)[:2] for part, dim in zip(parts, shape, strict=True))
        places.setdefault(ends, []).append(SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    return places


def _fetch(where: RemotePath, name: str, record: ArrayRecord, index: Slices) -> np.ndarray:
    """What TensorStore finds at `index`; its errors as CheckpointError with array and file."""
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore_spec(where),
        "metadata": make_metadata(record),
        "fill_missing_data_reads": False,
    }
    try:
        array = ts.open(spec, open=True, assume_metadata=True, context=kvstore_context()).result()
        return array[index].read().result()
    except Exception as error:  # TensorStore raises by status code, DATA_LOSS as ValueError, others as builtin kinds
        message = str(error)
        found = re.search(r'"[^"]*/(c[.0-9]*)"', message)
        file = where / found[1] if found else where
        if unreachable := explain_error(file, error):
            raise StorageError(f"{file}: {unreachable}") from error
        reason = re.sub(r"\s*\[(source locations|tensorstore_spec|domain).*", "", message, flags=re.DOTALL)
        raise CheckpointError(f"{file}: damaged or unreadable, a file of {name}: {reason}") from error


def format_metadata(record: ArrayRecord) -> bytes:
    """The zarr.json of an array."""
    return json.dumps(make_metadata(record), indent=1).encode()


def make_metadata(record: ArrayRecord) -> dict[str, Any]:
    """What zarr.json says of an array."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain = {"name": "bytes"} if DTYPES[record.dtype] == 1 else little
    checksum = {"name": "crc32c"}
    sharding = {
        "chunk_shape": record.chunk,
        "codecs": [plain, checksum],
        "index_codecs": [little, checksum],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": record.shape,
        "data_type": record.dtype,
        "dimension_names": record.axes,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": record.shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": False if record.dtype == "bool" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
