# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of itself, and how each byte of it is checked. Format 1.

    step_<N>/
      arrays/<name>/zarr.json, c, c.<i>, c.<i>.<j> ...   one Zarr 3 array per name (chunks.py, arrays.py)
      manifest.json
      COMMIT

A name is a path, such as "params/transformer/embed/w": parts of letters, digits and _.~=+@,:- that do not begin with a
dot, and no name is a folder of another. Arrays are global: the mesh they were saved from is not in the format.

manifest.json is one object:

    format     1
    step       N
    created    time of the save, UTC, ISO 8601
    versions   {package: version} of python, jax, jaxlib, numpy, tensorstore
    arrays     {name: {shape, dtype, axes (logical axis of each dim), shard (shape of a file's part of the array),
                chunk (shape of a checksummed part of a file), files: {file: [size in bytes, xxh3-128 in hex]}}}
    meta       an object of the caller's: config, tokenizer, data cursor, metrics; NaN and Infinity are allowed

COMMIT is written last, and exactly three lines: `mesh-transformer checkpoint 1`, `manifest <xxh3-128 of manifest.json>`,
`commit <xxh3-128 of the two lines above>` (so that damage to COMMIT is told from damage to the manifest).
So COMMIT vouches for the manifest, the manifest for every file by size and digest, and while an array is read crc32c
vouches for each chunk and each index of chunks. Which files an array must have follows from shape and shard alone;
a manifest that lists others, or fewer, or sizes too small for the shape, is refused.
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
from mesh_transformer.storage.paths import AnyPath, read_small

FORMAT = 1
MANIFEST, ARRAYS, METADATA = "manifest.json", "arrays", "zarr.json"
MAX_MANIFEST_BYTES = 1 << 28
MAX_FILES = 1 << 24
READERS = 4  # files hashed at once
NAME_PART = re.compile(r"[A-Za-z0-9_~=+@,:-][A-Za-z0-9_.~=+@,:-]{0,199}")


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]  # logical axis of each dim
    shard: tuple[int, ...]  # part of the array in one file
    chunk: tuple[int, ...]  # part of a shard with its own checksum
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return count_bytes(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything in a checkpoint but the values."""

    step: int
    created: str
    versions: Mapping[str, str]
    arrays: Mapping[str, ArrayRecord]
    meta: Mapping[str, Any]


def write_manifest(folder: AnyPath, manifest: Manifest) -> None:
    """Write manifest.json, then COMMIT, both durable once the folder is synced."""
    data = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1).encode()
    backend_for(folder).write_files({MANIFEST: data})
    backend_for(folder).write_files({COMMIT: _commit_text(data)})


def read_manifest(folder: AnyPath, step: int) -> Manifest:
    """The manifest in `folder`, its digest and its contents checked; CheckpointError names the file and what is wrong."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    commit, data = _read_small(folder / COMMIT), _read_small(folder / MANIFEST)
    if commit != _commit_text(data):
        if _seal(commit.rpartition(b"commit ")[0]) != commit:
            raise CheckpointError(f"{folder / COMMIT}: damaged: not a commit marker")
        if not commit.startswith(f"mesh-transformer checkpoint {FORMAT}\n".encode()):
            raise CheckpointError(f"{folder / COMMIT}: {commit[:60]!r} is another format; this program reads {FORMAT}")
        raise CheckpointError(f"{folder / MANIFEST}: damaged: its digest is not the one in {COMMIT}")
    try:
        manifest = _parse(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest: {type(error).__name__}: {error}") from None
    if manifest.step != step:
        raise CheckpointError(f"{folder / MANIFEST}: is of step {manifest.step}; the folder was renamed")
    return manifest


def check_names(names: Iterable[str]) -> None:
    """Raise CheckpointError for a name that is not a plain relative path or is a folder of another name."""
    names = set(names)
    for name in names:
        parts = name.split("/")
        if not all(NAME_PART.fullmatch(part) for part in parts):
            raise CheckpointError(
                f"array name {name!r}: parts are 1 to 200 of A-Z a-z 0-9 _.~=+@,:- not beginning with a dot"
            )
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in names:
                raise CheckpointError(
                    f"array names {'/'.join(parts[:end])!r} and {name!r}: one is a folder of the other"
                )


def array_folder(folder: AnyPath, name: str) -> AnyPath:
    """Where the files of an array lie."""
    return folder / ARRAYS / name


def verify_sizes(folder: AnyPath, arrays: Mapping[str, ArrayRecord]) -> dict[AnyPath, str]:
    """Problems, by file, that sizes and kinds of files show without reading them: missing, cut, grown, a link, not a file."""
    problems: dict[AnyPath, str] = {}
    files = list(_files(folder, arrays))
    sizes = backend_for(folder).file_sizes(f"{ARRAYS}/{name}/{path.name}" for name, path, _ in files)
    for (name, path, file), size in zip(files, sizes, strict=True):
        if isinstance(size, str):
            problems[path] = f"{path}: {size}; a file of {name}"
        elif size != file.size:
            problems[path] = f"{path}: {size} bytes instead of {file.size}; a file of {name}"
    return problems


def verify_digests(folder: AnyPath, arrays: Mapping[str, ArrayRecord]) -> list[str]:
    """Problems of all files of `arrays`, every byte read, at the disk's speed."""
    problems = verify_sizes(folder, arrays)

    def check(entry: tuple[str, AnyPath, FileRecord]) -> str:
        name, path, file = entry
        try:
            same = path in problems or digest_file(path, file.size) == file
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror}); a file of {name}"
        return "" if same else f"{path}: damaged: its digest is not the manifest's; a file of {name}"

    with ThreadPoolExecutor(READERS) as readers:
        return [*problems.values(), *filter(None, readers.map(check, _files(folder, arrays)))]


def check_metadata(folder: AnyPath, arrays: Mapping[str, ArrayRecord]) -> None:
    """Raise CheckpointError if an array's zarr.json is not the one that was written (no checksum of Zarr covers it)."""
    for name, record in arrays.items():
        path = array_folder(folder, name) / METADATA
        if digest_file(path, record.files[METADATA].size) != record.files[METADATA]:
            raise CheckpointError(f"{path}: damaged: its digest is not the manifest's; a file of {name}")


def _files(folder: AnyPath, arrays: Mapping[str, ArrayRecord]) -> Iterator[tuple[str, AnyPath, FileRecord]]:
    for name, record in arrays.items():
        for key, file in record.files.items():
            yield name, array_folder(folder, name) / key, file


def _commit_text(manifest: bytes) -> bytes:
    digest = xxhash.xxh3_128_hexdigest(manifest)
    return _seal(f"mesh-transformer checkpoint {FORMAT}\nmanifest {digest}\n".encode())


def _seal(lines: bytes) -> bytes:
    return lines + f"commit {xxhash.xxh3_128_hexdigest(lines)}\n".encode()


def _read_small(path: AnyPath) -> bytes:
    try:
        return read_small(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"{path}: missing or unreadable ({error.strerror}); the checkpoint is not complete"
        ) from None


def _parse(table: dict[str, Any]) -> Manifest:
    if table["format"] != FORMAT:
        raise ValueError(f"format {table['format']!r} instead of {FORMAT}")
    arrays = {name: _parse_array(name, record) for name, record in table["arrays"].items()}
    check_names(arrays)
    if not isinstance(table["meta"], dict) or not isinstance(table["versions"], dict):
        raise ValueError("meta and versions must be objects")
    (step,) = _dims([table["step"]])
    return Manifest(step, str(table["created"]), table["versions"], arrays, table["meta"])


def _parse_array(name: str, table: dict[str, Any]) -> ArrayRecord:
    shape, shard, chunk = (_dims(table[key]) for key in ("shape", "shard", "chunk"))
    files = {str(key): FileRecord(_dims([size])[0], str(digest)) for key, (size, digest) in table["files"].items()}
    record = ArrayRecord(shape, str(table["dtype"]), tuple(map(str, table["axes"])), shard, chunk, files)
    if record.dtype not in DTYPES:
        raise ValueError(f"array {name}: dtype {record.dtype!r} is not one of {', '.join(DTYPES)}")
    if not len(shape) == len(shard) == len(chunk) == len(record.axes):
        raise ValueError(f"array {name}: shape, axes, shard and chunk differ in length")
    if any(inner < 1 or outer < inner or outer % inner for outer, inner in zip(shard, chunk, strict=True)):
        raise ValueError(f"array {name}: chunks {chunk} do not divide shards {shard}")
    chunks_per_shard = count_bytes(shard, record.dtype) // count_bytes(chunk, record.dtype)
    if count_bytes(chunk, record.dtype) > MAX_CHUNK_BYTES or chunks_per_shard > MAX_CHUNKS:
        raise ValueError(
            f"array {name}: chunks of {chunk} in shards of {shard} are larger or more than the format allows"
        )
    n_shards = count_shards(shape, shard)
    if n_shards > MAX_FILES or n_shards + 1 != len(files) or {METADATA, *shard_keys(shape, shard)} != files.keys():
        raise ValueError(f"array {name}: its files are not those of shape {shape} in shards of {shard}")
    if sum(file.size for key, file in files.items() if key != METADATA) < record.nbytes:
        raise ValueError(f"array {name}: its files are too small for shape {shape}")
    return record


def _dims(values: list[Any]) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{str(values)[:80]} is not a list of sizes")
    return tuple(values)
