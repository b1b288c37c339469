# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Storage backend for local file systems: atomic commits by rename, and removal of leftovers.

Names in the root of a store:

    step_<N>                 a checkpoint; complete if it contains COMMIT, which is written last, before the rename
    step_<N>.tmp-<owner>     the staging folder of a save
    step_<N>.old-<owner>     the earlier step_<N> while a second save of that step replaces it; deleted right after
    step_<N>.trash-<owner>   a checkpoint that is being deleted

<owner> is <host>-<pid>-<start>-<random> of the process that made the name; <start> is the process's start time in the
kernel's ticks (0 without /proc), so that a reused pid is not mistaken for the same process. Rule for leftovers: a
process of this host is looked up by pid and start time; a process of another host is considered dead once nothing in
the folder has changed for an hour. Folders of live processes are left alone. Of dead processes, .tmp and .trash are
deleted; .old is renamed back if its step is missing (the process died between two renames), otherwise deleted.
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
OTHER_HOST_SECONDS = 3600  # without a change, until a process of another host is considered dead


class LocalBackend:
    """The root of a store, or a checkpoint in it, on a local file system; see also ObjectStoreBackend."""

    def __init__(self, path: Path):
        self.path = path

    def create(self) -> None:
        """Create the folder and its parents durably."""
        make_root(self.path)

    def remove_leftovers(self) -> None:
        """Remove folders of dead processes, by the rule in the module's documentation."""
        remove_leftovers(self.path)

    def list_steps(self) -> dict[int, bool]:
        """Return {step: whether it is complete}, ascending."""
        return list_steps(self.path)

    def free_bytes(self) -> int | None:
        """Return the free space of the file system in bytes; 0 if this folder does not exist."""
        return shutil.disk_usage(self.path).free if self.path.is_dir() else 0

    def staging_dir(self, step: int, owner: str) -> Path:
        """Return the path where the checkpoint of `step` is written before the commit."""
        return staging_folder(self.path, step, owner)

    def create_staging(self, step: int, owner: str) -> None:
        """Create the staging folder of a save."""
        self.staging_dir(step, owner).mkdir()

    def commit(self, step: int, owner: str) -> None:
        """Rename the complete staging folder to the checkpoint's final name."""
        commit_folder(self.staging_dir(step, owner), self.path / f"step_{step}")

    def abort(self, step: int, owner: str) -> None:
        """Delete the staging folder, ignoring errors."""
        shutil.rmtree(self.staging_dir(step, owner), ignore_errors=True)

    def delete(self) -> None:
        """Delete this checkpoint."""
        delete_folder(self.path)

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """Write new files in the given order, creating the folders they need."""
        for name, data in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(self.path / name, data)

    def remove_folder(self, name: str) -> None:
        """Delete a folder in this folder, with its content."""
        shutil.rmtree(self.path / name)

    def sync(self, *, deep: bool) -> None:
        """Make the names in this folder durable; with `deep` also those in all folders below it."""
        sync_tree(self.path) if deep else sync_folder(self.path)

    def file_sizes(self, names: Iterable[str]) -> Iterator[int | str]:
        """Yield the size of each file, or a problem: it is missing or unreadable, not a regular file, or reached through a link."""
        link_free: dict[Path, bool] = {}

        def has_no_links(path: Path) -> bool:
            if path not in link_free:
                link_free[path] = not path.is_symlink() and (path == self.path or has_no_links(path.parent))
            return link_free[path]

        for path in (self.path / name for name in names):
            try:
                status = os.lstat(path)
            except OSError as error:
                yield f"missing or unreadable ({error.strerror})"
                continue
            plain = stat.S_ISREG(status.st_mode) and has_no_links(path.parent)
            yield status.st_size if plain else "a link, or not a regular file"

    def list_files(self) -> dict[str, tuple[int, float]]:
        """Return {name relative to this folder: (size in bytes, modification time)} of every file below it."""
        files = [(path, path.stat()) for path in sorted(self.path.rglob("*")) if path.is_file()]
        return {path.relative_to(self.path).as_posix(): (status.st_size, status.st_mtime) for path, status in files}

    def write_file(self, name: str, blocks: Iterable[bytes | memoryview]) -> FileRecord:
        """Write a file from consecutive blocks; `fsync_files` makes it durable."""
        digest, size = xxhash.xxh3_128(), 0
        with DirectFile(self.path / name) as file:
            for block in blocks:
                digest.update(block)
                size += file.write(block)
        return FileRecord(size, digest.hexdigest())

    def fsync_files(self, names: Iterable[str]) -> None:
        """Make the content of files durable, but not their names; call this on the host that wrote the files."""
        for name in names:
            sync_file(self.path / name)


def step_folder(root: AnyPath, step: int) -> AnyPath:
    """Return the path of the checkpoint of `step`."""
    return root / f"step_{step}"


def make_root(root: Path) -> None:
    """Create the root of a store and its parents durably."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def list_steps(root: Path) -> dict[int, bool]:
    """Return {step: whether it is complete} for the folders in `root`, ascending; links are not followed."""
    steps = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root) as entries:
        for entry in entries:
            match = STEP.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                steps[int(match[1])] = os.path.lexists(os.path.join(entry.path, COMMIT))
    return dict(sorted(steps.items()))


def make_owner() -> str:
    """Return the suffix of temporary names that identifies this process."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "host"
    return f"{host}-{os.getpid()}-{_start_ticks(os.getpid())}-{secrets.token_hex(4)}"


def staging_folder(root: Path, step: int, owner: str) -> Path:
    """Return the path where the checkpoint of `step` is written before the commit."""
    return root / f"step_{step}.tmp-{owner}"


def commit_folder(staging: Path, final: Path) -> None:
    """Rename a complete folder to its final name durably; an earlier folder of that name is moved aside and deleted."""
    old = final.with_name(staging.name.replace(".tmp-", ".old-", 1))
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(staging, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a partly deleted folder is never taken for a checkpoint."""
    trash = folder.with_name(f"{folder.name}.trash-{make_owner()}")
    os.rename(folder, trash)
    sync_folder(folder.parent)
    shutil.rmtree(trash)


def remove_leftovers(root: Path) -> None:
    """Remove folders of dead processes, by the rule in the module's documentation."""
    for path in sorted(root.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if not match or path.is_symlink():
            continue
        if is_alive(match[4], int(match[5]), int(match[6]), functools.partial(_last_change, path)):
            continue
        final = root / match[1]
        if match[3] == "old" and not final.exists() and (path / COMMIT).exists():
            with contextlib.suppress(FileNotFoundError):  # another process of the run has renamed it
                os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)
    sync_folder(root)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file; its content is durable on return, its name after the folder is synced."""
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
    """Make the names in a folder and in all folders below it durable."""
    for folder, _, _ in os.walk(path, topdown=False):
        sync_folder(Path(folder))


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _start_ticks(pid: int) -> int:
    """Return a process's start time in ticks, 0 if unknown (field 22 of /proc/<pid>/stat; field 2 may contain spaces)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_alive(host: str, pid: int, start: int, last_change: Callable[[], float]) -> bool:
    """Return whether a process is running, or may be running on another host."""
    if host != make_owner().rsplit("-", 3)[0]:
        return time.time() - last_change() < OTHER_HOST_SECONDS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process exists and belongs to another user
        pass
    now = _start_ticks(pid)
    return 0 in (now, start) or now == start


def _last_change(path: Path) -> float:
    """Return the latest modification time in a tree, in seconds since 1970; files deleted during the walk are ignored."""
    latest = 0.0
    for folder, _, files in os.walk(path):
        for name in (".", *files):
            with contextlib.suppress(FileNotFoundError):
                latest = max(latest, os.lstat(os.path.join(folder, name)).st_mtime)
    return latest
