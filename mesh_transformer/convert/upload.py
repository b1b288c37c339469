# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A proved result from this machine's disk to an object store, each object read back and compared, the marker last.

What makes a result complete is COMMIT in a checkpoint of ours, config.json in a model folder of transformers, meta.json
beside the original's shards: readers look for these first. While UPLOADING is there the rest is on its way; the same
call goes on with it, and an object that is there with the right size and digest is not put again.
"""

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.checkpoint.local_backend import COMMIT
from mesh_transformer.checkpoint.object_store_backend import RemoteFolder
from mesh_transformer.storage.digests import digest_file
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import RemotePath

UPLOADING = "UPLOADING"
MARKERS = ("config.json", "meta.json")  # in the folder itself, put in this order, and COMMIT wherever it is
UPLOADS = 2  # objects on their way at once
PART_BYTES = 1 << 24  # of an object, put at once

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


class Upload(NamedTuple):
    """What was done."""

    objects: int
    put: int  # of them; the others were there already
    nbytes: int  # of those that were put
    seconds: float  # with reading all of them back


def check_remote(destination: RemotePath, overwrite: bool) -> None:
    """CheckpointError if something is there that must stay, or nothing can be put there."""
    if len(destination.parts) < 2:
        raise CheckpointError(f"{destination}: name a folder in the bucket")
    folder = RemoteFolder(destination)
    found = folder.list_files()
    if found and UPLOADING not in found and not overwrite:
        raise CheckpointError(f"{destination} exists; choose another place or say --overwrite")
    folder.make()


def upload_folder(folder: Path, destination: RemotePath, progress: Progress, *, leave: Collection[str] = ()) -> Upload:
    """Put all files of `folder` but those to `leave`; what else was at the destination is deleted.

    CheckpointError names the object that did not get there.
    """
    start = time.perf_counter()
    target = RemoteFolder(destination)
    there = target.list_files()
    target.write({UPLOADING: b"not complete: an upload is going on, or was interrupted and can be called again\n"})
    target.delete(sorted(name for name in there if rank(name)))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in leave]
    total = 2 * sum((folder / name).stat().st_size for name in names)
    mover = _Mover(folder, destination, {name: size for name, (size, _) in there.items()}, progress, total)
    with ThreadPoolExecutor(UPLOADS) as movers:
        list(movers.map(mover.move, [name for name in names if not rank(name)]))
    target.delete(sorted(set(there) - set(names) - {UPLOADING}))
    for name in sorted(filter(rank, names), key=rank):
        mover.move(name)
    target.delete([UPLOADING])
    return Upload(len(names), mover.put, mover.nbytes, time.perf_counter() - start)


def rank(name: str) -> int:
    """Nothing for what is put in any order, else the place among the last."""
    if name.rpartition("/")[2] == COMMIT:
        return len(MARKERS) + 1
    return MARKERS.index(name) + 1 if name in MARKERS else 0


class _Mover:
    """Puts files and proves that they are there; from several threads."""

    def __init__(self, folder: Path, destination: RemotePath, sizes: dict[str, int], progress: Progress, total: int):
        self.folder, self.destination, self.sizes = folder, destination, sizes
        self.progress, self.total = progress, total
        self.put = self.nbytes = self.done = 0
        self._lock = threading.Lock()

    def move(self, name: str) -> None:
        """One file, unless the same is there already."""
        source, target = self.folder / name, self.destination / name
        wanted = digest_file(source)
        if self.sizes.get(name) == wanted.size and not rank(name) and digest_file(target, wanted.size) == wanted:
            self._tell(2 * wanted.size)
            return
        with target.reaching() as files:
            files.put_file(str(source), target.full_name, chunksize=PART_BYTES, callback=_make_callback(self._tell))
        with self._lock:
            self.put, self.nbytes = self.put + 1, self.nbytes + wanted.size
        if digest_file(target, wanted.size) != wanted:
            raise CheckpointError(f"{target}: what was read back is not what was put; call this again")
        self._tell(wanted.size)

    def _tell(self, count: int) -> None:
        with self._lock:
            self.done += count
            self.progress("uploading, reading back", min(self.done, self.total), self.total)


def _make_callback(tell: Callable[[int], None]) -> Any:
    """What fsspec tells of each part that was put."""
    import fsspec

    class Told(fsspec.Callback):
        def relative_update(self, inc: int = 1) -> None:
            tell(inc)

    return Told()
