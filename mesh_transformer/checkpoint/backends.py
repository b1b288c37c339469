# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a store does with the folders it lies in, whichever kind they are of."""

from pathlib import Path

from mesh_transformer.checkpoint.local_backend import LocalBackend
from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.storage.paths import AnyPath


def backend_for(path: AnyPath) -> LocalBackend | ObjectStoreBackend:
    """The folder at a place."""
    return LocalBackend(path) if isinstance(path, Path) else ObjectStoreBackend(path)
