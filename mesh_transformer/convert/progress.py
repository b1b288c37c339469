# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Progress of the stages of a conversion, in bytes."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], object]  # name of the stage, bytes done, bytes in total


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


class ByteCounter:
    """Counter that reports the bytes processed in one stage; safe to use from several threads."""

    def __init__(self, stage: str, total: int, report: Progress):
        self.stage = stage
        self.total = total
        self.done = 0
        self._report = report
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Add processed bytes and report the sum."""
        with self._lock:
            self.done += nbytes
            self._report(self.stage, min(self.done, self.total), self.total)


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Show a progress bar with bytes per second if stderr is a terminal, otherwise nothing."""
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = rich_progress.Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    tasks: dict[str, TaskID] = {}

    def update(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)

    with bar:
        yield update
