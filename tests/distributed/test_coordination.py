# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of coordination between processes; threads stand for the processes."""

import threading

import pytest

from mesh_transformer.config import MeshConfig
from mesh_transformer.distributed import coordination
from mesh_transformer.distributed.bootstrap import join_processes


def test_a_single_process_needs_no_service():
    with join_processes(MeshConfig()):
        assert coordination.gather("x", "value") == ["value"]
        assert coordination.broadcast_from_first("x", lambda: [1, None]) == [1, None]
        with pytest.raises(ZeroDivisionError):
            coordination.run_on_all("x", lambda: 1 / 0, first_only=True)
        assert coordination.StopConsensus().should_stop("why") == "why"


class KeyValueStore:
    """The key-value store of jax.distributed's service, for processes that are threads."""

    def __init__(self, monkeypatch, count):
        self.values = {}
        self.this_process = threading.local()
        monkeypatch.setattr(coordination, "process_count", lambda: count)
        monkeypatch.setattr(coordination, "process_index", lambda: self.this_process.index)
        monkeypatch.setattr(coordination, "set_key", self.values.__setitem__)
        monkeypatch.setattr(coordination, "get_keys", self.get_keys)

    def get_keys(self, folder):
        found = {}
        for key, value in list(self.values.items()):
            name, _, number = key.partition("/")
            if name == folder:
                found[int(number)] = value
        return found


@pytest.mark.parametrize("max_lead", [0, 1, 3])
def test_all_processes_stop_at_the_same_check(monkeypatch, max_lead):
    """However far one process is ahead of the others, while only a background thread answers requests."""
    count = 3
    requested_at = {1: 20, 2: 21}  # process -> the check at which it receives a request
    store = KeyValueStore(monkeypatch, count)
    stops = [coordination.StopConsensus() for _ in range(count)]
    passed = [0] * count
    reasons = {}
    moved = threading.Condition()
    ended = threading.Event()

    def train(index):
        store.this_process.index = index
        while True:
            is_requested = passed[index] + 1 >= requested_at.get(index, 1000)
            if reason := stops[index].should_stop("SIGTERM" if is_requested else ""):
                break
            with moved:
                passed[index] += 1
                moved.notify_all()
                # A step completes once every process has started it; `max_lead` steps may be in flight.
                assert moved.wait_for(lambda: min(passed) >= passed[index] - max_lead, 10), "deadlock"
        reasons[index] = reason

    def answer(index):
        store.this_process.index = index
        while not ended.wait(0.002 * (index + 1)):
            stops[index].poll()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count) for work in (train, answer)]
    for thread in threads:
        thread.start()
    for thread in threads[::2]:
        thread.join(30)
    ended.set()
    assert len(set(passed)) == 1
    assert 19 <= passed[0] < 1000
    assert [stop.agreed for stop in stops] == [True] * count
    assert set(reasons.values()) <= {"SIGTERM in process 1", "SIGTERM in process 2"}
