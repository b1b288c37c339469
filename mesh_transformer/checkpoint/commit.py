# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""From slices in host memory to a committed checkpoint, by one process or several.

Several processes write into one folder that all of them see: process 0 makes it, each writes the slices it owns and a
list of its files (parts/<process>.json), process 0 merges the lists into the manifest and commits. After each stage they
agree (agreement.py), so that all raise or none does. No device takes part in that: training may go on meanwhile.
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

from mesh_transformer.checkpoint.arrays import Piece, format_metadata, list_shards
from mesh_transformer.checkpoint.backends import backend_for
from mesh_transformer.checkpoint.bounded_pool import Workers, run_side_by_side
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
BLOCKS = "blocks"  # instead of an owner, of a checkpoint made block by block

Files = dict[str, FileRecord]  # by their names in the array's folder
Written = dict[str, Files]  # by array


@dataclasses.dataclass
class PendingSave:
    """A checkpoint on its way from host memory to disk."""

    step: int
    owner: str  # the part of the temporary name; that of process 0 in all processes, once they agree
    records: dict[str, ArrayRecord]
    slices: dict[str, list[Piece]]  # what this process owns; emptied while it is written
    meta: dict[str, Any]
    workers: Workers = dataclasses.field(default_factory=Workers)  # closed when it ends


def commit_save(root: AnyPath, save: PendingSave) -> None:
    """Write and commit; on return the checkpoint is durable. On CheckpointError nothing of it is left, nor of others lost."""
    folder = backend_for(root)
    written: Written = {}
    try:
        save.owner = gather("owner", save.owner)[0]
        run_on_all("begin", lambda: _begin(root, save), first_only=True)
        run_on_all("write", lambda: _write_slices(root, save, written))
        run_on_all("commit", lambda: _commit(root, save, written), first_only=True)
    except BaseException as error:
        save.slices.clear()
        if process_index() == 0:
            folder.abort(save.step, save.owner)
        if not isinstance(error, Exception):
            raise
        size = sum(record.nbytes for record in save.records.values())
        free = None
        with contextlib.suppress(OSError):  # where nothing can be looked at, the failure itself says enough
            free = folder.free_bytes()
        room = "" if free is None else f"; {free} are free there now"
        raise CheckpointError(
            f"step {save.step} was not saved in {root} ({size} bytes{room}): "
            f"{type(error).__name__}: {error}; earlier checkpoints are as they were"
        ) from error
    finally:
        save.workers.close()


def write_blocks(
    root: AnyPath,
    step: int,
    records: Mapping[str, ArrayRecord],
    blocks: Iterable[tuple[str, Callable[[AnyPath], Files]]],
    meta: Mapping[str, Any],
    done: Mapping[str, Files],
    log: Callable[[str, Files], None],
) -> None:
    """A checkpoint from blocks, each a file of an array or several; committed and durable on return.

    A block is an array's name and what writes files of it into the draft's folder (`write_piece`, `copy_file`). They are
    begun in their order, some at a time side by side.
    `log` hears of every block that is written, which a killed process does not undo and a power cut may. What it heard
    before an interruption is `done` the next time: those blocks must not come again. The folder's temporary name is
    always the same, so only one process may do this.
    """
    save = PendingSave(step, BLOCKS, dict(records), {}, dict(meta))
    draft = backend_for(root).staging_dir(step, save.owner)
    written: Written = {name: dict(done.get(name, {})) for name in records}

    def write(name: str, block: Callable[[AnyPath], Files]) -> tuple[str, Files]:
        return name, block(draft)

    with save.workers:
        if not draft.is_dir():
            _begin(root, save)
        for name, files in run_side_by_side((functools.partial(write, *block) for block in blocks), save.workers):
            written[name] |= files
            log(name, files)
        _settle(draft, written)
        _commit(root, save, written)


def write_piece(name: str, record: ArrayRecord, make: Callable[[], Piece], folder: AnyPath) -> Files:
    """Write the files of a slice, which is made now, into the checkpoint in `folder`."""
    return {key: file for _, key, file in (job() for job in list_shards(folder, name, record, [make()]))}


def _begin(root: AnyPath, save: PendingSave) -> None:
    backend_for(root).create_staging(save.step, save.owner)
    draft = backend_for(backend_for(root).staging_dir(save.step, save.owner))
    draft.write_files({f"{ARRAYS}/{name}/{METADATA}": format_metadata(record) for name, record in save.records.items()})


def _write_slices(root: AnyPath, save: PendingSave, written: Written) -> None:
    draft = backend_for(root).staging_dir(save.step, save.owner)
    if process_index() and not draft.is_dir():
        raise CheckpointError(
            f"{draft}: process 0 has made it, and process {process_index()} does not see it; run.dir must lie where "
            "all hosts see the same files, or in an object store"
        )
    written |= {name: {} for name in save.slices}
    names = list(save.slices)
    jobs = (list_shards(draft, name, save.records[name], save.slices.pop(name)) for name in names)
    for name, key, file in run_side_by_side(itertools.chain.from_iterable(jobs), save.workers):
        written[name][key] = file
    _settle(draft, written)
    if process_index() > 0:
        backend_for(draft).write_files({f"{PARTS}/{process_index()}.json": json.dumps(written).encode()})


def _settle(draft: AnyPath, written: Written) -> None:
    """Make the files that this process has written durable."""
    for name, files in written.items():
        backend_for(array_folder(draft, name)).fsync_files(files)


def _commit(root: AnyPath, save: PendingSave, written: Written) -> None:
    place = backend_for(root).staging_dir(save.step, save.owner)
    parts = [written]
    for process in range(1, process_count()):
        parts.append(json.loads((place / PARTS / f"{process}.json").read_bytes()))
    draft = backend_for(place)
    if len(parts) > 1:
        draft.remove_folder(PARTS)
    records = {name: _add_files(name, record, parts) for name, record in save.records.items()}
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    draft.sync(deep=True)
    write_manifest(place, Manifest(save.step, created, versions, records, save.meta))
    draft.sync(deep=False)
    backend_for(root).commit(save.step, save.owner)


def _add_files(name: str, record: ArrayRecord, parts: list[Written]) -> ArrayRecord:
    """The record with its files, whoever wrote them, in the order of their shards."""
    found = {key: FileRecord(*file) for part in parts for key, file in part[name].items()}
    expected = list(shard_keys(record.shape, record.shard))
    if found.keys() != set(expected):
        raise CheckpointError(f"array {name}: no process owns {sorted(set(expected) - found.keys())[:5]}")
    metadata = digest_bytes(format_metadata(record))
    return dataclasses.replace(record, files={METADATA: metadata, **{key: found[key] for key in expected}})
