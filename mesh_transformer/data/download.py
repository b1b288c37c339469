# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Sources in object stores: fetched once per host into the cache, each file whole or not at all, and again if it changed.

A source s3://bucket/path or gs://bucket/path is what a path of this machine can be: a file, a folder (all objects below
it), or the prefix of a shard. Its files lie in <cache_dir>/fetched/<digest of the URL>/ under their own names, with the
size and the time of change that the store gives them; by these a file is known to be the same.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.data.errors import DataError
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import RemotePath, read_blocks, parse_path

SHARD = (".bin", ".idx")


def is_remote(path: str) -> bool:
    """Whether a source's path is a URL."""
    return "://" in path


def download_dataset(url: str, cache_dir: str | Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """The path of this machine where the source at `url` lies now; DataError if it cannot be had. `report` gets bytes."""
    folder = Path(os.path.expanduser(cache_dir)) / "fetched" / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        place = parse_path(url.removesuffix(SHARD[0]).removesuffix(SHARD[1]))
        assert isinstance(place, RemotePath), "it has a scheme"
        with open(folder.with_name(folder.name + ".lock"), "w") as lock:  # the host's other processes wait
            fcntl.flock(lock, fcntl.LOCK_EX)
            root, files = _find(place)
            total = sum(size for size, _ in files.values())
            done = 0
            for name, (size, changed) in files.items():
                _fetch(root / name, folder / name, size, changed)
                done += size
                on_progress(done, total)
            _remove_others(folder, {folder / name for name in files})
    except (CheckpointError, OSError) as error:
        raise DataError(f"{url}: cannot be fetched: {error}") from error
    is_folder = root == place
    return str(folder if is_folder else folder / place.name)


def _find(place: RemotePath) -> tuple[RemotePath, dict[str, tuple[int, float]]]:
    """The folder of the source's files, and size and time of change of each by its name in it."""
    near = ObjectStoreBackend(place.parent).list_files()
    alone = {name: near[name] for name in (place.name, *(place.name + end for end in SHARD)) if name in near}
    if alone and place.name not in alone and len(alone) < len(SHARD):
        raise DataError(f"{place}: {next(iter(alone))} is there, but a shard is a pair of .bin and .idx")
    if alone:
        return place.parent, alone
    start = f"{place.name}/"
    below = {name.removeprefix(start): found for name, found in near.items() if name.startswith(start)}
    if not below:
        names = sorted({name.split("/")[0] for name in near})
        raise DataError(
            f"{place}: no such object or folder; {place.parent} holds: {', '.join(names[:10]) or 'nothing'}"
        )
    return place, below


def _fetch(place: RemotePath, path: Path, size: int, changed: float) -> None:
    when = int(changed)
    if path.is_file() and (path.stat().st_size, int(path.stat().st_mtime)) == (size, when):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    found = 0
    with open(temporary, "wb") as file:
        for block in read_blocks(place, size):
            file.write(block)
            found += len(block)
        file.flush()
        os.fsync(file.fileno())
    if found != size:
        raise DataError(f"{place}: {found:,} bytes came where the store has {size:,}; try again")
    os.utime(temporary, (when, when))
    os.replace(temporary, path)


def _remove_others(folder: Path, wanted: set[Path]) -> None:
    """What the store no longer has."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()
