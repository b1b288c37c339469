# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders of steps that are there whole or not at all: temporary names, atomic renames, trash, leftovers.

Names in the root of a store:

    step_<N>                 a checkpoint; complete if it holds COMMIT, which is written last, before the rename
    step_<N>.tmp-<owner>     being written
    step_<N>.old-<owner>     was step_<N> until a second save of that step took its place; deleted right after
    step_<N>.trash-<owner>   being deleted

<owner> is <host>-<pid>-<start>-<random>: the process that made the name; <start> is the process's start time in the
kernel's ticks (0 where there is no /proc), so that a reused pid is not taken for the same process. Rule for leftovers:
a process of this host is asked for by pid and start; one of another host counts as dead once nothing in the folder
has changed for an hour. What belongs to a live process is left alone. Of the dead, .tmp and .trash are deleted; .old
is renamed back if its step is missing (the process died between two renames), else deleted.
"""

import contextlib
import functools
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import xxhash

from mesh_transformer.storage.digests import FileRecord
from mesh_transformer.storage.direct_io import DirectFile
from mesh_transformer.storage.paths import AnyPath

COMMIT = "COMMIT"
STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")
LEFTOVER = re.compile(rf"({STEP.pattern})\.(tmp|old|trash)-(.+)-([0-9]+)-([0-9]+)-[0-9a-f]+")
OTHER_HOST_SECONDS = 3600


class LocalBackend:
    """The root of a store, or a checkpoint in it, on this machine's file systems; objects.py has the other kind."""

    def __init__(self, path: Path):
        self.path = path

    def create(self) -> None:
        """Make it and the folders above it, durably."""
        make_root(self.path)

    def remove_leftovers(self) -> None:
        """Remove what dead processes left."""
        clean(self.path)

    def list_steps(self) -> dict[int, bool]:
        """Steps in it, ascending, and whether each is complete."""
        return list_steps(self.path)

    def free_bytes(self) -> int | None:
        """What can still be written."""
        return shutil.disk_usage(self.path).free if self.path.is_dir() else 0

    def staging_dir(self, step: int, owner: str) -> Path:
        """Where the checkpoint of `step` is written."""
        return temporary_folder(self.path, step, owner)

    def create_staging(self, step: int, owner: str) -> None:
        """Make the draft."""
        self.staging_dir(step, owner).mkdir()

    def commit(self, step: int, owner: str) -> None:
        """Give the complete draft its name."""
        publish(self.staging_dir(step, owner), self.path / f"step_{step}")

    def abort(self, step: int, owner: str) -> None:
        """Delete the draft as far as that is possible."""
        shutil.rmtree(self.staging_dir(step, owner), ignore_errors=True)

    def delete(self) -> None:
        """Delete the checkpoint."""
        discard(self.path)

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """Write new files, in that order, and make the folders they need."""
        for name, data in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(self.path / name, data)

    def remove_folder(self, name: str) -> None:
        """Delete a folder in it."""
        shutil.rmtree(self.path / name)

    def sync(self, *, deep: bool) -> None:
        """Make the names in it durable; with `deep` also those in the folders below."""
        sync_tree(self.path) if deep else sync_folder(self.path)

    def file_sizes(self, names: Iterable[str]) -> Iterator[int | str]:
        """The size of each file, or what is wrong with it where it is not a plain file in plain folders."""
        seen: dict[Path, bool] = {}

        def is_real(path: Path) -> bool:
            """No folder on the way from this one to there is a link."""
            if path not in seen:
                seen[path] = not path.is_symlink() and (path == self.path or is_real(path.parent))
            return seen[path]

        for path in (self.path / name for name in names):
            try:
                status = os.lstat(path)
            except OSError as error:
                yield f"missing ({error.strerror})"
                continue
            plain = stat.S_ISREG(status.st_mode) and is_real(path.parent)
            yield status.st_size if plain else "a link or not a plain file"

    def list_files(self) -> dict[str, tuple[int, float]]:
        """Size in bytes and time of change of every file below, by its name from here."""
        found = [(path, path.stat()) for path in sorted(self.path.rglob("*")) if path.is_file()]
        return {path.relative_to(self.path).as_posix(): (status.st_size, status.st_mtime) for path, status in found}

    def write_file(self, name: str, blocks: Iterable[bytes | memoryview]) -> FileRecord:
        """Write a file of blocks, one after the other; `settle` makes it durable."""
        digest, size = xxhash.xxh3_128(), 0
        with DirectFile(self.path / name) as file:
            for block in blocks:
                digest.update(block)
                size += file.write(block)
        return FileRecord(size, digest.hexdigest())

    def fsync_files(self, names: Iterable[str]) -> None:
        """Make what was put durable, but for the names; by who put it, for another host cannot."""
        for name in names:
            sync_file(self.path / name)


def step_folder(root: AnyPath, step: int) -> AnyPath:
    """Where the checkpoint of `step` lies."""
    return root / f"step_{step}"


def make_root(root: Path) -> None:
    """Make the root of a store and the folders above it, durably."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def list_steps(root: Path) -> dict[int, bool]:
    """Steps that have a folder, ascending, and whether each is complete. Links are not followed."""
    found = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root) as entries:
        for entry in entries:
            match = STEP.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                found[int(match[1])] = os.path.lexists(os.path.join(entry.path, COMMIT))
    return dict(sorted(found.items()))


def make_owner() -> str:
    """The part of a temporary name that says whose it is."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "host"
    return f"{host}-{os.getpid()}-{_start_ticks(os.getpid())}-{secrets.token_hex(4)}"


def temporary_folder(root: Path, step: int, owner: str) -> Path:
    """Where the checkpoint of `step` is written."""
    return root / f"step_{step}.tmp-{owner}"


def publish(temporary: Path, final: Path) -> None:
    """Give a complete folder its name; durable on return. An earlier folder of that name makes way and is deleted."""
    old = final.with_name(temporary.name.replace(".tmp-", ".old-", 1))
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that a half-deleted one is never taken for one."""
    trash = folder.with_name(f"{folder.name}.trash-{make_owner()}")
    os.rename(folder, trash)
    sync_folder(folder.parent)
    shutil.rmtree(trash)


def clean(root: Path) -> None:
    """Remove what dead processes left, by the rule above."""
    for path in sorted(root.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if not match or path.is_symlink():
            continue
        if is_alive(match[4], int(match[5]), int(match[6]), functools.partial(_last_change, path)):
            continue
        final = root / match[1]
        if match[3] == "old" and not final.exists() and (path / COMMIT).exists():
            with contextlib.suppress(FileNotFoundError):  # another process of the run was first
                os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)
    sync_folder(root)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file; its bytes are durable on return, its name once the folder is synced."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make the names in a folder and in every folder below it durable."""
    for folder, _, _ in os.walk(path, topdown=False):
        sync_folder(Path(folder))


def sync_file(path: Path) -> None:
    """Make what was written into a file durable."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _start_ticks(pid: int) -> int:
    """Start time of a process, 0 if unknown (field 22 of stat; the command before it may hold spaces)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_alive(host: str, pid: int, start: int, last_change: Callable[[], float]) -> bool:
    """Whether a process runs, or may run where it cannot be asked for."""
    if host != make_owner().rsplit("-", 3)[0]:
        return time.time() - last_change() < OTHER_HOST_SECONDS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process, but one that runs
        pass
    now = _start_ticks(pid)
    return 0 in (now, start) or now == start


def _last_change(path: Path) -> float:
    """Newest modification time in a tree; what vanishes meanwhile does not count."""
    newest = 0.0
    for folder, _, files in os.walk(path):
        for name in (".", *files):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, os.lstat(os.path.join(folder, name)).st_mtime)
    return newest
