# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Atomic replacement of small files, and line logs that survive a full disk."""

import os
import shutil
import sys
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file atomically and durably; on OSError the previous content is unchanged.

    The temporary name is fixed, so only one process at a time may write a file; a file left by a killed process is
    overwritten.
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
    """Hard-link a file to a path that does not exist, or copy it if the file system does not support links."""
    try:
        os.link(path, new_path)
    except OSError:
        shutil.copyfile(path, new_path)


class LineFile:
    """A log file of lines; lines that do not fit on a full disk are buffered in memory, so that logging never fails."""

    def __init__(self, path: Path):
        """Open a file for appending; an incomplete last line, left by a crash, is removed."""
        self.path = path
        self._unwritten = b""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            self._file.truncate(data.rfind(b"\n") + 1)

    def write(self, line: bytes, *, sync: bool = False) -> None:
        """Append a line, durably if `sync`. Prints to stderr when buffering starts and when it ends."""
        was_buffering = bool(self._unwritten)
        self._unwritten += line + b"\n"
        failure = self.flush(sync=sync)
        if bool(failure) != was_buffering:
            text = (
                f"{failure.strerror}; buffering lines in memory until they can be written; free space on this disk"
                if failure
                else "all buffered lines are written"
            )
            print(f"{self.path}: {text}", file=sys.stderr, flush=True)

    def flush(self, *, sync: bool) -> OSError | None:
        """Write buffered lines as far as the disk allows; return the error that prevented the rest."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]  # writes may be partial
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Write buffered lines and close; raise OSError with the number of lost bytes if they cannot be written."""
        failure = self.flush(sync=True)
        self._file.close()
        if failure:
            raise OSError(
                failure.errno,
                f"{failure.strerror}: the last {len(self._unwritten)} bytes could not be written and are lost",
                str(self.path),
            )
