# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Large files written with O_DIRECT, bypassing the kernel's page cache.

Allocating, filling and writing back a page costs the kernel several times the cost of passing the bytes to the disk, and
pages that are not read again evict others. Normal writes are used if the file system does not support O_DIRECT, and for
the parts at either end that do not fill a block.
"""

import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.storage.positioned_file import PositionedFile

BLOCK = 4096  # a multiple of any disk's block; offsets, sizes and addresses of direct writes must be multiples of it
STAGING_BYTES = 1 << 20  # bytes per direct write; the staging buffer fits in a core's cache
MIN_DIRECT_BYTES = 1 << 16  # smaller writes are as fast through the page cache

_staging = threading.local()


class DirectFile(PositionedFile):
    """A file opened for writing; several threads may call `write_at` concurrently. Written data is durable after `sync`."""

    def __init__(self, path: Path, *, truncate: bool = True):
        """Open a file, creating it if it does not exist."""
        super().__init__()
        self._plain = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if truncate else 0), 0o666)
        try:
            self._direct = os.open(path, os.O_RDWR | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
        except OSError:  # not supported by the file system
            self._direct = None

    @property
    def size(self) -> int:
        return os.fstat(self._plain).st_size

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        size = self.write_at(data, self.position)
        self.position += size
        return size

    def write_at(self, data: Any, offset: int) -> int:
        """Write all of `data` at `offset`; return its size in bytes."""
        view = memoryview(data).cast("B")
        direct = self._direct
        if direct is None or len(view) < MIN_DIRECT_BYTES + BLOCK:
            _write_all(self._plain, view, offset)
            return len(view)
        first = -offset % BLOCK
        last = first + (len(view) - first) // BLOCK * BLOCK
        values = np.frombuffer(view, np.uint8)
        staging = _staging_buffer()
        _write_all(self._plain, view[:first], offset)
        for start in range(first, last, STAGING_BYTES):
            part = staging[: min(STAGING_BYTES, last - start)]
            np.copyto(part, values[start : start + len(part)])
            _write_all(direct, part.data, offset + start, fallback=self._plain)
        _write_all(self._plain, view[last:], offset + last)
        return len(view)

    def sync(self) -> None:
        """Make everything written so far durable."""
        os.fsync(self._plain)

    def close(self) -> None:
        """Close without syncing."""
        if not self.closed:
            os.close(self._plain)
            if self._direct is not None:
                os.close(self._direct)
        super().close()


def _staging_buffer() -> np.ndarray:
    """Return this thread's page-aligned staging buffer."""
    if not hasattr(_staging, "values"):
        _staging.values = np.frombuffer(mmap.mmap(-1, STAGING_BYTES), np.uint8)
    return _staging.values


def _write_all(descriptor: int, data: memoryview, offset: int, fallback: int | None = None) -> None:
    """Write `data` at `offset`; after a write that ended inside a block, continue with the descriptor `fallback`."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count
        if count % BLOCK and fallback is not None:
            descriptor = fallback
