# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint format 1: manifest, commit marker, and verification of every byte.

    step_<N>/
      arrays/<name>/zarr.json, c, c.<i>, c.<i>.<j> ...   one Zarr 3 array per name (chunk_grid.py, arrays.py)
      manifest.json
      COMMIT

A name is a path, such as "params/transformer/embed/w": parts of letters, digits and _.~=+@,:- that do not begin with a
dot, and no name is a folder of another name. Arrays are global: the format does not contain the mesh they were saved from.

manifest.json is one object:

    format     1
    step       N
    created    time of the save, UTC, ISO 8601
    versions   {package: version} of python, jax, jaxlib, numpy, tensorstore
    arrays     {name: {shape, dtype, axes (logical axis of each dim), shard (shape of a file's part of the array),
                chunk (shape of a checksummed part of a file), files: {file: [size in bytes, xxh3-128 in hex]}}}
    meta       an object of the caller: config, tokenizer, data cursor, metrics; NaN and Infinity are allowed

COMMIT is written last and has exactly three lines: `mesh-transformer checkpoint 1`, `manifest <xxh3-128 of
manifest.json>`, `commit <xxh3-128 of the two lines above>` (which distinguishes damage to COMMIT from damage to the
manifest). COMMIT thus verifies the manifest, the manifest verifies every file by size and digest, and while an array is
read, crc32c verifies each chunk and each index of chunks. The files of an array follow from shape and shard alone; a
manifest with other files, missing files, or sizes too small for the shape is rejected.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from mesh_transformer.checkpoint.backends import backend_for
from mesh_transformer.checkpoint.chunk_grid import (
    DTYPES,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    count_bytes,
    count_shards,
    shard_keys,
)
from mesh_transformer.checkpoint.local_backend import COMMIT
from mesh_transformer.storage.digests import FileRecord, digest_file
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath, describe_sibling_folders, read_small

FORMAT = 1
MANIFEST = "manifest.json"
ARRAYS = "arrays"
METADATA = "zarr.json"
MAX_MANIFEST_BYTES = 1 << 28
MAX_FILES = 1 << 24
READERS = 4  # files hashed concurrently
DAMAGE_FIX = 'use another step (training: checkpoint.resume = "latest-valid"), or restore the file from a copy'
NAME_PART = re.compile(r"[A-Za-z0-9_~=+@,:-][A-Za-z0-9_.~=+@,:-]{0,199}")


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """Shape, type, division into files, and digests of one array."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]  # logical axis of each dimension
    shard: tuple[int, ...]  # part of the array in one file
    chunk: tuple[int, ...]  # part of a shard with its own checksum
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the size of the values in bytes."""
        return count_bytes(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Content of manifest.json: everything in a checkpoint except the values."""

    step: int
    created: str
    versions: Mapping[str, str]
    arrays: Mapping[str, ArrayRecord]
    meta: Mapping[str, Any]


def write_manifest(folder: AnyPath, manifest: Manifest) -> None:
    """Write manifest.json, then COMMIT; their names are durable after the folder is synced."""
    data = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1).encode()
    backend_for(folder).write_files({MANIFEST: data})
    backend_for(folder).write_files({COMMIT: _commit_text(data)})


def read_manifest(folder: AnyPath, step: int) -> Manifest:
    """Return the verified manifest in `folder`; raise CheckpointError with the file and the problem."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint; {describe_sibling_folders(folder)}")
    commit, data = _read_small(folder / COMMIT), _read_small(folder / MANIFEST)
    if commit != _commit_text(data):
        if _add_digest(commit.rpartition(b"commit ")[0]) != commit:
            raise CheckpointError(
                f"{folder / COMMIT}: damaged: its last line is not the digest of the others; {DAMAGE_FIX}"
            )
        if not commit.startswith(f"mesh-transformer checkpoint {FORMAT}\n".encode()):
            raise CheckpointError(
                f"{folder / COMMIT}: {commit[:60]!r} is not format {FORMAT}, the only format that this version reads; use the "
                "version of mesh_transformer that saved the checkpoint"
            )
        raise CheckpointError(f"{folder / MANIFEST}: damaged: its digest does not match {COMMIT}; {DAMAGE_FIX}")
    try:
        manifest = _parse(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{folder / MANIFEST}: invalid manifest: {reason}; {DAMAGE_FIX}") from None
    if manifest.step != step:
        raise CheckpointError(
            f"{folder / MANIFEST}: step is {manifest.step}, which does not match the folder; rename the folder to "
            f"step_{manifest.step}"
        )
    return manifest


def check_names(names: Iterable[str]) -> None:
    """Raise CheckpointError for a name that is not a plain relative path or is a folder of another name."""
    names = set(names)
    for name in names:
        parts = name.split("/")
        if not all(NAME_PART.fullmatch(part) for part in parts):
            raise CheckpointError(
                f"array name {name!r}: each part between slashes must have 1 to 200 characters of A-Z a-z 0-9 _.~=+@,:- "
                "and not begin with a dot"
            )
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in names:
                raise CheckpointError(
                    f"array names {'/'.join(parts[:end])!r} and {name!r}: no name may be a folder of another; rename one of them"
                )


def array_folder(folder: AnyPath, name: str) -> AnyPath:
    """Return the folder with the files of an array."""
    return folder / ARRAYS / name


def verify_sizes(folder: AnyPath, arrays: Mapping[str, ArrayRecord]) -> dict[AnyPath, str]:
    """Return {file: problem} of files that are missing, not regular or of the wrong size, without reading the values."""
    problems: dict[AnyPath, str] = {}
    files = list(_files(folder, arrays))
    sizes = backend_for(folder).file_sizes(f"{ARRAYS}/{name}/{path.name}" for name, path, _ in files)
    for (name, path, file), size in zip(files, sizes, strict=True):
        if isinstance(size, str):
            problems[path] = f"{path}: {size}; it belongs to array {name}"
        elif size != file.size:
            problems[path] = f"{path}: size is {size} bytes, expected {file.size}; it belongs to array {name}"
    return problems


def verify_digests(folder: AnyPath, arrays: Mapping[str, ArrayRecord]) -> list[str]:
    """Return the problems of all files of `arrays`; reads and hashes every byte."""
    problems = verify_sizes(folder, arrays)

    def check(entry: tuple[str, AnyPath, FileRecord]) -> str:
        name, path, file = entry
        try:
            same = path in problems or digest_file(path, file.size) == file
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror}); it belongs to array {name}"
        return "" if same else f"{path}: damaged: its digest does not match the manifest; it belongs to array {name}"

    with ThreadPoolExecutor(READERS) as readers:
        return [*problems.values(), *filter(None, readers.map(check, _files(folder, arrays)))]


def check_metadata(folder: AnyPath, arrays: Mapping[str, ArrayRecord]) -> None:
    """Raise CheckpointError if the zarr.json of an array was changed; no Zarr checksum covers it."""
    for name, record in arrays.items():
        path = array_folder(folder, name) / METADATA
        if digest_file(path, record.files[METADATA].size) != record.files[METADATA]:
            raise CheckpointError(
                f"{path}: damaged: its digest does not match the manifest; it belongs to array {name}; {DAMAGE_FIX}"
            )


def _files(folder: AnyPath, arrays: Mapping[str, ArrayRecord]) -> Iterator[tuple[str, AnyPath, FileRecord]]:
    for name, record in arrays.items():
        for key, file in record.files.items():
            yield name, array_folder(folder, name) / key, file


def _commit_text(manifest: bytes) -> bytes:
    digest = xxhash.xxh3_128_hexdigest(manifest)
    return _add_digest(f"mesh-transformer checkpoint {FORMAT}\nmanifest {digest}\n".encode())


def _add_digest(lines: bytes) -> bytes:
    """Append the last line of COMMIT, the digest of the lines above it."""
    return lines + f"commit {xxhash.xxh3_128_hexdigest(lines)}\n".encode()


def _read_small(path: AnyPath) -> bytes:
    try:
        return read_small(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so the checkpoint is incomplete; use another step") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); correct its permissions or the disk"
        ) from None


def _parse(table: dict[str, Any]) -> Manifest:
    if table["format"] != FORMAT:
        raise ValueError(f"format is {table['format']!r}, expected {FORMAT}")
    arrays = {name: _parse_array(name, record) for name, record in table["arrays"].items()}
    check_names(arrays)
    for key in ("meta", "versions"):
        if not isinstance(table[key], dict):
            raise ValueError(f"{key} is a {type(table[key]).__name__}, but must be an object")
    (step,) = _dims([table["step"]], "step")
    return Manifest(step, str(table["created"]), table["versions"], arrays, table["meta"])


def _parse_array(name: str, table: dict[str, Any]) -> ArrayRecord:
    shape, shard, chunk = (_dims(table[key], f"array {name}: {key}") for key in ("shape", "shard", "chunk"))
    files = {
        str(key): FileRecord(_dims([size], f"array {name}: size of {key}")[0], str(digest))
        for key, (size, digest) in table["files"].items()
    }
    record = ArrayRecord(shape, str(table["dtype"]), tuple(map(str, table["axes"])), shard, chunk, files)
    if record.dtype not in DTYPES:
        raise ValueError(f"array {name}: dtype {record.dtype!r} is not one of {', '.join(DTYPES)}")
    if not len(shape) == len(shard) == len(chunk) == len(record.axes):
        raise ValueError(
            f"array {name}: shape {shape}, axes {record.axes}, shard {shard} and chunk {chunk} have different lengths"
        )
    if any(inner < 1 or outer < inner or outer % inner for outer, inner in zip(shard, chunk, strict=True)):
        raise ValueError(f"array {name}: chunks {chunk} do not divide shards {shard}")
    chunks_per_shard = count_bytes(shard, record.dtype) // count_bytes(chunk, record.dtype)
    if count_bytes(chunk, record.dtype) > MAX_CHUNK_BYTES or chunks_per_shard > MAX_CHUNKS:
        raise ValueError(
            f"array {name}: chunks of {chunk} in shards of {shard} exceed {MAX_CHUNK_BYTES} bytes per chunk or {MAX_CHUNKS} "
            "chunks per shard"
        )
    n_shards = count_shards(shape, shard)
    if n_shards > MAX_FILES or n_shards + 1 != len(files) or {METADATA, *shard_keys(shape, shard)} != files.keys():
        raise ValueError(f"array {name}: its files do not match shape {shape} in shards of {shard}")
    if sum(file.size for key, file in files.items() if key != METADATA) < record.nbytes:
        raise ValueError(f"array {name}: its files are too small for shape {shape}")
    return record


def _dims(values: list[Any], key: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{key}: {str(values)[:80]} is not a list of integers from 0 to 2**62 - 1")
    return tuple(values)
