# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Runs of several real processes: killed, preempted, moved to another number of processes, and equal to one."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mesh_transformer.config import ConfigError, MeshConfig
from mesh_transformer.distributed import coordination
from mesh_transformer.distributed.bootstrap import Part, find_part, join_processes

ROOT = Path(__file__).parents[2]
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("config", "environment", "part"),
    [
        ({}, {}, None),
        ({"processes": 1}, SLURM, None),
        (dict(processes=2, process_id=1, coordinator="a:1"), {}, Part("a:1", 2, 1)),
        ({}, dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"), Part("a:1", 2, 0)),
        (dict(process_id=1), dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"), Part("a:1", 2, 1)),
        ({}, SLURM, Part(None, None, None)),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, Part(None, None, None)),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, Part(None, None, None)),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"processes": "auto"}, {}, Part(None, None, None)),
    ],
)  # fmt: skip
def test_who_this_is(config, environment, part):
    assert find_part(MeshConfig(**config), environment) == part


@pytest.mark.parametrize(
    ("config", "environment", "words"),
    [
        (dict(processes=2), {}, "mesh.processes = 2 needs mesh.coordinator too"),
        (dict(processes=2, coordinator="a:1"), {}, "needs mesh.process_id too"),
        (dict(processes=2, coordinator="a", process_id=0), {}, 'mesh.coordinator = "a" must be HOST:PORT'),
        (
            dict(processes=2, coordinator="a:1", process_id=2),
            {},
            "mesh.process_id = 2 must be below mesh.processes = 2",
        ),
        (dict(coordinator="a:1"), {}, "need mesh.processes too"),
        ({}, dict(JAX_NUM_PROCESSES="two"), "JAX_NUM_PROCESSES=two in the environment must be a number"),
    ],
)
def test_half_a_part_is_an_error(config, environment, words):
    with pytest.raises(ConfigError, match=words):
        find_part(MeshConfig(**config), environment)


def test_alone_nothing_is_sent():
    with join_processes(MeshConfig()):
        assert coordination.gather("x", "value") == ["value"]
        assert coordination.from_first("x", lambda: [1, None]) == [1, None]
        with pytest.raises(ZeroDivisionError):
            coordination.run_everywhere("x", lambda: 1 / 0, first=True)
        assert coordination.CommonStop().reached("why") == "why"


class Service:
    """The part of jax.distributed's service that a common stop needs, for processes that are threads."""

    def __init__(self, monkeypatch, count):
        self.values, self.me = {}, threading.local()
        monkeypatch.setattr(agreement, "process_count", lambda: count)
        monkeypatch.setattr(agreement, "process_index", lambda: self.me.index)
        monkeypatch.setattr(agreement, "publish", self.values.__setitem__)
        monkeypatch.setattr(agreement, "read", self.read)

    def read(self, folder):
        found = {}
        for key, value in list(self.values.items()):
            name, _, number = key.partition("/")
            if name == folder:
                found[int(number)] = value
        return found


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_all_stop_at_the_same_point(monkeypatch, ahead):
    """However far a process may be ahead of the others, and although nobody answers but a thread beside its steps."""
    count, asks = 3, {1: 20, 2: 21}  # who is asked, and at which point
    service = Service(monkeypatch, count)
    stops, passed, ended = [coordination.CommonStop() for _ in range(count)], [0] * count, {}
    moved, over = threading.Condition(), threading.Event()

    def train(index):
        service.me.index = index
        while not (reason := stops[index].reached("SIGTERM" if passed[index] + 1 >= asks.get(index, 1000) else "")):
            with moved:
                passed[index] += 1
                moved.notify_all()
                # A step ends only when all have begun it; so many may have been begun before one has ended.
                assert moved.wait_for(lambda: min(passed) >= passed[index] - ahead, 10), "a process waits for ever"
        ended[index] = reason

    def answer(index):
        service.me.index = index
        while not over.wait(0.002 * (index + 1)):
            stops[index].tick()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count) for work in (train, answer)]
    for thread in threads:
        thread.start()
    for thread in threads[::2]:
        thread.join(30)
    over.set()
    assert len(set(passed)) == 1
    assert 19 <= passed[0] < 1000
    assert [stop.agreed for stop in stops] == [True] * count
    assert set(ended.values()) <= {"SIGTERM in process 1", "SIGTERM in process 2"}


def test_killed_preempted_and_moved():
    """One process of two is killed, then one gets SIGTERM, then one process finishes alone on another mesh."""
    command = [sys.executable, ROOT / "scripts" / "prove_processes.py", "--json", "--trials", "1"]
    moves = ["--moves", "2:data=2,fsdp=2", "1:tensor=2,fsdp=2"]
    done = subprocess.run([*command, *moves], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert (report["kills"], report["others named the one killed"]) == (1, 1)
    assert report["seconds until the others had stopped, most"] < 60
    assert report["examples seen"] == 8 * report["steps"]
    assert report["examples seen twice"] == report["examples never seen"] == 0
    assert 0 < report["largest relative difference of losses"] < 1e-6
