# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: saved beside training, restored onto any mesh, found, verified, and thinned out.

A save goes through: slices copied to host (only this blocks training) -> files under a temporary name -> manifest ->
COMMIT -> everything synced -> rename -> older steps pruned. A kill at any moment leaves the earlier checkpoints as
they were and a temporary folder that the next writable Store removes. With several processes each has a Store, calls
the same methods in the same order, and writes what it owns; process 0 commits once all have written (commit.py).
"""

import json
from collections.abc import Callable, Collection, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np

from mesh_transformer.checkpoint import local_backend
from mesh_transformer.checkpoint.arrays import (
    StoredArray,
    copy_to_host,
    describe_array,
    restore_arrays,
)
from mesh_transformer.checkpoint.backends import backend_for
from mesh_transformer.checkpoint.commit import PendingSave, commit_save
from mesh_transformer.checkpoint.manifest import (
    ArrayRecord,
    Manifest,
    check_metadata,
    check_names,
    verify_digests,
    verify_sizes,
    read_manifest,
)
from mesh_transformer.distributed.coordination import RemoteFailure, run_on_all
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath, parse_path


class Store:
    """The checkpoints under `root`. One thread at a time may use a Store; several runs may read a root, one may save.

    A save in flight when the interpreter exits is finished first; its failure is then seen by nobody, so `wait` for it.
    """

    def __init__(
        self,
        root: str | AnyPath,
        keep_last: int = 2,
        keep_every: int | None = None,
        async_save: bool = True,
        *,
        writable: bool = True,
    ):
        """The newest `keep_last` steps stay, and for ever those divisible by `keep_every`. Leftovers are removed if `writable`."""
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise CheckpointError(f"keep_last = {keep_last}, keep_every = {keep_every}: both must be at least 1")
        self.root = parse_path(root).absolute()
        self.keep_last, self.keep_every, self.asynchronous, self.writable = (
            keep_last,
            keep_every,
            async_save,
            writable,
        )
        self._executor = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: futures.Future[None] | None = None
        self._held: set[int] = set()
        self._damaged: set[int] = set()
        if writable:
            run_on_all("open store", self._open, first_only=True)

    def save(
        self,
        step: int,
        arrays: Mapping[str, jax.Array],
        *,
        axes: Mapping[str, tuple[str, ...]],
        meta: Mapping[str, Any],
    ) -> None:
        """Save global arrays by name, with the logical axes of each and a JSON object `meta`.

        Returns when this process's slices are in host memory: the arrays may be donated next. If an earlier save is
        still being written this waits for it, and raises its failure instead of saving. A step that exists is replaced.
        """
        if not self.writable:
            raise CheckpointError(f"{self.root}: this store was opened for reading")
        self.wait()
        if type(step) is not int or not 0 <= step < 10**18:
            raise CheckpointError(f"step {step!r} is not a whole number from 0 to 10**18 - 1")
        if not arrays or arrays.keys() != axes.keys():
            raise CheckpointError(f"no arrays, or arrays and axes differ in: {sorted(arrays.keys() ^ axes.keys())}")
        check_names(arrays)
        records = {name: describe_array(name, array, axes[name]) for name, array in sorted(arrays.items())}
        try:
            plain = json.loads(json.dumps(meta))  # the caller's may change while this is written
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"meta of step {step} cannot be written as JSON: {error}") from error
        save = PendingSave(
            step, local_backend.make_owner(), records, copy_to_host({name: arrays[name] for name in records}), plain
        )
        self._held.add(step)
        if self.asynchronous:
            self._pending = self._executor.submit(self._finish, save)
        else:
            self._finish(save)

    def check(self) -> bool:
        """Whether nothing is being written; raises the failure of the last save if there is one by now; never waits."""
        if self._pending and self._pending.done():
            self.wait()
        return self._pending is None

    def wait(self) -> None:
        """Until no save is being written; raises CheckpointError, once, if the last one failed."""
        if self._pending:
            pending = self._pending
            futures.wait([pending])  # interrupted here, the save goes on and can be waited for again
            self._pending = None
            pending.result()

    def holds(self, step: int) -> bool:
        """Whether this Store has saved `step`, is saving it, or has restored it: saving it again would change nothing."""
        return step in self._held

    def steps(self) -> list[int]:
        """Complete checkpoints, ascending."""
        return [step for step, is_complete in backend_for(self.root).list_steps().items() if is_complete]

    def latest(self) -> int | None:
        """The newest step, None if there is no checkpoint at all; CheckpointError if the newest folder lacks COMMIT.

        Folders get their names when they are complete, so one without COMMIT has been tampered with; to take an older
        step, or to start over, is then for a person to decide (`newest_intact` is that decision).
        """
        found = backend_for(self.root).list_steps()
        newest = max(found, default=None)
        if newest is not None and not found[newest]:
            raise CheckpointError(
                f"{self.folder(newest) / local_backend.COMMIT}: missing; move the folder away to use an older step"
            )
        return newest

    def latest_valid(self, log: Callable[[str], None]) -> int | None:
        """The newest step whose every byte is as it was written; `report` is told what is wrong with each newer one.

        None if there is no checkpoint at all; CheckpointError if there are some and none is intact.
        """
        found = sorted(backend_for(self.root).list_steps(), reverse=True)
        for step in found:
            problems = self.verify(step)
            if not problems:
                return step
            self._damaged.add(step)
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            log(f"checkpoint {self.folder(step)} is damaged: {'; '.join(problems[:5])}{more}")
        if found:
            raise CheckpointError(
                f"{self.root}: none of the checkpoints {found} is intact; move them away to start over"
            )
        return None

    def restore(
        self, step: int, like: Mapping[str, Any], *, only: str = "", unstack: Collection[str] = ()
    ) -> dict[str, Any]:
        """Arrays by name as `like` says: shape, dtype and sharding of each (jax.ShapeDtypeStruct), on any mesh.

        `like` must name every array of the checkpoint whose name begins with `only`. Each device reads its own slice;
        every byte read is checked. Of arrays in `rows` each place of the first dim is an array of its own, in a tuple,
        where `like` says how one of them is sharded: they can be used as soon as they are read, with little else in
        memory. Raises CheckpointError for damage and with all names that differ.
        """
        folder = self.folder(step)
        records = self.read_manifest(step).arrays
        _check_match(folder, {name: record for name, record in records.items() if name.startswith(only)}, like, only)
        wanted = {name: records[name] for name in like}
        _check_files(folder, wanted)
        restored = restore_arrays(folder, wanted, {name: leaf.sharding for name, leaf in like.items()}, unstack=unstack)
        if len(wanted) == len(records):
            self._held.add(step)
        return restored

    def read_slice(self, step: int, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The values of one array at `index` in host memory, checked; CheckpointError if they are damaged."""
        record = self.read_manifest(step).arrays[name]
        _check_files(self.folder(step), {name: record})
        return StoredArray(self.folder(step), name, record).read(index)

    def open_arrays(self, step: int) -> dict[str, StoredArray]:
        """Every array, to be read a slice at a time; manifest and files are looked at now, and not again for each slice."""
        folder, records = self.folder(step), self.read_manifest(step).arrays
        _check_files(folder, records)
        return {name: StoredArray(folder, name, record) for name, record in records.items()}

    def read_manifest(self, step: int) -> Manifest:
        """All that a checkpoint holds but the values, checked."""
        return read_manifest(self.folder(step), step)

    def read_meta(self, step: int) -> dict[str, Any]:
        """What the caller of `save` gave as `meta`."""
        return dict(self.read_manifest(step).meta)

    def verify(self, step: int) -> list[str]:
        """Everything that is wrong with a checkpoint, each with its file; reads every byte, at the disk's speed."""
        try:
            manifest = self.read_manifest(step)
        except StorageError:
            raise
        except CheckpointError as error:
            return [str(error)]
        return verify_digests(self.folder(step), manifest.arrays)

    def prune(self) -> list[int]:
        """Delete steps that are neither among the newest `keep_last` nor divisible by `keep_every`; those deleted.

        Only steps up to the newest one that this Store saved or restored are looked at (newer ones belong to a course
        that was left), and of those, steps with missing files or known to be damaged do not count as kept.
        """
        self.wait()
        return self._prune(max(self._held or self.steps(), default=0))

    def folder(self, step: int) -> AnyPath:
        """Where the checkpoint of `step` lies, or would."""
        return local_backend.step_folder(self.root, step)

    def _open(self) -> None:
        try:
            backend_for(self.root).create()
            backend_for(self.root).remove_leftovers()
        except OSError as error:
            raise CheckpointError(f"{self.root}: cannot be used for checkpoints: {error}") from error

    def _prune(self, last: int) -> list[int]:
        steps = [step for step in self.steps() if step <= last]
        kept: list[int] = []
        for step in reversed(steps):
            if len(kept) < self.keep_last and step not in self._damaged and self._looks_intact(step):
                kept.append(step)
        if len(kept) < self.keep_last:
            return []
        gone = [step for step in steps if step < kept[-1] and not (self.keep_every and step % self.keep_every == 0)]
        for step in gone:
            backend_for(self.folder(step)).delete()
            self._held.discard(step)
        return gone

    def _looks_intact(self, step: int) -> bool:
        try:
            return not verify_sizes(self.folder(step), self.read_manifest(step).arrays)
        except StorageError:
            raise
        except CheckpointError:
            return False

    def _finish(self, save: PendingSave) -> None:
        """Commit and prune, in every process."""
        try:
            commit_save(self.root, save)
        except BaseException:
            self._held.discard(save.step)
            raise
        self._damaged.discard(save.step)
        try:
            run_on_all("prune", lambda: self._prune(save.step), first_only=True)
        except (OSError, StorageError, RemoteFailure) as error:
            raise CheckpointError(
                f"step {save.step} was saved, but older ones could not be deleted: {error}"
            ) from error


def find_checkpoint(path: str | AnyPath, *, log: Callable[[str], None] | None = None) -> tuple[Store, int]:
    """The checkpoint that `path` means, in a store opened for reading.

    `path` is a run folder (its checkpoints/), a folder of checkpoints, or one step's. Of several steps it is the newest,
    or with `report` the newest intact one (see Store.newest_intact). CheckpointError says what was found instead.
    """
    path = parse_path(path).absolute()
    if not path.is_dir():
        near = sorted(other.name for other in path.parent.iterdir() if other.is_dir()) if path.parent.is_dir() else []
        kind = "is not a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {kind}; {path.parent} holds the folders: {', '.join(near[:10]) or 'none'}")
    named = local_backend.STEP.fullmatch(path.resolve().name)
    if named and not (path / "checkpoints").is_dir():
        return Store(path.resolve().parent, writable=False), int(named[1])
    for root in (path / "checkpoints", path):
        store = Store(root, writable=False)
        step = store.latest_valid(log) if log else store.latest()
        if step is not None:
            return store, step
    entries = sorted(entry.name for entry in path.iterdir())
    more = " ..." if len(entries) > 10 else ""
    raise CheckpointError(
        f"{path}: no checkpoint in it (a run folder with checkpoints/step_<N>, a folder of step_<N>, or a step_<N> itself); "
        f"found: {', '.join(entries[:10]) or 'nothing'}{more}"
    )


def _check_match(folder: AnyPath, records: Mapping[str, ArrayRecord], like: Mapping[str, Any], only: str) -> None:
    """Raise CheckpointError with every array that is missing, unexpected, or of other shape or dtype."""
    problems = [f"missing in the checkpoint: {name}" for name in like if name not in records]
    scope = f' (names beginning with "{only}")' if only else ""
    problems += [f"unexpected in the checkpoint{scope}: {name}" for name in records if name not in like]
    for name, leaf in like.items():
        record = records.get(name)
        if record and (record.shape, record.dtype) != (tuple(leaf.shape), np.dtype(leaf.dtype).name):
            asked = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            problems.append(f"{name}: {record.dtype}{list(record.shape)} in the checkpoint, {asked} asked for")
        if leaf.sharding is None:
            problems.append(f"{name}: no sharding given")
    if problems:
        raise CheckpointError(f"{folder} does not hold what was asked for:\n  " + "\n  ".join(problems))


def _check_files(folder: AnyPath, records: Mapping[str, ArrayRecord]) -> None:
    """Raise CheckpointError for all that can be seen to be wrong without reading the values."""
    problems = verify_sizes(folder, records)
    if problems:
        raise CheckpointError("\n".join(problems.values()))
    check_metadata(folder, records)
