# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Destination of a conversion: check it, choose the staging folder for the result, and publish the result.

The result for a local destination DST is written to the staging folder DST.partial and stays there until it is verified. A
log of finished blocks in this folder lets an interrupted conversion resume. A rename then publishes the result as DST. The
result for a remote destination is written to a local staging folder, which is uploaded after verification (upload.py).
"""

import os
import shutil
import tempfile
from pathlib import Path

import xxhash

from mesh_transformer.checkpoint import local_backend
from mesh_transformer.convert.progress import Progress, no_progress
from mesh_transformer.convert.upload import Upload, check_remote, upload_folder
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath, RemotePath
from mesh_transformer.storage.resume_log import LOG_FILE


def check_destination(destination: AnyPath, overwrite: bool, nbytes: int, staging: Path | None = None) -> None:
    """Raise CheckpointError if the destination exists without `overwrite`, or the disk has less than `nbytes` free."""
    if isinstance(destination, RemotePath):
        check_remote(destination, overwrite)
    elif Path.cwd().is_relative_to(destination.resolve()):
        raise CheckpointError(f"{destination} is the current folder or contains it; choose another destination")
    elif destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; choose a folder as destination")
    elif destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} exists; choose another destination or pass --overwrite")
    partial = staging_folder(destination, staging)
    partial.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial.parent).free
    used = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file()) if partial.exists() else 0
    if free + used < nbytes * 1.01 + 10_000_000:
        fix = (
            "pass --staging with another folder"
            if isinstance(destination, RemotePath)
            else "choose another destination"
        )
        raise CheckpointError(
            f"{partial.parent}: {free:,} bytes are free, but the result needs about {nbytes:,}; free some space or {fix}"
        )


def staging_folder(destination: AnyPath, staging: Path | None = None) -> Path:
    """Return the folder in which the result is written.

    It is next to a local destination. For a remote destination it is in `staging`, by default the system's temporary folder.
    """
    if isinstance(destination, RemotePath):
        digest = xxhash.xxh3_64_hexdigest(str(destination).encode())
        return (staging or Path(tempfile.gettempdir())).absolute() / f"{destination.name}-{digest}.partial"
    return destination.with_name(destination.name + ".partial")


def publish(partial: Path, destination: AnyPath, progress: Progress = no_progress) -> Upload | None:
    """Rename a verified result to its destination, or upload it. An earlier folder at the destination is deleted."""
    if isinstance(destination, RemotePath):
        return _upload(partial, destination, progress)
    (partial / LOG_FILE).unlink(missing_ok=True)
    local_backend.sync_tree(partial)
    old = destination.with_name(destination.name + ".old")
    if destination.exists():
        os.rename(destination, old)
    os.rename(partial, destination)
    local_backend.sync_folder(destination.parent)
    if old.exists():
        shutil.rmtree(old)
    return None


def _upload(partial: Path, destination: RemotePath, progress: Progress) -> Upload:
    # The log stays until everything is uploaded, so that an interrupted upload resumes with the same files.
    upload = upload_folder(partial, destination, progress, exclude=(LOG_FILE,))
    shutil.rmtree(partial)
    return upload
