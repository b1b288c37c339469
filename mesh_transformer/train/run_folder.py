# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The run folder: a local folder, or a folder of an object store with a local mirror.

Checkpoints are written to the object store directly. An object cannot grow line by line, so metrics, configuration and
report are written into the mirror, <cache_dir>/runs/<digest of the URL>/<name>/, and uploaded by a thread at every
checkpoint, every minute, and at the end. A run that resumes on another machine downloads them; on the same machine,
a mirrored file that continues the stored one is kept. An unreachable store is reported and retried, and does not stop
the run.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.config import Config
from mesh_transformer.distributed.coordination import process_index
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath, RemotePath, parse_path

UPLOAD_SECONDS = 60.0  # between two uploads without a request
CHECKPOINTS = "checkpoints"


class RunFolder:
    """The folder of a run, used as `with RunFolder(config, report) as folder:`.

    `location` is run.dir, and `path` is the local folder of its files: `location`, or the mirror of an object store.
    Only process 0 writes into `path`. `report` receives a message when the store cannot be reached.
    """

    def __init__(self, config: Config, report: Callable[[str], None]):
        self.location: AnyPath = parse_path(config.run.dir)
        self._report = report
        self._uploaded: dict[str, tuple[int, int]] = {}  # (size, modification time) of each uploaded file
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        if isinstance(self.location, Path):
            self.path = self.location
            return
        cache = Path(os.path.expanduser(config.data.cache_dir))
        digest = hashlib.sha256(str(self.location).encode()).hexdigest()[:16]
        self.path = cache / "runs" / digest / self.location.name

    @property
    def checkpoints(self) -> AnyPath:
        """Folder of the checkpoints."""
        return self.location / CHECKPOINTS

    def __enter__(self) -> "RunFolder":
        if isinstance(self.location, RemotePath) and process_index() == 0:
            store = ObjectStoreBackend(self.location)
            self._download(store)
            self._thread = threading.Thread(target=self._run, args=(store,), name="run folder", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._closing = True
            self._wake.set()
            self._thread.join()

    def request_upload(self) -> None:
        """Request an upload of changed files in the background."""
        self._wake.set()

    def _download(self, store: ObjectStoreBackend) -> None:
        """Copy the store's files into the mirror, except where the mirror's file continues them. Raises StorageError."""
        names = [path.name for path in store.path.iterdir() if path.is_file()]
        if not names:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        for name in names:
            data = (store.path / name).read_bytes()
            mirrored = self.path / name
            if not (mirrored.is_file() and mirrored.read_bytes().startswith(data)):
                mirrored.write_bytes(data)

    def _run(self, store: ObjectStoreBackend) -> None:
        is_failing = is_last = False
        while not is_last:
            self._wake.wait(UPLOAD_SECONDS)
            self._wake.clear()
            is_last = self._closing
            try:
                self._upload(store)
                is_failing = False
            except (CheckpointError, OSError) as error:
                if not is_failing or is_last:
                    advice = f"copy the files from {self.path}" if is_last else "the upload will be retried"
                    self._report(f"{error}; {advice}")
                is_failing = True

    def _upload(self, store: ObjectStoreBackend) -> None:
        """Upload the files that changed since the last upload."""
        for path in sorted(self.path.iterdir()):
            if path.is_file() and path.suffix != ".tmp":
                status = path.stat()
                version = (status.st_size, status.st_mtime_ns)
                if self._uploaded.get(path.name) != version:
                    store.write_files({path.name: path.read_bytes()})
                    self._uploaded[path.name] = version
