# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Upload a verified result to an object store: each object is read back and compared; the marker file is uploaded last.

The marker file is the file that readers look for first: COMMIT of a native checkpoint, config.json of a Hugging Face model
folder, meta.json of a mesh-transformer-jax checkpoint. While the object UPLOADING exists, the upload is incomplete. A
second call resumes it: an object with the right size and digest is not uploaded again.
"""

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.checkpoint.local_backend import COMMIT
from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.convert.progress import ByteCounter, Progress
from mesh_transformer.storage.digests import digest_file
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import RemotePath

UPLOADING = "UPLOADING"
MARKERS = ("config.json", "meta.json")  # uploaded after the other files, in this order; COMMIT in any folder is last
CONCURRENT_UPLOADS = 2
PART_BYTES = 1 << 24  # of one request of a multi-part upload


class Upload(NamedTuple):
    """Statistics of a finished upload."""

    objects: int
    put: int  # objects uploaded by this call; the others existed already
    nbytes: int  # size of the objects uploaded by this call
    seconds: float  # including the time to read the objects back


def check_remote(destination: RemotePath, overwrite: bool) -> None:
    """Raise CheckpointError if the destination exists without `overwrite`, or cannot be written."""
    if len(destination.parts) < 2:
        raise CheckpointError(
            f"{destination}: a bucket is not a destination; add a folder, such as {destination}/model"
        )
    folder = ObjectStoreBackend(destination)
    existing = folder.list_files()
    if existing and UPLOADING not in existing and not overwrite:
        raise CheckpointError(f"{destination} exists; choose another destination or pass --overwrite")
    folder.create()


def upload_folder(
    folder: Path, destination: RemotePath, progress: Progress, *, exclude: Collection[str] = ()
) -> Upload:
    """Upload all files of `folder` except `exclude`, and delete all other objects at the destination.

    Raises CheckpointError, with the name of the object, if an upload fails.
    """
    start = time.perf_counter()
    target = ObjectStoreBackend(destination)
    existing = target.list_files()
    target.write_files({UPLOADING: b"incomplete: an upload is in progress, or was interrupted and can be resumed\n"})
    target.delete_files(sorted(name for name in existing if upload_order(name)))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in exclude]
    total = 2 * sum((folder / name).stat().st_size for name in names)
    counter = ByteCounter("uploading", total, progress)
    uploader = _Uploader(folder, destination, {name: size for name, (size, _) in existing.items()}, counter)
    with ThreadPoolExecutor(CONCURRENT_UPLOADS) as threads:
        list(threads.map(uploader.upload, [name for name in names if not upload_order(name)]))
    target.delete_files(sorted(set(existing) - set(names) - {UPLOADING}))
    for name in sorted(filter(upload_order, names), key=upload_order):
        uploader.upload(name)
    target.delete_files([UPLOADING])
    return Upload(len(names), uploader.put, uploader.nbytes, time.perf_counter() - start)


def upload_order(name: str) -> int:
    """Return the position of a marker file among the marker files, which are uploaded last; 0 for other files."""
    if name.rpartition("/")[2] == COMMIT:
        return len(MARKERS) + 1
    return MARKERS.index(name) + 1 if name in MARKERS else 0


class _Uploader:
    """Uploader that verifies each file by reading the object back; safe to use from several threads."""

    def __init__(self, folder: Path, destination: RemotePath, sizes: dict[str, int], counter: ByteCounter):
        self.folder = folder
        self.destination = destination
        self.sizes = sizes  # by name, of the objects that exist already
        self.counter = counter
        self.put = 0  # number of uploaded files
        self.nbytes = 0  # size of the uploaded files
        self._lock = threading.Lock()

    def upload(self, name: str) -> None:
        """Upload one file, unless an object with the same size and digest exists; marker files are always uploaded."""
        source, target = self.folder / name, self.destination / name
        expected = digest_file(source)
        has_same_size = self.sizes.get(name) == expected.size and not upload_order(name)
        if has_same_size and digest_file(target, expected.size) == expected:
            self.counter.add(2 * expected.size)
            return
        with target.filesystem() as files:
            callback = _make_callback(self.counter.add)
            files.put_file(str(source), target.full_name, chunksize=PART_BYTES, callback=callback)
        with self._lock:
            self.put += 1
            self.nbytes += expected.size
        if digest_file(target, expected.size) != expected:
            raise CheckpointError(
                f"{target}: the object read back differs from the uploaded file; run the command again"
            )
        self.counter.add(expected.size)


def _make_callback(report: Callable[[int], None]) -> Any:
    """Return an fsspec callback that reports the bytes of each uploaded part."""
    import fsspec

    class UploadProgress(fsspec.Callback):
        def relative_update(self, inc: int = 1) -> None:
            report(inc)

    return UploadProgress()
