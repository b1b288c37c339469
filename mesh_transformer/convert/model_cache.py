# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Cache of converted models, so that a model of any format can be used wherever a run is accepted.

The cache is the folder `models` in MESH_TRANSFORMER_CACHE, by default ~/.cache/mesh-transformer. An entry is identified by
names, sizes and modification times of the source's files, so a changed source is converted again. Entries can be deleted
at any time.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import mesh_transformer
from mesh_transformer.checkpoint.backends import backend_for
from mesh_transformer.checkpoint.local_backend import STEP
from mesh_transformer.checkpoint.store import Store, find_checkpoint
from mesh_transformer.config.schema import CACHE_DIR
from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.progress import show_progress
from mesh_transformer.convert.readers import NATIVE, detect_format
from mesh_transformer.convert.sources import find_source
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath, parse_path

CACHE = "MESH_TRANSFORMER_CACHE"  # environment variable


def find_model(name: str | AnyPath, *, log: Callable[[str], None] | None = None) -> tuple[Store, int]:
    """Return the store and the step of the model that `name` refers to; see `find_source` and `find_checkpoint`.

    A source that is not a native checkpoint is converted into the cache first, which `log` reports.
    Raises CheckpointError or ConfigError if the model is not found or cannot be converted.
    """
    try:
        found = find_checkpoint(name, log=log)
        path = parse_path(name)
        # `find_checkpoint` accepts every folder named step_N, a name that mesh-transformer-jax gives to its folders as well.
        if not STEP.fullmatch(path.name) or detect_format(path) == NATIVE:
            return found
        source = path
    except StorageError:  # the object store cannot be reached at present
        raise
    except CheckpointError:
        source = find_source(name)
        if detect_format(source) == NATIVE:
            raise
    return find_checkpoint(_converted(source, log), log=log)


def cache_folder() -> Path:
    """Return the folder of converted models."""
    return Path(os.environ.get(CACHE) or CACHE_DIR).expanduser() / "models"


def _converted(source: AnyPath, log: Callable[[str], None] | None) -> Path:
    """Return the folder of the converted source; processes of one host that need the same model wait for one conversion."""
    source = source.absolute()
    folder = cache_folder() / f"{source.name[:80]}-{_digest(source)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            if log:
                log(f"{source}: converting to a native checkpoint, once, in {folder}")
            with show_progress() as progress:
                # "own" because starting PyTorch would take longer than the conversion
                options = ConversionOptions(source=source, destination=folder, weights_only=True, verify="own")
                convert(options, progress)
        elif log:
            log(f"{source}: using the converted checkpoint in {folder}")
    return folder


def _digest(source: AnyPath) -> str:
    """Return a digest of names, sizes and modification times of the source's files, and of this package's version."""
    if isinstance(source, Path) and source.is_file():
        status = source.stat()
        files = [(source.name, status.st_size, status.st_mtime)]
    else:
        files = [(name, *status) for name, status in sorted(backend_for(source).list_files().items())]
    identity = json.dumps([mesh_transformer.__version__, str(source.resolve().name), files])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
