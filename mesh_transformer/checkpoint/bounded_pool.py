# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Thread pool with a bound on the number of jobs whose results are in memory."""

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, TypeVar

Result = TypeVar("Result")
IN_FLIGHT = 3  # one job waits for the disk while two cores compute others


class Workers(contextlib.AbstractContextManager["Workers"]):
    """A pool of IN_FLIGHT threads, which run until `close`.

    Unlike concurrent.futures.ThreadPoolExecutor, it accepts jobs after the main thread has ended, so that a save that
    is still in progress can finish. Python cannot start threads then, so a save creates its pool in advance.
    """

    def __init__(self):
        self._jobs: queue.SimpleQueue[tuple[futures.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        for _ in range(IN_FLIGHT):
            threading.Thread(target=self._run, name="bounded pool").start()

    def submit(self, job: Callable[[], Result]) -> futures.Future[Result]:
        """Queue a job and return the future of its result."""
        future = futures.Future[Result]()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """End the threads once all submitted jobs are done."""
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
                except BaseException as error:  # raised again by future.result()
                    future.set_exception(error)
            del work, future, job  # free the large arrays that they may reference


def run_bounded(jobs: Iterable[Callable[[], Result]], workers: Workers | None = None) -> Iterator[Result]:
    """Run jobs concurrently and yield their results in order; at most IN_FLIGHT + 1 are started and not yet consumed.

    If a job raises or the consumer stops, no further job starts, and the started jobs are waited for. The pool `workers`
    is not closed; without it a temporary pool is used.
    """
    in_flight = collections.deque[futures.Future[Result]]()
    with contextlib.nullcontext(workers) if workers else Workers() as threads:
        try:
            for job in jobs:
                in_flight.append(threads.submit(job))
                if len(in_flight) > IN_FLIGHT:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            futures.wait([future for future in in_flight if not future.cancel()])
