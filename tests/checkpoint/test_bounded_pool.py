# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""run_bounded: results in order, bounded concurrency, and no new job after a failure."""

import contextlib
import functools
import os
import subprocess
import sys
import threading
import time

import pytest

from mesh_transformer.checkpoint.bounded_pool import IN_FLIGHT, run_bounded


def test_results_are_ordered_and_concurrency_is_bounded():
    started, second_done = [], threading.Event()

    def job(i):
        started.append(i)
        if i == 0:
            assert second_done.wait(10)  # the first job ends last
        second_done.set() if i == 1 else None
        return i

    results = run_bounded(functools.partial(job, i) for i in range(20))
    for i, result in enumerate(results):
        assert result == i
        assert max(started) <= i + IN_FLIGHT


def test_no_job_starts_after_a_failure():
    started = []

    def job(i):
        started.append(i)
        if i == 2:
            raise OSError("disk")
        return i

    with pytest.raises(OSError, match="disk"):
        list(run_bounded(functools.partial(job, i) for i in range(100)))
    assert len(started) <= 3 + IN_FLIGHT


def test_jobs_run_after_the_main_thread_has_ended():
    """A pending save needs this; a ThreadPoolExecutor rejects jobs then."""
    code = """
import threading, time
from mesh_transformer.checkpoint.bounded_pool import Workers, run_bounded
def save(workers):
    time.sleep(0.3)
    with workers:
        print(list(run_bounded([lambda i=i: i * i for i in range(9)], workers)), flush=True)
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
