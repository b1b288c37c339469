# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Progress of the stages of a conversion, in bytes."""

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], object]  # name of the stage, bytes done, bytes in total


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


class ByteCounter:
    """Counts the bytes of one stage and reports them; can be used from several threads."""

    def __init__(self, stage: str, total: int, report: Progress):
        self.stage = stage
        self.total = total
        self.done = 0
        self._report = report
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count and report bytes that were processed."""
        with self._lock:
            self.done += nbytes
            self._report(self.stage, min(self.done, self.total), self.total)
