# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Jobs side by side: results in order, few at a time, and none begun once one has failed."""

import functools
import threading

import pytest

from mesh_transformer.checkpoint.side_by_side import IN_FLIGHT, run_side_by_side


def test_results_come_in_order_and_few_are_ahead():
    begun, second_done = [], threading.Event()

    def job(i):
        begun.append(i)
        if i == 0:
            assert second_done.wait(10)  # the first ends last
        second_done.set() if i == 1 else None
        return i

    results = run_side_by_side(functools.partial(job, i) for i in range(20))
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
        list(run_side_by_side(functools.partial(job, i) for i in range(100)))
    assert len(begun) <= 3 + IN_FLIGHT
