# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a store does with the folders it lies in, whichever kind they are of."""

from pathlib import Path

from mesh_transformer.checkpoint.local_backend import LocalFolder
from mesh_transformer.checkpoint.object_store_backend import RemoteFolder
from mesh_transformer.storage.paths import Place


def folder_at(place: Place) -> LocalFolder | RemoteFolder:
    """The folder at a place."""
    return LocalFolder(place) if isinstance(place, Path) else RemoteFolder(place)
