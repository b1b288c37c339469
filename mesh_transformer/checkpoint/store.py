# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: saved while training goes on, committed by a rename, pruned, restored onto any mesh.

A save goes to `.tmp-step_<N>-<host>-<process>` and is renamed to `step_<N>` when everything in it is on disk, so a folder
of that name is whole. What a dead process left behind is removed when the store is opened; folders of live processes and
of other hosts are left alone for a day. One process writes: a run of several needs a commit they agree on.
"""

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from mesh_transformer.checkpoint.arrays import CheckpointError, HostArray, copy_to_host, read_arrays, write_array
from mesh_transformer.checkpoint.manifest import (
    ARRAYS,
    COMMIT,
    check_name,
    find_damage,
    read_manifest,
    sync_folder,
    write_manifest,
)

STEP = re.compile(r"step_(\d+)")
UNFINISHED = re.compile(r"\.(?:tmp|trash)-step_\d+-(?P<host>.+)-(?P<process>\d+)")


class Store:
    """Checkpoints below one folder. Raises CheckpointError, naming file or array, wherever something is not whole."""

    def __init__(
        self, root: Path | str, *, keep_last: int = 2, keep_every: int | None = None, asynchronous: bool = True
    ):
        if jax.process_count() > 1:
            raise CheckpointError(f"{root}: {jax.process_count()} processes; this store commits for one process only")
        self.root, self.keep_last, self.keep_every, self.asynchronous = Path(root), keep_last, keep_every, asynchronous
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._remove_unfinished()

    def save(
        self, step: int, arrays: Mapping[str, jax.Array], *, axes: Mapping[str, tuple[str, ...]], meta: Mapping[str, Any]
    ) -> None:
        """Commit the arrays as step `step`; returns when they are copied to the host, or written if not asynchronous.

        Waits for an earlier save. The step counts once `steps()` lists it; a failure is raised by the next call of
        save, check or wait, and leaves earlier checkpoints as they were.
        """
        self.wait()
        for name in arrays:
            check_name(name)
        if (self.root / f"step_{step}").exists():
            raise CheckpointError(f"{self.root}/step_{step} exists; checkpoints are not overwritten")
        copies = copy_to_host(arrays)
        described = {
            name: {"shape": list(array.shape), "dtype": array.dtype.name, "axes": list(axes[name])} for name, array in copies.items()
        }
        self._writer = threading.Thread(target=self._write_guarded, args=(step, copies, described, meta), name="checkpoint")
        self._writer.start()
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when no save is in flight; raise the failure of the last one."""
        if self._writer:
            self._writer.join()
            self._writer = None
        self.check()

    def check(self) -> None:
        """Raise the failure of the last save, if it has failed; never waits."""
        if self._failure:
            failure, self._failure = self._failure, None
            raise CheckpointError(
                f"{self.root}: saving failed: {failure}; free or repair the disk. Earlier checkpoints are intact"
            ) from failure

    def steps(self) -> list[int]:
        """Committed steps, in order."""
        if not self.root.is_dir():
            return []
        found = [(match, path) for path in self.root.iterdir() if (match := STEP.fullmatch(path.name))]
        return sorted(int(match[1]) for match, path in found if (path / COMMIT).is_file())

    def newest(self) -> int | None:
        """The last committed step, or None if there is none."""
        return max(self.steps(), default=None)

    def newest_intact(self, report: Callable[[str], None]) -> int | None:
        """The last step of which every byte is as written; `report` hears what is wrong with later ones.

        None if nothing was ever saved; CheckpointError if something was, and none of it is intact.
        """
        steps = self.steps()
        for step in reversed(steps):
            problems = self.verify(step)
            if not problems:
                return step
            report(f"step {step} is damaged, trying the one before: {problems[0]}")
        if steps:
            raise CheckpointError(f"{self.root}: all {len(steps)} checkpoints are damaged; start over with --fresh, or restore a copy")
        return None

    def verify(self, step: int) -> list[str]:
        """Everything that is wrong with a step, a line each, naming files; reads every byte."""
        try:
            return find_damage(self.folder(step), read_manifest(self.folder(step)))
        except CheckpointError as error:
            return [str(error)]

    def read_manifest(self, step: int) -> dict[str, Any]:
        """The proven manifest of a step."""
        return read_manifest(self.folder(step))

    def read_meta(self, step: int) -> dict[str, Any]:
        """What the writer gave as `meta`."""
        return self.read_manifest(step)["meta"]

    def restore(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool = False) -> dict[str, jax.Array]:
        """The arrays of a step on the shardings of `wanted`, each device reading its own slices.

        Names, shapes and types must be those saved (with `partial`, more may have been saved); all that differ are
        listed. Raises CheckpointError for damage, naming the array and file.
        """
        folder, manifest = self.folder(step), self.read_manifest(step)
        _compare(folder, manifest["arrays"], wanted, partial=partial)
        if problems := find_damage(folder, manifest, quick=True, names=set(wanted)):
            raise CheckpointError("\n".join(problems))
        try:
            return read_arrays(folder / ARRAYS, wanted)
        except CheckpointError as error:
            raise CheckpointError(f'{folder}: {error}; checkpoint.resume = "newest-intact" falls back to an earlier one') from error

    def folder(self, step: int) -> Path:
        """Where a step lies."""
        return self.root / f"step_{step}"

    def _write_guarded(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # raised again in the training thread, by check()
            self._failure = error

    def _write(self, step: int, copies: dict[str, HostArray], described: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        temporary = self.root / f".tmp-{_own_name(step)}"
        try:
            (temporary / ARRAYS).mkdir(parents=True)
            for name in list(copies):
                write_array(temporary / ARRAYS / name, copies.pop(name))  # host memory shrinks as it is written
            write_manifest(temporary, step, described, meta)
            os.rename(temporary, self.folder(step))
            sync_folder(self.root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune()

    def _prune(self) -> None:
        """Keep the last `keep_last` and every multiple of `keep_every`; a folder is renamed before it is deleted."""
        steps = self.steps()
        for step in steps[: -self.keep_last]:
            if not self.keep_every or step % self.keep_every:
                trash = self.root / f".trash-{_own_name(step)}"
                os.rename(self.folder(step), trash)
                shutil.rmtree(trash)

    def _remove_unfinished(self) -> None:
        for path in self.root.iterdir() if self.root.is_dir() else ():
            match = UNFINISHED.fullmatch(path.name)
            if match and _is_abandoned(path, match["host"], int(match["process"])):
                shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(path: Path | str) -> tuple[Store, int]:
    """The store and step that `path` means: a step's folder, a folder of checkpoints, or a run (its newest)."""
    path = Path(path)
    if match := STEP.fullmatch(path.name):
        store, step = Store(path.parent), int(match[1])
        if step not in store.steps():
            raise CheckpointError(f"{path}: no finished checkpoint; {path.parent} has steps {store.steps() or 'none'}")
        return store, step
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run folder such as runs/quickstart, or a step in its checkpoints/")
    store = Store(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    step = store.newest()
    if step is None:
        raise CheckpointError(f"{store.root}: no finished checkpoint here; it holds {sorted(os.listdir(store.root)) or 'nothing'}")
    return store, step


def _compare(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool) -> None:
    problems = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
    problems += [f"{name}: in the checkpoint, but not wanted" for name in saved if name not in wanted and not partial]
    for name, array in wanted.items():
        if name in saved and (tuple(saved[name]["shape"]), saved[name]["dtype"]) != (array.shape, array.dtype.name):
            there = f"{saved[name]['dtype']}{saved[name]['shape']}"
            problems.append(f"{name}: {there} in the checkpoint, {array.dtype.name}{list(array.shape)} wanted")
    if problems:
        raise CheckpointError(f"{folder} does not hold this state:\n  " + "\n  ".join(problems))


def _own_name(step: int) -> str:
    return f"step_{step}-{socket.gethostname()}-{os.getpid()}"


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    if host != socket.gethostname():
        return time.time() - path.stat().st_mtime > 86_400
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
