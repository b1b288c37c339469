# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Write and commit a checkpoint, from one process or several.

Several processes write into one folder that all of them see: process 0 creates it, each process writes the slices it
owns and a list of its files (parts/<process>.json), and process 0 merges the lists into the manifest and commits. After
each stage the processes exchange their status (distributed/coordination.py), so that either all of them raise or none. Devices
are not involved, so training may continue during a save.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from mesh_transformer.checkpoint.arrays import HostSlice, format_metadata, shard_jobs
from mesh_transformer.checkpoint.backends import backend_for
from mesh_transformer.checkpoint.bounded_pool import Workers, run_bounded
from mesh_transformer.checkpoint.chunk_grid import shard_keys
from mesh_transformer.checkpoint.manifest import (
    ARRAYS,
    METADATA,
    ArrayRecord,
    CheckpointError,
    Manifest,
    array_folder,
    write_manifest,
)
from mesh_transformer.distributed.coordination import gather, process_count, process_index, run_on_all
from mesh_transformer.storage.digests import FileRecord, digest_bytes
from mesh_transformer.storage.paths import AnyPath

PACKAGES = ("jax", "jaxlib", "numpy", "tensorstore")
PARTS = "parts"
RESUMABLE_OWNER = "blocks"  # replaces the owner in the temporary name of a checkpoint that another process may resume

Files = dict[str, FileRecord]  # by file name in the array's folder
Written = dict[str, Files]  # by array name


@dataclasses.dataclass
class PendingSave:
    """A checkpoint that is being written from host memory."""

    step: int
    owner: str  # suffix of the temporary name; all processes use the suffix that process 0 made
    records: dict[str, ArrayRecord]
    slices: dict[str, list[HostSlice]]  # owned by this process; emptied while they are written
    meta: dict[str, Any]
    workers: Workers = dataclasses.field(default_factory=Workers)  # closed when the save ends


def commit_save(root: AnyPath, save: PendingSave) -> None:
    """Write and commit a checkpoint durably; on failure remove it, leave earlier checkpoints unchanged, raise CheckpointError."""
    backend = backend_for(root)
    written: Written = {}
    try:
        save.owner = gather("owner", save.owner)[0]
        run_on_all("begin", lambda: _begin(root, save), first_only=True)
        run_on_all("write", lambda: _write_slices(root, save, written))
        run_on_all("commit", lambda: _commit(root, save, written), first_only=True)
    except BaseException as error:
        save.slices.clear()
        if process_index() == 0:
            backend.abort(save.step, save.owner)
        if not isinstance(error, Exception):
            raise
        nbytes = sum(record.nbytes for record in save.records.values())
        free = None
        with contextlib.suppress(OSError):  # the original error matters more than the free space
            free = backend.free_bytes()
        free_space = "" if free is None else f"; {free} bytes are free"
        raise CheckpointError(
            f"step {save.step} was not saved in {root} ({nbytes} bytes{free_space}): "
            f"{type(error).__name__}: {error}; earlier checkpoints are unchanged"
        ) from error
    finally:
        save.workers.close()


def write_checkpoint(
    root: AnyPath,
    step: int,
    records: Mapping[str, ArrayRecord],
    jobs: Iterable[tuple[str, Callable[[AnyPath], Files]]],
    meta: Mapping[str, Any],
    done: Mapping[str, Files],
    on_written: Callable[[str, Files], None],
) -> None:
    """Write a checkpoint from jobs that each write one or more files of an array, and commit it durably.

    A job is the name of an array and a function that writes files of it into the staging folder (`write_slice`,
    `copy_file`). Jobs start in order and run concurrently. `on_written` is called after each job, whose files survive a
    killed process but perhaps not a power failure. To resume an interrupted call, pass in `done` the files that
    `on_written` received, and leave out their jobs. The temporary name of the folder is fixed, so only one process at a
    time may write a step.
    """
    save = PendingSave(step, RESUMABLE_OWNER, dict(records), {}, dict(meta))
    staging = backend_for(root).staging_dir(step, save.owner)
    written: Written = {name: dict(done.get(name, {})) for name in records}

    def run(name: str, job: Callable[[AnyPath], Files]) -> tuple[str, Files]:
        return name, job(staging)

    with save.workers:
        if not staging.is_dir():
            _begin(root, save)
        for name, files in run_bounded((functools.partial(run, *job) for job in jobs), save.workers):
            written[name] |= files
            on_written(name, files)
        _fsync(staging, written)
        _commit(root, save, written)


def write_slice(name: str, record: ArrayRecord, make: Callable[[], HostSlice], folder: AnyPath) -> Files:
    """Compute a slice with `make` and write its files into the checkpoint in `folder`."""
    return {key: file for _, key, file in (job() for job in shard_jobs(folder, name, record, [make()]))}


def _begin(root: AnyPath, save: PendingSave) -> None:
    backend_for(root).create_staging(save.step, save.owner)
    staging = backend_for(backend_for(root).staging_dir(save.step, save.owner))
    staging.write_files(
        {f"{ARRAYS}/{name}/{METADATA}": format_metadata(record) for name, record in save.records.items()}
    )


def _write_slices(root: AnyPath, save: PendingSave, written: Written) -> None:
    staging = backend_for(root).staging_dir(save.step, save.owner)
    if process_index() and not staging.is_dir():
        raise CheckpointError(
            f"{staging}: process 0 created this folder, but process {process_index()} does not see it; set run.dir to a "
            "folder on a file system that all hosts share, or to an object store"
        )
    written |= {name: {} for name in save.slices}
    names = list(save.slices)
    jobs = (shard_jobs(staging, name, save.records[name], save.slices.pop(name)) for name in names)
    for name, key, file in run_bounded(itertools.chain.from_iterable(jobs), save.workers):
        written[name][key] = file
    _fsync(staging, written)
    if process_index() > 0:
        backend_for(staging).write_files({f"{PARTS}/{process_index()}.json": json.dumps(written).encode()})


def _fsync(staging: AnyPath, written: Written) -> None:
    """Make the files that this process has written durable."""
    for name, files in written.items():
        backend_for(array_folder(staging, name)).fsync_files(files)


def _commit(root: AnyPath, save: PendingSave, written: Written) -> None:
    folder = backend_for(root).staging_dir(save.step, save.owner)
    parts = [written]
    for process in range(1, process_count()):
        parts.append(json.loads((folder / PARTS / f"{process}.json").read_bytes()))
    staging = backend_for(folder)
    if len(parts) > 1:
        staging.remove_folder(PARTS)
    records = {name: _add_files(name, record, parts) for name, record in save.records.items()}
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    staging.sync(deep=True)
    write_manifest(folder, Manifest(save.step, created, versions, records, save.meta))
    staging.sync(deep=False)
    backend_for(root).commit(save.step, save.owner)


def _add_files(name: str, record: ArrayRecord, parts: list[Written]) -> ArrayRecord:
    """Return the record with the files that all processes wrote, in the order of their shards."""
    files = {key: FileRecord(*file) for part in parts for key, file in part[name].items()}
    expected = list(shard_keys(record.shape, record.shard))
    if files.keys() != set(expected):
        missing, extra = sorted(set(expected) - files.keys()), sorted(files.keys() - set(expected))
        raise CheckpointError(
            f"array {name}: files that no process wrote: {missing[:5]}; unexpected files: {extra[:5]}; all processes must "
            "call save with the same arrays and shardings"
        )
    metadata = digest_bytes(format_metadata(record))
    return dataclasses.replace(record, files={METADATA: metadata, **{key: files[key] for key in expected}})
