# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The run folder, wherever it is: on this machine, or in an object store with a mirror on this machine.

Checkpoints go to the store by themselves. What grows line by line cannot: metrics, configuration and report are written
into the mirror, <cache_dir>/runs/<digest of the URL>/<name>/, and put into the store by a thread at every checkpoint, every
minute, and at the end. A run that goes on elsewhere takes them from the store; on the same machine it goes on with the
mirror where that has only more lines. A store that cannot be reached is told, costs nothing, and is tried again.
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

PUT_SECONDS = 60.0
CHECKPOINTS = "checkpoints"


class RunFolder:
    """`with RunFolder(config, report) as folder:`; `place` is what the configuration names, `path` where files are written.

    Only process 0 writes into it. `report` is told of a store that cannot be reached.
    """

    def __init__(self, config: Config, report: Callable[[str], None]):
        self.location: AnyPath = parse_path(config.run.dir)
        self._report = report
        self._put: dict[str, tuple[int, int]] = {}  # size and time of change of each file that the store has
        self._wake, self._over = threading.Event(), False
        self._thread: threading.Thread | None = None
        if isinstance(self.location, Path):
            self.path = self.location
            return
        cache = Path(os.path.expanduser(config.data.cache_dir))
        digest = hashlib.sha256(str(self.location).encode()).hexdigest()[:16]
        self.path = cache / "runs" / digest / self.location.name

    @property
    def checkpoints(self) -> AnyPath:
        """Where the checkpoints are."""
        return self.location / CHECKPOINTS

    def __enter__(self) -> "RunFolder":
        if isinstance(self.location, RemotePath) and process_index() == 0:
            self._take(ObjectStoreBackend(self.location))
            self._thread = threading.Thread(
                target=self._run, args=(ObjectStoreBackend(self.location),), name="run folder", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._over = True
            self._wake.set()
            self._thread.join()

    def request_upload(self) -> None:
        """Have what is new put into the store; does not wait."""
        self._wake.set()

    def _take(self, store: ObjectStoreBackend) -> None:
        """Make the mirror what the store has, or keep it where it is the same and more. Raises StorageError."""
        names = [path.name for path in store.path.iterdir() if path.is_file()]
        if not names:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        for name in names:
            data, mirrored = (store.path / name).read_bytes(), self.path / name
            if not (mirrored.is_file() and mirrored.read_bytes().startswith(data)):
                mirrored.write_bytes(data)

    def _run(self, store: ObjectStoreBackend) -> None:
        is_failing = is_over = False
        while not is_over:
            self._wake.wait(PUT_SECONDS)
            self._wake.clear()
            is_over = self._over
            try:
                self._put_new(store)
                is_failing = False
            except (CheckpointError, OSError) as error:
                if not is_failing or is_over:
                    self._report(f"{error}; what is new is in {self.path} until then")
                is_failing = True

    def _put_new(self, store: ObjectStoreBackend) -> None:
        for path in sorted(self.path.iterdir()):
            if path.is_file() and path.suffix != ".tmp":
                status = path.stat()
                state = (status.st_size, status.st_mtime_ns)
                if self._put.get(path.name) != state:
                    store.write_files({path.name: path.read_bytes()})
                    self._put[path.name] = state
