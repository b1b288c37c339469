# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Downloads datasets from object stores into the cache, once per host, and again after a change of the dataset.

A dataset s3://bucket/path or gs://bucket/path can be a file, a folder (all objects below it), or the prefix of a shard.
Its files are stored in <cache_dir>/fetched/<digest of the URL>/ under the names of the objects, with the size and
modification time of the objects. A file with the same size and time is not downloaded again. Each file is downloaded
completely or not at all.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from mesh_transformer.data.errors import DataError
from mesh_transformer.data.readers import FILES, find_reader
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import RemotePath, parse_path, read_blocks

SHARD_SUFFIXES = (".bin", ".idx")


def is_remote(path: str) -> bool:
    """Return whether a dataset path is a URL of files in an object store."""
    return "://" in path and find_reader(path) is FILES


def download_dataset(
    url: str, cache_dir: str | Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """Download the dataset at `url` and return its local path. `on_progress` gets bytes done and total bytes.

    Raises DataError if the download fails.
    """
    folder = Path(os.path.expanduser(cache_dir)) / "fetched" / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        remote = parse_path(url.removesuffix(SHARD_SUFFIXES[0]).removesuffix(SHARD_SUFFIXES[1]))
        assert isinstance(remote, RemotePath), "a URL has a scheme"
        with open(folder.with_name(folder.name + ".lock"), "w") as lock:  # other processes on this host wait
            fcntl.flock(lock, fcntl.LOCK_EX)
            root, files = _find(remote)
            total = sum(size for size, _ in files.values())
            done = 0
            for name, (size, modified) in files.items():
                _download(root / name, folder / name, size, modified)
                done += size
                on_progress(done, total)
            _remove_others(folder, {folder / name for name in files})
    except (CheckpointError, OSError) as error:
        raise DataError(
            f"{url}: cannot be downloaded: {error}; check the URL, the credentials and the network"
        ) from error
    is_folder = root == remote
    return str(folder if is_folder else folder / remote.name)


def _find(remote: RemotePath) -> tuple[RemotePath, dict[str, tuple[int, float]]]:
    """Return the folder of the dataset's files, and {name in the folder: (size in bytes, modification time)}."""
    siblings = remote.parent.list_files()
    files = {
        name: siblings[name]
        for name in (remote.name, *(remote.name + suffix for suffix in SHARD_SUFFIXES))
        if name in siblings
    }
    if files and remote.name not in files and len(files) < len(SHARD_SUFFIXES):
        raise DataError(
            f"{remote}: only {next(iter(files))} exists, but a shard consists of a .bin and an .idx file; upload both"
        )
    if files:
        return remote.parent, files
    prefix = f"{remote.name}/"
    files = {name.removeprefix(prefix): state for name, state in siblings.items() if name.startswith(prefix)}
    if not files:
        names = sorted({name.split("/")[0] for name in siblings})
        raise DataError(
            f"{remote}: no such object or folder; {remote.parent} contains: {', '.join(names[:10]) or 'nothing'}"
        )
    return remote, files


def _download(remote: RemotePath, path: Path, size: int, modified: float) -> None:
    modified_seconds = int(modified)
    if path.is_file() and (path.stat().st_size, int(path.stat().st_mtime)) == (size, modified_seconds):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    received = 0
    with open(temporary, "wb") as file:
        for block in read_blocks(remote, size):
            file.write(block)
            received += len(block)
        file.flush()
        os.fsync(file.fileno())
    if received != size:
        raise DataError(f"{remote}: received {received:,} bytes, expected {size:,}; try again")
    os.utime(temporary, (modified_seconds, modified_seconds))
    os.replace(temporary, path)


def _remove_others(folder: Path, wanted: set[Path]) -> None:
    """Delete files that the object store no longer has."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()
