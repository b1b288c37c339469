# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Jobs side by side: results in order, few at a time, and none begun once one has failed."""

import contextlib
import functools
import os
import subprocess
import sys
import threading
import time

import pytest

from mesh_transformer.checkpoint.bounded_pool import IN_FLIGHT, run_bounded


def test_results_come_in_order_and_few_are_ahead():
    begun, second_done = [], threading.Event()

    def job(i):
        begun.append(i)
        if i == 0:
            assert second_done.wait(10)  # the first ends last
        second_done.set() if i == 1 else None
        return i

    results = run_bounded(functools.partial(job, i) for i in range(20))
    for i, result in enumerate(results):
        assert result == i
        assert max(begun) <= i + IN_FLIGHT


def test_after_a_failure_no_other_begins():
    begun = []

    def job(i):
        begun.append(i)
        if i == 2:
            raise OSError("disk")
        return i

    with pytest.raises(OSError, match="disk"):
        list(run_bounded(functools.partial(job, i) for i in range(100)))
    assert len(begun) <= 3 + IN_FLIGHT


def test_jobs_are_taken_after_the_programs_last_line():
    """As a save that is under way then needs; a pool of the standard library refuses them."""
    code = """
import threading, time
from mesh_transformer.checkpoint.bounded_pool import Workers, run_side_by_side
def save(workers):
    time.sleep(0.3)
    with workers:
        print(list(run_side_by_side([lambda i=i: i * i for i in range(9)], workers)), flush=True)
threading.Thread(target=save, args=(Workers(),)).start()
print("leaving", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (f"leaving\n{[i * i for i in range(9)]}\n", 0), done.stderr


def test_threads_end_with_the_jobs_or_the_first_failure():
    before = threading.active_count()
    for jobs in ([lambda: 1] * 5, [lambda: 1 // 0] * 5):
        with contextlib.suppress(ZeroDivisionError):
            list(run_bounded(jobs))
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before
