# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Blocks of a checkpoint read, made and written several at a time, with a bound on how many are in memory."""

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, TypeVar

Result = TypeVar("Result")
IN_FLIGHT = 3  # one waits for the disk while two cores make others


class Workers(contextlib.AbstractContextManager["Workers"]):
    """IN_FLIGHT threads, until they are closed.

    Not a pool of the standard library's: those refuse jobs once the program's last line is done, and a save that goes on
    then must still end well. New threads are refused then, too, so that a save has its own made when it is asked for.
    """

    def __init__(self):
        self._jobs: queue.SimpleQueue[tuple[futures.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        for _ in range(IN_FLIGHT):
            threading.Thread(target=self._run, name="block").start()

    def submit(self, job: Callable[[], Result]) -> futures.Future[Result]:
        """Have a thread run the job."""
        future = futures.Future[Result]()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """The threads end after what was submitted."""
        for _ in range(IN_FLIGHT):
            self._jobs.put(None)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while (work := self._jobs.get()) is not None:
            future, job = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # it is raised where the result is taken
                    future.set_exception(error)
            del work, future, job  # what they hold is large


def run_side_by_side(jobs: Iterable[Callable[[], Result]], workers: Workers | None = None) -> Iterator[Result]:
    """What the jobs return, in their order; at most one more than IN_FLIGHT has begun and not been taken.

    Where one raises, or the taker stops, those that have begun end first and no other begins. `workers` stay open.
    """
    flying = collections.deque[futures.Future[Result]]()
    with contextlib.nullcontext(workers) if workers else Workers() as threads:
        try:
            for job in jobs:
                flying.append(threads.submit(job))
                if len(flying) > IN_FLIGHT:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            futures.wait([future for future in flying if not future.cancel()])
