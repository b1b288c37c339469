# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The steps of a conversion around writing: check the destination, verify the result bit by bit, publish it.

A result is written to DST.partial and stays there until it is verified. A log of finished blocks in that folder lets a
conversion that was interrupted resume. A rename then publishes the result as DST. If DST is remote, the same is done in
a local staging folder, which is then uploaded (upload.py).
"""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import xxhash

from mesh_transformer.checkpoint import local_backend
from mesh_transformer.checkpoint.bounded_pool import run_bounded
from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.import_plan import WEIGHT_DTYPES, ImportPlan, target_dtype
from mesh_transformer.convert.lazy_arrays import to_c_order
from mesh_transformer.convert.progress import ByteCounter, Progress, no_progress
from mesh_transformer.convert.slicing import slices_of_bytes
from mesh_transformer.convert.upload import Upload, check_remote, upload_folder
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath, RemotePath
from mesh_transformer.storage.resume_log import LOG_FILE


def check_destination(destination: AnyPath, overwrite: bool, nbytes: int, staging: Path | None = None) -> None:
    """Raise CheckpointError if the destination exists without `overwrite`, or the disk has less than `nbytes` free."""
    partial = staging_folder(destination, staging)
    if isinstance(destination, RemotePath):
        check_remote(destination, overwrite)
    elif destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} exists; choose another destination or pass --overwrite")
    partial.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial.parent).free
    used = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file()) if partial.exists() else 0
    if free + used < nbytes * 1.01 + 10_000_000:
        raise CheckpointError(f"{partial.parent}: {free:,} bytes are free, about {nbytes:,} are needed")


def staging_folder(destination: AnyPath, staging: Path | None = None) -> Path:
    """Return the folder in which the result is written.

    It is next to a local destination. For a remote one it is in `staging`, by default the folder of temporary files.
    """
    if isinstance(destination, RemotePath):
        digest = xxhash.xxh3_64_hexdigest(str(destination).encode())
        return (staging or Path(tempfile.gettempdir())).absolute() / f"{destination.name}-{digest}.partial"
    return destination.with_name(destination.name + ".partial")


def verify_bits(source: ImportPlan, result: ImportPlan, dtype: str | None, progress: Progress) -> dict[str, str]:
    """Read every array of both checkpoints, compare them bit by bit and return the digest of each array.

    Source weights are cast to `dtype` unless it is None. CheckpointError if a bit differs.
    """
    if source.arrays.keys() != result.arrays.keys():
        different = sorted(source.arrays.keys() ^ result.arrays.keys())
        raise CheckpointError(f"the source and the result have different arrays: {different[:5]}")
    counter = ByteCounter("verifying", source.nbytes(dtype), progress)
    sources, results = source.values, result.values

    def compare(name: str, index: Slices) -> tuple[str, np.ndarray]:
        target = target_dtype(sources[name], name, dtype)
        expected = to_c_order(sources[name].read(index).astype(target, copy=False))
        found = to_c_order(results[name].read(index))
        if found.dtype == np.float32 != expected.dtype and expected.dtype.name in WEIGHT_DTYPES:
            expected = expected.astype(np.float32)  # the result sums arrays that were written in the narrower type
        if found.dtype != expected.dtype or not np.array_equal(_bits(found), _bits(expected)):
            raise CheckpointError(f"{name} at {index}: the result differs from the source; the result was deleted")
        return name, _bits(expected)

    digests = {name: xxhash.xxh3_128() for name in sources}
    blocks = (
        functools.partial(compare, name, index)
        for name, array in sources.items()
        for index in slices_of_bytes(array.shape, target_dtype(array, name, dtype).itemsize)
    )
    for name, values in run_bounded(blocks):
        digests[name].update(values.data)
        counter.add(values.nbytes)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _bits(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)


def publish(partial: Path, destination: AnyPath, progress: Progress = no_progress) -> Upload | None:
    """Rename a verified result to its destination, or upload it. What was at the destination before is deleted."""
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
    done = upload_folder(partial, destination, progress, exclude=(LOG_FILE,))
    shutil.rmtree(partial)
    return done
