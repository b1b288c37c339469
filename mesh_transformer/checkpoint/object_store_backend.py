# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Steps in an object store, which has neither folders nor renames: a step is there while its COMMIT is.

    step_<N>/OWNER.<owner>   of a step that is being written: put first, deleted last; <owner> is as in folders.py
    step_<N>/...             a checkpoint's objects, written where they stay
    step_<N>/COMMIT          put last, in one piece as any object; deleted first

A step without COMMIT is a save that goes on or died, and no reader takes it for a checkpoint. Rule for leftovers: a
process of this host that OWNER names is asked for by pid and start; where there is no OWNER, or it is another host's,
the step counts as dead once its newest object is an hour old. What is dead is deleted by the next writable store.

A second save of a step deletes the first one before it begins, COMMIT first: if it fails, that step is gone, and the
others are as they were.
"""

import contextlib
import datetime
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorstore as ts

from mesh_transformer.checkpoint.local_backend import COMMIT, STEP, is_alive, make_owner
from mesh_transformer.storage.digests import FileRecord, digest_bytes
from mesh_transformer.storage.errors import StorageError
from mesh_transformer.storage.paths import RemotePath, kvstore_context, kvstore_spec

OWNER = "OWNER"
MARK = re.compile(rf"{OWNER}\.(.+)-([0-9]+)-([0-9]+)-[0-9a-f]+")


class ObjectStoreBackend:
    """The root of a store, or a checkpoint in it, in an object store; folders.py has the other kind."""

    def __init__(self, path: RemotePath):
        self.path = path

    def create(self) -> None:
        """Nothing is made, but that objects can be put here and deleted is tried, at the start and not at the first save."""
        probe = f"{OWNER}.{make_owner()}"
        self.write_files({probe: b"can this be written?\n"})
        self.delete_files([probe])

    def remove_leftovers(self) -> None:
        """Remove what dead processes left, by the rule above."""
        for step, is_complete in self._find_steps():
            if not is_complete:
                folder = ObjectStoreBackend(step)
                found = folder.list_files()
                if found and not _may_be_alive(found):
                    folder._delete_all(found)

    def list_steps(self) -> dict[int, bool]:
        """Complete steps, ascending; the others do not count as steps here."""
        return dict(sorted((int(path.name.removeprefix("step_")), True) for path, ok in self._find_steps() if ok))

    def free_bytes(self) -> int | None:
        """There is no end."""
        return None

    def staging_dir(self, step: int, owner: str) -> RemotePath:
        """Where the checkpoint of `step` is written, which is where it stays."""
        return self.path / f"step_{step}"

    def create_staging(self, step: int, owner: str) -> None:
        """Put the owner's mark and delete what was there."""
        folder = ObjectStoreBackend(self.staging_dir(step, owner))
        before = folder.list_files()
        folder.write_files({f"{OWNER}.{owner}": owner.encode()})
        folder._delete_all(before)

    def commit(self, step: int, owner: str) -> None:
        """COMMIT is there: take the mark away, which does no harm if it stays."""
        with contextlib.suppress(StorageError, RuntimeError):
            ObjectStoreBackend(self.staging_dir(step, owner)).delete_files([f"{OWNER}.{owner}"])

    def abort(self, step: int, owner: str) -> None:
        """Delete what was begun as far as that is possible; the rest is left to the next writable store."""
        folder = ObjectStoreBackend(self.staging_dir(step, owner))
        with contextlib.suppress(StorageError, RuntimeError):  # RuntimeError: the interpreter is about to exit
            found = folder.list_files()
            if f"{OWNER}.{owner}" in found:  # else what is there is an earlier save
                folder._delete_all(found)

    def delete(self) -> None:
        """Delete the checkpoint."""
        self._delete_all(self.list_files())

    def write_files(self, files: Mapping[str, bytes | None]) -> None:
        """Put objects, or delete those that are None, all at once; each is there whole or not at all."""
        with self.path.filesystem():
            store = _open_store(self.path)
            errors = [future.exception() for future in [store.write(name, data) for name, data in files.items()]]
            for error in filter(None, errors):  # all have ended by now
                raise error

    def remove_folder(self, name: str) -> None:
        """Delete a folder in it."""
        folder = ObjectStoreBackend(self.path / name)
        folder.delete_files(list(folder.list_files()))

    def sync(self, *, deep: bool) -> None:
        """An object that was put is durable."""

    def file_sizes(self, names: Iterable[str]) -> Iterator[int | str]:
        """The size of each object, or what is wrong with it; one listing for all."""
        found = self.list_files()
        return (found[name][0] if name in found else "missing (no such object)" for name in names)

    def write_file(self, name: str, blocks: Iterable[bytes | memoryview]) -> FileRecord:
        """Put an object of the blocks, one after the other."""
        data = b"".join(blocks)
        self.write_files({name: data})
        return digest_bytes(data)

    def fsync_files(self, names: Iterable[str]) -> None:
        """An object that was put is durable."""

    def list_files(self) -> dict[str, tuple[int, float]]:
        """Size in bytes and time of change of every object below, by its name from here."""
        with self.path.filesystem() as files:
            found = files.find(self.path.full_name, detail=True)
        start = len(self.path.full_name) + 1
        return {
            name[start:]: (entry["size"], _changed(entry))
            for name, entry in found.items()
            if name[start:] and entry["type"] == "file"
        }

    def delete_files(self, names: list[str]) -> None:
        """Delete objects, all at once; one that is gone already is no error."""
        self.write_files(dict.fromkeys(names))  # not in one request for all, of which what failed would not be known

    def _find_steps(self) -> list[tuple[RemotePath, bool]]:
        return [(path, (path / COMMIT).is_file()) for path in self.path.iterdir() if STEP.fullmatch(path.name)]

    def _delete_all(self, names: Iterable[str]) -> None:
        """COMMIT first and owners' marks last, so that what is half deleted is never taken for something else."""
        names = set(names)
        marks = {name for name in names if MARK.fullmatch(name)}
        for group in ({COMMIT} & names, names - marks - {COMMIT}, marks):
            self.delete_files(sorted(group))


def _open_store(path: RemotePath) -> Any:
    return ts.KvStore.open(kvstore_spec(path), context=kvstore_context()).result()


def _may_be_alive(found: Mapping[str, tuple[int, float]]) -> bool:
    newest = max(changed for _, changed in found.values())
    marks = [match for match in map(MARK.fullmatch, found) if match]
    owners = [(mark[1], int(mark[2]), int(mark[3])) for mark in marks] or [("", 0, 0)]
    return any(is_alive(*owner, lambda: newest) for owner in owners)


def _changed(entry: Mapping[str, Any]) -> float:
    """Seconds since 1970, by the store's clock; now, where the store does not say."""
    when = entry.get("LastModified") or entry.get("mtime")
    return when.timestamp() if isinstance(when, datetime.datetime) else time.time()
