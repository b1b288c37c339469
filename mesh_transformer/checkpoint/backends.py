# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Selection of the storage backend for a path: local folder or object store."""

from pathlib import Path

from mesh_transformer.checkpoint.local_backend import LocalBackend
from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.storage.paths import AnyPath


def backend_for(path: AnyPath) -> LocalBackend | ObjectStoreBackend:
    """Return the backend of a folder, by the type of its path."""
    return LocalBackend(path) if isinstance(path, Path) else ObjectStoreBackend(path)
