# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: saved asynchronously, restored onto any mesh, found, verified and pruned.

Stages of a save: slices copied to host memory (the only stage that blocks training) -> files under a temporary name ->
manifest -> COMMIT -> sync -> rename -> older steps pruned. A kill at any moment leaves the earlier checkpoints unchanged
and a temporary folder that the next writable Store removes. With several processes, each process has a Store,
calls the same methods in the same order, and writes the slices that it owns; process 0 commits after all processes have
written (commit.py).
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
    DAMAGE_FIX,
    ArrayRecord,
    Manifest,
    check_metadata,
    check_names,
    read_manifest,
    verify_digests,
    verify_sizes,
)
from mesh_transformer.distributed.coordination import RemoteFailure, run_on_all
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath, describe_sibling_folders, parse_path


class Store:
    """The checkpoints under `root`. Only one thread may use a Store at a time. Several runs may read a root; only one may save.

    The interpreter finishes a pending save before it exits, but its failure is reported only by `wait`.
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
        """Open a store that retains the latest `keep_last` steps and all steps divisible by `keep_every`.

        A `writable` store creates `root` and removes leftovers of interrupted saves.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise CheckpointError(
                f"keep_last = {keep_last}, keep_every = {keep_every}: both must be at least 1; keep_every may also be None"
            )
        self.root = parse_path(root).absolute()
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.async_save = async_save
        self.writable = writable
        self._executor = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: futures.Future[None] | None = None
        self._current: set[int] = set()  # steps that this Store has saved, is saving, or has restored
        self._damaged: set[int] = set()  # steps in which `latest_valid` found damage
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

        Returns when this process's slices are in host memory; the arrays may then be donated. If an earlier save is
        pending, waits for it and raises its failure instead of saving. An existing checkpoint of the step is replaced.
        """
        if not self.writable:
            raise CheckpointError(f"{self.root}: this store was opened for reading; open it with writable=True to save")
        self.wait()
        if type(step) is not int or not 0 <= step < 10**18:
            raise CheckpointError(f"step is {step!r}; it must be an integer from 0 to 10**18 - 1")
        if not arrays or arrays.keys() != axes.keys():
            different = sorted(arrays.keys() ^ axes.keys())
            raise CheckpointError(
                f"save received {len(arrays)} arrays and the axes of {len(axes)}; `arrays` must not be empty and must have the "
                f"names of `axes`; names in only one of them: {different}"
            )
        check_names(arrays)
        records = {name: describe_array(name, array, axes[name]) for name, array in sorted(arrays.items())}
        try:
            meta_copy = json.loads(json.dumps(meta))  # the caller may change `meta` during the save
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"meta of step {step} cannot be written as JSON: {error}; it may contain only dictionaries with string keys, "
                "lists, strings, numbers, booleans and None"
            ) from error
        slices = copy_to_host({name: arrays[name] for name in records})
        save = PendingSave(step, local_backend.make_owner(), records, slices, meta_copy)
        self._current.add(step)
        if self.async_save:
            self._pending = self._executor.submit(self._finish, save)
        else:
            self._finish(save)

    def check(self) -> bool:
        """Return whether no save is pending, without waiting; raise the failure of the last save, once, if it failed."""
        if self._pending and self._pending.done():
            self.wait()
        return self._pending is None

    def wait(self) -> None:
        """Wait for the pending save; raise CheckpointError, once, if it failed."""
        if self._pending:
            pending = self._pending
            futures.wait([pending])  # if interrupted here, the save continues and can be waited for again
            self._pending = None
            pending.result()

    def holds(self, step: int) -> bool:
        """Return whether this Store has saved `step`, is saving it, or has restored it, so that saving it again is redundant."""
        return step in self._current

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        return [step for step, is_complete in backend_for(self.root).list_steps().items() if is_complete]

    def latest(self) -> int | None:
        """Return the latest step, None without checkpoints; raise CheckpointError if its folder lacks COMMIT.

        Folders are renamed to their final names when they are complete, so a folder without COMMIT was changed later. The
        user then decides whether to use an older step or to start over (`latest_valid` chooses an older step).
        """
        steps = backend_for(self.root).list_steps()
        step = max(steps, default=None)
        if step is not None and not steps[step]:
            raise CheckpointError(
                f"{self.folder(step) / local_backend.COMMIT}: missing, so the checkpoint is incomplete; move its folder away "
                "to use an older step"
            )
        return step

    def latest_valid(self, log: Callable[[str], None]) -> int | None:
        """Return the latest step whose every byte is verified; `log` receives the problems of each later step.

        Returns None without checkpoints; raises CheckpointError if there are checkpoints and none is valid.
        """
        steps = sorted(backend_for(self.root).list_steps(), reverse=True)
        for step in steps:
            problems = self.verify(step)
            if not problems:
                return step
            self._damaged.add(step)
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            log(f"checkpoint {self.folder(step)} is damaged and is not used: {'; '.join(problems[:5])}{more}")
        if steps:
            raise CheckpointError(
                f"{self.root}: none of the checkpoints {steps} is valid; move them away to start over"
            )
        return None

    def restore(
        self, step: int, like: Mapping[str, Any], *, only: str = "", unstack: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return arrays by name with the shape, dtype and sharding in `like` (jax.ShapeDtypeStruct), on any mesh.

        `like` must name every array of the checkpoint whose name begins with `only`. Each device reads its own slice;
        every byte read is checked. An array named in `unstack` becomes a tuple with one array per index of its first
        dimension, and `like` has the sharding that these arrays share; this avoids a copy of the whole stack. Raises
        CheckpointError if a file is damaged, or if names, shapes or dtypes differ; the message then lists all differences.
        """
        folder = self.folder(step)
        records = self.read_manifest(step).arrays
        _check_match(folder, {name: record for name, record in records.items() if name.startswith(only)}, like, only)
        requested = {name: records[name] for name in like}
        _check_files(folder, requested)
        restored = restore_arrays(
            folder, requested, {name: leaf.sharding for name, leaf in like.items()}, unstack=unstack
        )
        if len(requested) == len(records):
            self._current.add(step)
        return restored

    def open_arrays(self, step: int) -> dict[str, StoredArray]:
        """Return every array, to be read a slice at a time; manifest and file sizes are verified once, here."""
        folder, records = self.folder(step), self.read_manifest(step).arrays
        _check_files(folder, records)
        return {name: StoredArray(folder, name, record) for name, record in records.items()}

    def read_manifest(self, step: int) -> Manifest:
        """Return the verified manifest of a checkpoint."""
        return read_manifest(self.folder(step), step)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Return the `meta` that was passed to `save`."""
        return dict(self.read_manifest(step).meta)

    def verify(self, step: int) -> list[str]:
        """Return all problems of a checkpoint, each with its file; reads every byte."""
        try:
            manifest = self.read_manifest(step)
        except StorageError:
            raise
        except CheckpointError as error:
            return [str(error)]
        return verify_digests(self.folder(step), manifest.arrays)

    def prune(self) -> list[int]:
        """Delete and return the steps that are neither among the latest `keep_last` nor divisible by `keep_every`.

        Only steps up to the latest step that this Store saved or restored are considered (later steps belong to an
        abandoned branch of the run). Steps with missing files or known damage do not count toward `keep_last`.
        """
        self.wait()
        return self._prune(max(self._current or self.steps(), default=0))

    def folder(self, step: int) -> AnyPath:
        """Return the path of the checkpoint of `step`, which may not exist."""
        return local_backend.step_folder(self.root, step)

    def _open(self) -> None:
        try:
            backend_for(self.root).create()
            backend_for(self.root).remove_leftovers()
        except OSError as error:
            raise CheckpointError(
                f"{self.root}: cannot be used as a checkpoint folder: {error}; choose another folder, or change its permissions"
            ) from error

    def _prune(self, last: int) -> list[int]:
        steps = [step for step in self.steps() if step <= last]
        retained: list[int] = []
        for step in reversed(steps):
            if len(retained) < self.keep_last and step not in self._damaged and self._has_all_files(step):
                retained.append(step)
        if len(retained) < self.keep_last:
            return []
        pruned = [
            step for step in steps if step < retained[-1] and not (self.keep_every and step % self.keep_every == 0)
        ]
        for step in pruned:
            backend_for(self.folder(step)).delete()
            self._current.discard(step)
        return pruned

    def _has_all_files(self, step: int) -> bool:
        try:
            return not verify_sizes(self.folder(step), self.read_manifest(step).arrays)
        except StorageError:
            raise
        except CheckpointError:
            return False

    def _finish(self, save: PendingSave) -> None:
        """Commit a save and prune; called in every process."""
        try:
            commit_save(self.root, save)
        except BaseException:
            self._current.discard(save.step)
            raise
        self._damaged.discard(save.step)
        try:
            run_on_all("prune", lambda: self._prune(save.step), first_only=True)
        except (OSError, StorageError, RemoteFailure) as error:
            raise CheckpointError(
                f"step {save.step} was saved in {self.root}, but older checkpoints could not be deleted: {error}; the next "
                "save tries again"
            ) from error


def find_checkpoint(path: str | AnyPath, *, log: Callable[[str], None] | None = None) -> tuple[Store, int]:
    """Return the store, opened for reading, and the step of the checkpoint at `path`.

    `path` is a run folder (with checkpoints/), a folder of checkpoints, or the folder of one step. Of several steps the
    latest is returned; with `log`, the latest valid step (see Store.latest_valid). Raises CheckpointError if there is no
    checkpoint, with the names of the files that exist.
    """
    path = parse_path(path).absolute()
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {problem}; {describe_sibling_folders(path)}")
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
        f"{path}: contains no checkpoint, only: {', '.join(entries[:10]) or 'nothing'}{more}; give a run folder with "
        "checkpoints/step_<N>, a folder of step_<N>, or a step_<N> folder"
    )


def _check_match(folder: AnyPath, records: Mapping[str, ArrayRecord], like: Mapping[str, Any], only: str) -> None:
    """Raise CheckpointError with every array that is missing or unexpected, or whose shape or dtype differs."""
    problems = [f"missing in the checkpoint: {name}" for name in like if name not in records]
    scope = f' (names beginning with "{only}")' if only else ""
    problems += [f"unexpected in the checkpoint{scope}: {name}" for name in records if name not in like]
    for name, leaf in like.items():
        record = records.get(name)
        if record and (record.shape, record.dtype) != (tuple(leaf.shape), np.dtype(leaf.dtype).name):
            requested = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            problems.append(f"{name}: {record.dtype}{list(record.shape)} in the checkpoint, {requested} requested")
        if leaf.sharding is None:
            problems.append(f"{name}: no sharding given in the request")
    if problems:
        raise CheckpointError(
            f"{folder} does not match the requested arrays; request them as they were saved, with the same configuration:\n  "
            + "\n  ".join(problems)
        )


def _check_files(folder: AnyPath, records: Mapping[str, ArrayRecord]) -> None:
    """Raise CheckpointError with all problems that are visible without reading the values."""
    problems = verify_sizes(folder, records)
    if problems:
        raise CheckpointError("\n".join([*problems.values(), f"{folder} is damaged or incomplete; {DAMAGE_FIX}"]))
    check_metadata(folder, records)
