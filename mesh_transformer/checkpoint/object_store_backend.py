# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Storage backend for object stores, which have neither folders nor renames: a step exists while its COMMIT exists.

    step_<N>/OWNER.<owner>   marks a step that is being written: written first, deleted last; <owner> is as in
                             local_backend.py
    step_<N>/...             objects of a checkpoint, written under their final names
    step_<N>/COMMIT          written last, atomically as any object; deleted first

A step without COMMIT is a save that is in progress or was interrupted; readers do not take it for a checkpoint. Rule for
leftovers: a process of this host that OWNER names is looked up by pid and start time; if OWNER is missing or names another
host, the step is considered dead once its latest object is an hour old. The next writable Store deletes dead steps.

A second save of a step deletes the earlier checkpoint before it writes, COMMIT first: if the second save fails, this step is
lost, and other steps are unchanged.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorstore as ts

from mesh_transformer.checkpoint.local_backend import COMMIT, STEP, is_alive, make_owner
from mesh_transformer.storage.digests import FileRecord, digest_bytes
from mesh_transformer.storage.errors import StorageError
from mesh_transformer.storage.paths import RemotePath, kvstore_context, kvstore_spec

OWNER = "OWNER"
OWNER_MARKER = re.compile(rf"{OWNER}\.(.+)-([0-9]+)-([0-9]+)-[0-9a-f]+")


class ObjectStoreBackend:
    """The root of a store, or a checkpoint in it, in an object store; see also LocalBackend."""

    def __init__(self, path: RemotePath):
        self.path = path

    def create(self) -> None:
        """Check that objects can be written and deleted, so that a permission error appears at start-up, not at the first save."""
        probe = f"{OWNER}.{make_owner()}"
        self.write_files({probe: b"write test\n"})
        self.delete_files([probe])

    def remove_leftovers(self) -> None:
        """Delete steps of dead processes, by the rule in the module's documentation."""
        for step, is_complete in self._find_steps():
            if not is_complete:
                folder = ObjectStoreBackend(step)
                files = folder.list_files()
                if files and not _may_be_alive(files):
                    folder._delete_all(files)

    def list_steps(self) -> dict[int, bool]:
        """Return {step: True} of all complete steps, ascending; incomplete steps are omitted."""
        return dict(sorted((int(path.name.removeprefix("step_")), True) for path, ok in self._find_steps() if ok))

    def free_bytes(self) -> int | None:
        """Return None: object stores have no size limit."""
        return None

    def staging_dir(self, step: int, owner: str) -> RemotePath:
        """Return the path where the checkpoint of `step` is written, which is its final path."""
        return self.path / f"step_{step}"

    def create_staging(self, step: int, owner: str) -> None:
        """Write the owner marker and delete an earlier checkpoint of this step."""
        folder = ObjectStoreBackend(self.staging_dir(step, owner))
        before = folder.list_files()
        folder.write_files({f"{OWNER}.{owner}": owner.encode()})
        folder._delete_all(before)

    def commit(self, step: int, owner: str) -> None:
        """Delete the owner marker; COMMIT exists already, and a marker that remains is harmless."""
        with contextlib.suppress(StorageError, RuntimeError):
            ObjectStoreBackend(self.staging_dir(step, owner)).delete_files([f"{OWNER}.{owner}"])

    def abort(self, step: int, owner: str) -> None:
        """Delete the objects written so far, ignoring errors; the next writable Store deletes the rest."""
        folder = ObjectStoreBackend(self.staging_dir(step, owner))
        with contextlib.suppress(StorageError, RuntimeError):  # RuntimeError: the interpreter is about to exit
            files = folder.list_files()
            if f"{OWNER}.{owner}" in files:  # without the marker the objects belong to an earlier save
                folder._delete_all(files)

    def delete(self) -> None:
        """Delete this checkpoint."""
        self._delete_all(self.list_files())

    def write_files(self, files: Mapping[str, bytes | None]) -> None:
        """Write objects concurrently, each atomically; an object with content None is deleted."""
        with self.path.filesystem():
            store = _open_store(self.path)
            errors = [future.exception() for future in [store.write(name, data) for name, data in files.items()]]
            for error in filter(None, errors):  # raised after all requests have ended
                raise error

    def remove_folder(self, name: str) -> None:
        """Delete all objects below a name."""
        folder = ObjectStoreBackend(self.path / name)
        folder.delete_files(list(folder.list_files()))

    def sync(self, *, deep: bool) -> None:
        """Do nothing: objects are durable once written."""

    def file_sizes(self, names: Iterable[str]) -> Iterator[int | str]:
        """Yield the size of each object, or a problem if it is missing; all sizes come from one listing."""
        files = self.list_files()
        return (files[name][0] if name in files else "missing (no such object)" for name in names)

    def write_file(self, name: str, blocks: Iterable[bytes | memoryview]) -> FileRecord:
        """Write an object from consecutive blocks."""
        data = b"".join(blocks)
        self.write_files({name: data})
        return digest_bytes(data)

    def fsync_files(self, names: Iterable[str]) -> None:
        """Do nothing: objects are durable once written."""

    def list_files(self) -> dict[str, tuple[int, float]]:
        """Return {name relative to this folder: (size in bytes, modification time)} of every object below it."""
        return self.path.list_files()

    def delete_files(self, names: list[str]) -> None:
        """Delete objects concurrently; missing objects are ignored."""
        self.write_files(dict.fromkeys(names))  # the errors of a bulk request do not name the deletions that failed

    def _find_steps(self) -> list[tuple[RemotePath, bool]]:
        return [(path, (path / COMMIT).is_file()) for path in self.path.iterdir() if STEP.fullmatch(path.name)]

    def _delete_all(self, names: Iterable[str]) -> None:
        """Delete COMMIT first and owner markers last, so that a partly deleted step is never taken for a checkpoint."""
        names = set(names)
        markers = {name for name in names if OWNER_MARKER.fullmatch(name)}
        for group in ({COMMIT} & names, names - markers - {COMMIT}, markers):
            self.delete_files(sorted(group))


def _open_store(path: RemotePath) -> Any:
    return ts.KvStore.open(kvstore_spec(path), context=kvstore_context()).result()


def _may_be_alive(files: Mapping[str, tuple[int, float]]) -> bool:
    """Return whether a process that writes an incomplete step is running, or may be running on another host."""
    last_change = max(changed for _, changed in files.values())
    markers = [match for match in map(OWNER_MARKER.fullmatch, files) if match]
    owners = [(marker[1], int(marker[2]), int(marker[3])) for marker in markers] or [("", 0, 0)]
    return any(is_alive(*owner, lambda: last_change) for owner in owners)
