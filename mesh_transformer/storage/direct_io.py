# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Large files written past the kernel's page cache.

A page that is made, filled and written back costs the kernel several times what it costs to hand bytes to the disk, and
pages that nobody reads again push out others. Where a file system has no such writes, or for what is no whole block of
it, the usual ones do.
"""

import io
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 4096  # a multiple of any disk's; offsets, sizes and addresses must be multiples of it
STAGING_BYTES = 1 << 20  # handed over at once; it stays in a core's cache
MIN_DIRECT_BYTES = 1 << 16  # below this the page cache is as good

_stages = threading.local()


class DirectFile(io.RawIOBase):
    """A file to write in; several threads may use `write_at` together. What was written is durable after `sync`."""

    def __init__(self, path: Path, *, truncate: bool = True):
        """It is made if it is not there, and emptied if it is, unless it is to stay as it was."""
        super().__init__()
        self._at = 0
        self._plain = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if truncate else 0), 0o666)
        try:
            self._direct = os.open(path, os.O_RDWR | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
        except OSError:  # the file system cannot
            self._direct = None

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where `write` goes on."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set where `write` goes on."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: os.fstat(self._plain).st_size}[whence]
        self._at = start + offset
        return self._at

    def write(self, data: Any, /) -> int:
        """All of it."""
        size = self.write_at(data, self._at)
        self._at += size
        return size

    def write_at(self, data: Any, offset: int) -> int:
        """All of it, at `offset`."""
        view, direct = memoryview(data).cast("B"), self._direct
        if direct is None or len(view) < MIN_DIRECT_BYTES + BLOCK:
            _write_all(self._plain, view, offset)
            return len(view)
        first = -offset % BLOCK
        last = first + (len(view) - first) // BLOCK * BLOCK
        values, stage = np.frombuffer(view, np.uint8), _find_stage()
        _write_all(self._plain, view[:first], offset)
        for start in range(first, last, STAGING_BYTES):
            part = stage[: min(STAGING_BYTES, last - start)]
            np.copyto(part, values[start : start + len(part)])
            _write_all(direct, part.data, offset + start, or_else=self._plain)
        _write_all(self._plain, view[last:], offset + last)
        return len(view)

    def sync(self) -> None:
        """Make all that was written durable."""
        os.fsync(self._plain)

    def close(self) -> None:
        """Without a sync."""
        if not self.closed:
            os.close(self._plain)
            if self._direct is not None:
                os.close(self._direct)
        super().close()


def _find_stage() -> np.ndarray:
    """This thread's memory to write from, which begins with a page."""
    if not hasattr(_stages, "values"):
        _stages.values = np.frombuffer(mmap.mmap(-1, STAGING_BYTES), np.uint8)
    return _stages.values


def _write_all(descriptor: int, data: memoryview, offset: int, or_else: int | None = None) -> None:
    """`or_else` takes over where a write ended inside a block."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
        if count % BLOCK and or_else is not None:
            descriptor = or_else
