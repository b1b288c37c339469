# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Base class of raw files that keep their position in Python."""

import abc
import io
import os


class PositionedFile(io.RawIOBase, abc.ABC):
    """A seekable raw file; subclasses read or write at `position` and advance it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Return the current size in bytes."""

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        match whence:
            case os.SEEK_SET:
                self.position = offset
            case os.SEEK_CUR:
                self.position += offset
            case os.SEEK_END:
                self.position = self.size + offset
            case _:
                raise ValueError(f"whence is {whence}; it must be os.SEEK_SET, os.SEEK_CUR or os.SEEK_END")
        return self.position
