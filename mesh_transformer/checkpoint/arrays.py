# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Arrays as Zarr 3 files: written in the slices that each process owns, read in the slices that each device needs.

Codecs: `sharding_indexed` (index at the end, crc32c) over chunks of `bytes` (little endian) and crc32c; no compression;
chunks of zeros are stored like any other, so that they are not taken for missing chunks. Keys are "c.<i>.<j>". Files are
read by zarr_sharding.py, objects by TensorStore. Both take shape, dtype and codecs from the checked manifest, never from
zarr.json, which exists for other programs.
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
from mesh_transformer.checkpoint.manifest import DAMAGE_FIX, ArrayRecord, array_folder
from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.checkpoint.zarr_sharding import (
    DamageError,
    Slices,
    encode_shard,
    grid_cells,
    read_shards,
    subview,
)
from mesh_transformer.storage.digests import FileRecord
from mesh_transformer.storage.errors import CheckpointError, StorageError, explain_error
from mesh_transformer.storage.paths import AnyPath, RemotePath, kvstore_context, kvstore_spec, read_blocks

FETCH_BYTES = 1 << 23  # per read of an array in an object store
READ_AHEAD_BYTES = 1 << 29  # size of the slices that are read before they are copied to devices
READERS = 2  # slices read concurrently
ALIGNMENT = 64  # bytes; a host buffer with this alignment becomes an array of a CPU device without a copy


class HostSlice(NamedTuple):
    """A slice of an array that this process owns, in host memory."""

    index: Slices
    values: np.ndarray


class StoredArray(NamedTuple):
    """An array of a checkpoint whose files have been verified by size, read a slice at a time."""

    folder: AnyPath
    name: str
    record: ArrayRecord

    @property
    def shape(self) -> tuple[int, ...]:
        return self.record.shape

    @property
    def dtype(self) -> np.dtype:
        """Return the NumPy dtype; bfloat16 is `ml_dtypes.bfloat16`."""
        return jax.numpy.dtype(self.record.dtype)

    @property
    def read_granularity(self) -> tuple[int, ...]:
        """Return the number of indices along each dimension that are decoded together: the chunk shape."""
        return self.record.chunk

    @property
    def is_local(self) -> bool:
        """Return whether the files are on a local file system, where repeated reads are cheap."""
        return isinstance(self.folder, Path)

    def read(self, index: Slices) -> np.ndarray:
        """Return the values at `index` (slices with step 1), checked, in a buffer that a CPU device uses without a copy.

        Raises CheckpointError if they are damaged. Additional memory: one chunk for files; for objects, which
        TensorStore reads concurrently, the chunks of FETCH_BYTES.
        """
        index = tuple(slice(*part.indices(dim)[:2]) for part, dim in zip(index, self.shape, strict=True))
        values = make_aligned([part.stop - part.start for part in index], self.dtype)
        path = array_folder(self.folder, self.name)
        if isinstance(path, Path):
            try:
                read_shards(path, self.record.shard, self.record.chunk, index, values)
            except DamageError as error:
                file, reason = error.args
                raise CheckpointError(_damaged(file, self.name, reason)) from error
            return values
        for part in self._split(index):
            subview(values, index, part)[...] = _fetch(path, self.name, self.record, part)
        return values

    def _split(self, index: Slices) -> list[Slices]:
        """Split `index` into parts whose chunks have about FETCH_BYTES, along the first dimension with several chunks."""
        chunks = self.record.chunk
        cover = [-(-i.stop // c) * c - i.start // c * c for i, c in zip(index, chunks, strict=True)]
        dim = next((i for i, chunk in enumerate(chunks) if cover[i] > chunk), None)
        if dim is None:
            return [index]
        row_bytes = math.prod(cover) // cover[dim] * chunks[dim] * self.dtype.itemsize  # of one row of chunks
        length = max(FETCH_BYTES * chunks[dim] // row_bytes, 1)
        step = max(length // chunks[dim], 1) * chunks[dim]
        low = index[dim].start
        high = index[dim].stop
        starts = range(low // chunks[dim] * chunks[dim], high, step)
        parts = [slice(max(first, low), min(first + step, high)) for first in starts]
        return [(*index[:dim], part, *index[dim + 1 :]) for part in parts]


def make_aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array in a buffer that a CPU device uses without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + nbytes].view(dtype).reshape(shape)


def describe_array(name: str, array: jax.Array, axes: Sequence[str]) -> ArrayRecord:
    """Return the record of an array to be saved, without its files; raise CheckpointError if it cannot be saved."""
    if not isinstance(array, jax.Array):
        raise CheckpointError(
            f"array {name}: is of type {type(array).__name__}, but must be a jax.Array; convert it with jax.device_put"
        )
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise CheckpointError(f"array {name}: a random key cannot be saved; save jax.random.key_data(key)")
    if array.dtype.name not in DTYPES:
        raise CheckpointError(
            f"array {name}: dtype {array.dtype.name} is not supported; use one of {', '.join(DTYPES)}"
        )
    if len(axes) != array.ndim:
        raise CheckpointError(
            f"array {name}: {len(axes)} logical axes {tuple(axes)} for shape {array.shape}; give one for each of its "
            f"{array.ndim} dimensions"
        )
    if array.is_deleted():
        raise CheckpointError(f"array {name}: its buffer was donated or deleted before the save; save it earlier")
    shard, chunk = plan_chunks(array.shape, array.sharding.shard_shape(array.shape), array.dtype.name)
    return ArrayRecord(array.shape, array.dtype.name, tuple(axes), shard, chunk)


def copy_to_host(arrays: Mapping[str, jax.Array]) -> dict[str, list[HostSlice]]:
    """Copy this process's slices of `arrays` to host memory; replicated slices belong to the device with replica 0.

    The copies share no memory with the arrays, which may be donated after the return.
    """
    owned = {
        name: [shard for shard in array.addressable_shards if shard.replica_id == 0] for name, array in arrays.items()
    }
    for shard in itertools.chain(*owned.values()):
        shard.data.copy_to_host_async()
    return {name: [HostSlice(shard.index, _copy(shard.data)) for shard in shards] for name, shards in owned.items()}


def shard_jobs(
    folder: AnyPath, name: str, record: ArrayRecord, slices: list[HostSlice]
) -> Iterator[Callable[[], tuple[str, str, FileRecord]]]:
    """Yield one job per file of some slices of an array; a job writes its file and returns (array name, file name, record).

    `slices` is emptied. `fsync_files` of the array's backend makes the files durable.
    """
    target = backend_for(array_folder(folder, name))
    while slices:
        for key, values in _shards_of(record, slices.pop()):
            yield functools.partial(_write_shard, target, name, record, key, values)


def _write_shard(
    target: LocalBackend | ObjectStoreBackend, name: str, record: ArrayRecord, key: str, values: np.ndarray
) -> tuple[str, str, FileRecord]:
    return name, key, target.write_file(key, encode_shard(values, record.shard, record.chunk))


def copy_file(array: StoredArray, key: str, folder: AnyPath) -> dict[str, FileRecord]:
    """Copy a file of an array into the checkpoint in `folder` and return its record by name.

    Raises CheckpointError if the size or digest of the file differs from the manifest.
    """
    source = array_folder(array.folder, array.name) / key
    expected = array.record.files[key]
    copied = backend_for(array_folder(folder, array.name)).write_file(key, read_blocks(source, expected.size))
    if copied != expected:
        raise CheckpointError(
            f"{source}: damaged: it has {copied.size} bytes with digest {copied.digest}, but the manifest has {expected.size} "
            f"bytes with digest {expected.digest}; {DAMAGE_FIX}"
        )
    return {key: copied}


class _PendingRead(NamedTuple):
    """A slice that is being read, and the devices that need it."""

    name: str
    first: int  # index into the first dimension, if the array is unstacked
    shardings: list[Sharding]
    nbytes: int
    values: Future[np.ndarray]


def restore_arrays(
    folder: AnyPath,
    records: Mapping[str, ArrayRecord],
    shardings: Mapping[str, Sharding],
    *,
    unstack: Collection[str] = (),
) -> dict[str, Any]:
    """Return arrays with the given shardings. Each slice is read once and copied to all devices that need it.

    An array named in `unstack` becomes a tuple with one array per index of its first dimension; `shardings` has the
    sharding that these arrays share. On a CPU, little memory is used in addition to the restored arrays.
    """
    on_device = collections.defaultdict[tuple[str, int], list[jax.Array]](list)
    in_flight: collections.deque[_PendingRead] = collections.deque()
    in_flight_bytes = 0

    def put_oldest() -> int:
        """Copy the slice that was requested first to its devices and return its size in bytes."""
        read = in_flight.popleft()
        values = read.values.result() if read.name in unstack else read.values.result()[None]
        for i, layer in enumerate(values):
            copies = put_copies(layer if len(values) == 1 else np.array(layer), read.shardings)
            on_device[read.name, read.first + i] += copies
        return read.nbytes

    with ThreadPoolExecutor(READERS) as readers:
        for name, record in records.items():
            array = StoredArray(folder, name, record)
            is_unstacked = name in unstack
            step = record.chunk[0] if is_unstacked else 1  # layers of one chunk are decoded together
            for first in range(0, record.shape[0], step) if is_unstacked else (0,):
                lead = (slice(first, min(first + step, record.shape[0])),) if is_unstacked else ()
                for bounds, devices in _local_slices(shardings[name], record.shape[is_unstacked:]).items():
                    nbytes = DTYPES[record.dtype] * step * math.prod(stop - start for start, stop in bounds)
                    while in_flight and in_flight_bytes + nbytes > READ_AHEAD_BYTES:
                        in_flight_bytes -= put_oldest()
                    index = (*lead, *(slice(*pair) for pair in bounds))
                    in_flight.append(_PendingRead(name, first, devices, nbytes, readers.submit(array.read, index)))
                    in_flight_bytes += nbytes
        while in_flight:
            put_oldest()

    def join(name: str, i: int) -> jax.Array:
        shape = records[name].shape[name in unstack :]
        dtype = records[name].dtype
        return jax.make_array_from_single_device_arrays(shape, shardings[name], on_device[name, i], dtype=dtype)

    return {
        name: tuple(join(name, i) for i in range(record.shape[0])) if name in unstack else join(name, 0)
        for name, record in records.items()
    }


def put_copies(values: np.ndarray, shardings: Sequence[Sharding]) -> list[jax.Array]:
    """Copy `values` to each single-device sharding; the caller must not use `values` afterwards.

    JAX may use an aligned host buffer without a copy, regardless of may_alias; replicas must not share one.
    """
    copies = [
        jax.device_put(values.copy() if i and _is_host_memory(sharding) else values, sharding)
        for i, sharding in enumerate(shardings)
    ]
    return jax.block_until_ready(copies)  # frees host memory before the next slice is read


def _copy(data: jax.Array) -> np.ndarray:
    """Return values that stay valid after the array is deleted; np.asarray copies from a device, but not from host memory."""
    return np.array(data) if _is_host_memory(data.sharding) else np.asarray(data)


def _is_host_memory(sharding: Sharding) -> bool:
    on_cpu = next(iter(sharding.device_set)).platform == "cpu"
    return on_cpu or sharding.memory_kind in ("pinned_host", "unpinned_host")


def _shards_of(record: ArrayRecord, host_slice: HostSlice) -> Iterator[tuple[str, np.ndarray]]:
    """Yield file name and values of each shard of a slice."""
    index = tuple(slice(*part.indices(dim)[:2]) for part, dim in zip(host_slice.index, record.shape, strict=True))
    for cell, part in grid_cells(index, record.shard):
        yield shard_key(cell), subview(host_slice.values, index, part)


def _local_slices(sharding: Sharding, shape: tuple[int, ...]) -> dict[tuple[tuple[int, int], ...], list[Sharding]]:
    """Return {(start, stop) per dimension: the devices of this process that need this slice of an array}."""
    devices: dict[tuple[tuple[int, int], ...], list[Sharding]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts = index if index is not None else (slice(None),) * len(shape)
        bounds = tuple(part.indices(dim)[:2] for part, dim in zip(parts, shape, strict=True))
        devices.setdefault(bounds, []).append(SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    return devices


def _fetch(folder: RemotePath, name: str, record: ArrayRecord, index: Slices) -> np.ndarray:
    """Return the values at `index`, read by TensorStore; its errors become CheckpointErrors with array and file."""
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore_spec(folder),
        "metadata": make_metadata(record),
        "fill_missing_data_reads": False,
    }
    try:
        array = ts.open(spec, open=True, assume_metadata=True, context=kvstore_context()).result()
        return array[index].read().result()
    except Exception as error:  # TensorStore maps status codes to several builtin types, DATA_LOSS to ValueError
        message = str(error)
        match = re.search(r'"[^"]*/(c[.0-9]*)"', message)
        file = folder / match[1] if match else folder
        if unreachable := explain_error(file, error):
            raise StorageError(f"{file}: {unreachable}") from error
        reason = re.sub(r"\s*\[(source locations|tensorstore_spec|domain).*", "", message, flags=re.DOTALL)
        raise CheckpointError(_damaged(file, name, reason)) from error


def _damaged(file: AnyPath, array: str, reason: str) -> str:
    return f"{file}: damaged or unreadable file of array {array}: {reason}; {DAMAGE_FIX}"


def format_metadata(record: ArrayRecord) -> bytes:
    """Return the content of an array's zarr.json."""
    return json.dumps(make_metadata(record), indent=1).encode()


def make_metadata(record: ArrayRecord) -> dict[str, Any]:
    """Return the Zarr 3 metadata of an array."""
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
