# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Blocks of a checkpoint read, made and written several at a time, with a bound on how many are in memory."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
IN_FLIGHT = 3  # one waits for the disk while two cores make others


def run_side_by_side(jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """What the jobs return, in their order; at most one more than IN_FLIGHT has begun and not been taken.

    Where one raises, or the taker stops, those that have begun end first and no other begins.
    """
    flying = collections.deque[Future[Result]]()
    workers = ThreadPoolExecutor(IN_FLIGHT)
    try:
        for job in jobs:
            flying.append(workers.submit(job))
            if len(flying) > IN_FLIGHT:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        workers.shutdown(cancel_futures=True)
