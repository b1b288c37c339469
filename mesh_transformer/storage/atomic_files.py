# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Small files that are there whole or not at all, and logs that outlive a full disk."""

import os
import shutil
import sys
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` durably under a temporary name, then give it this one; OSError leaves what was there before.

    The temporary name is always the same: one process at a time may write a file, and what a killed one left is
    written over by the next.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def link_file(path: Path, new_path: Path) -> None:
    """Have a file under one more name, which must be free: a link, or a copy where the file system has none."""
    try:
        os.link(path, new_path)
    except OSError:
        shutil.copyfile(path, new_path)


class LineFile:
    """Appends lines to a file. What a full disk does not take waits in memory: a log must not end what it tells of."""

    def __init__(self, path: Path):
        """Go on behind the last whole line; what a crash cut short is removed."""
        self.path, self._unwritten = path, b""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            self._file.truncate(data.rfind(b"\n") + 1)

    def write(self, line: bytes, *, sync: bool = False) -> None:
        """Append a line, and what waits, with `sync` durably. Says on stderr when lines begin to wait, and stop."""
        was_behind, self._unwritten = bool(self._unwritten), self._unwritten + line + b"\n"
        failure = self.flush(sync=sync)
        if bool(failure) != was_behind:
            text = f"{failure.strerror}; lines wait in memory until they fit" if failure else "has all its lines again"
            print(f"{self.path}: {text}", file=sys.stderr, flush=True)

    def flush(self, *, sync: bool) -> OSError | None:
        """Write what waits, as far as the disk takes it; what stopped it."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]  # it may take a part
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Write what waits; OSError with what is lost if that cannot be done."""
        failure = self.flush(sync=True)
        self._file.close()
        if failure:
            raise OSError(failure.errno, f"{failure.strerror}: {len(self._unwritten)} bytes are lost", str(self.path))
