# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Kills at random moments lose no committed checkpoint; leftovers of dead processes are removed, those of live ones stay."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.checkpoint import local_backend
from mesh_transformer.checkpoint.store import Store

KILLS = 15

# Imports once, then forks a child for each line it reads; a child saves in a loop until it is killed.
FORK_SERVER = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
import jax, numpy as np
from mesh_transformer.checkpoint import chunk_grid
from mesh_transformer.checkpoint.store import Store
chunk_grid.MAX_CHUNK_BYTES, chunk_grid.MAX_SHARD_BYTES = 1 << 14, 1 << 16
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid:
        print("pid", pid, flush=True)
        continue
    root = line.strip()
    store = Store(root)
    step = (store.latest() or 0) + 1
    while True:
        arrays = {"w": jax.numpy.arange(1 << 18) * step, "step": jax.numpy.int32(step)}
        store.save(step, arrays, axes={"w": ("embed",), "step": ()}, meta={"step": step})
        store.wait()
        with open(root + ".acknowledged", "a") as file:
            print(step, file=file)
        step += 1
"""


@pytest.fixture
def fork_server():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORK_SERVER], env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_at_any_moment(tmp_path, fork_server):
    root = tmp_path / "checkpoints"
    rng = random.Random(5)
    during_save = 0
    acknowledged = tmp_path / "checkpoints.acknowledged"
    acknowledged.write_text("")
    shape = {"w": jax.ShapeDtypeStruct((1 << 18,), jnp.int32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for name, a in shape.items()}
    for _ in range(KILLS):
        fork_server.stdin.write(f"{root}\n")
        fork_server.stdin.flush()
        words = fork_server.stdout.readline().split()
        assert words[0] == "pid"
        pid = int(words[1])
        before = len(acknowledged.read_text())
        deadline = time.monotonic() + 60
        while len(acknowledged.read_text()) == before:
            assert is_running(pid), "the child ended before it was killed"
            assert time.monotonic() < deadline, "the child saved nothing"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        while is_running(pid):
            time.sleep(0.002)
        reader = Store(root, writable=False)
        during_save += any(".tmp-" in path.name for path in root.iterdir())
        step = reader.latest()
        assert step >= int(acknowledged.read_text().split()[-1])
        assert [reader.verify(complete) for complete in reader.steps()] == [[]] * len(reader.steps())
        restored = reader.restore(step, like)
        np.testing.assert_array_equal(restored["w"], np.arange(1 << 18, dtype=np.int32) * step)
        assert int(restored["step"]) == reader.read_meta(step)["step"] == step
        Store(root)
        assert all(local_backend.STEP.fullmatch(path.name) for path in root.iterdir())
    assert during_save > KILLS // 4, "too few kills happened during a save, so the test is not conclusive"


def make(root, name, *, complete=True, age=0.0):
    folder = root / name
    (folder / "arrays").mkdir(parents=True)
    if complete:
        (folder / "COMMIT").write_text(json.dumps(name))
    for path in (folder / "COMMIT", folder / "arrays", folder):
        if path.exists():
            os.utime(path, (time.time() - age,) * 2)
    return folder


def test_leftovers(tmp_path):
    host, pid, start, _ = local_backend.make_owner().rsplit("-", 3)
    dead = f"{host}-{pid}-{int(start) + 1}-00"  # the pid is in use, but with another start time
    with subprocess.Popen(["sleep", "0"]) as gone:
        gone.wait()
    retained = [
        make(tmp_path, "step_1"),
        make(tmp_path, f"step_2.tmp-{local_backend.make_owner()}"),
        make(tmp_path, f"step_3.old-{local_backend.make_owner()}"),
        make(tmp_path, "step_4.tmp-other.host-1-1-00", age=3000),
        make(tmp_path, "step_5.tmp-notes"),  # does not match the pattern
        make(tmp_path, "best"),
    ]
    removed = [
        make(tmp_path, f"step_1.old-{dead}"),
        make(tmp_path, f"step_2.tmp-{dead}"),
        make(tmp_path, f"step_6.trash-{dead}"),
        make(tmp_path, f"step_6.tmp-{host}-{gone.pid}-{start}-00"),
        make(tmp_path, "step_4.tmp-other.host-1-1-01", age=4000),
        make(tmp_path, f"step_8.old-{dead}", complete=False),
    ]
    restored = make(tmp_path, f"step_9.old-{dead}")  # killed between two renames
    (tmp_path / f"step_10.tmp-{dead}").symlink_to(tmp_path / "best")
    Store(tmp_path, writable=False)
    assert all(path.exists() for path in [*retained, *removed, restored])
    store = Store(tmp_path)
    assert [path.exists() for path in retained] == [True] * len(retained)
    assert [path.exists() for path in removed] == [False] * len(removed)
    assert (tmp_path / "step_9/COMMIT").exists()
    assert (tmp_path / "best/COMMIT").exists()
    assert store.steps() == [1, 9]


@pytest.mark.parametrize(
    "name", ["step_01", "step_", "step_1x", "step_-1", "step_1.tmp-x", "step_1e3", "Step_1", "step_٣"]
)
def test_names_that_are_not_steps(tmp_path, name):
    make(tmp_path, name)
    assert local_backend.list_steps(tmp_path) == {}


def test_delete_renames_first(tmp_path, monkeypatch):
    folder = make(tmp_path, "step_3")
    monkeypatch.setattr(local_backend.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        local_backend.delete_folder(folder)
    assert local_backend.list_steps(tmp_path) == {}
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("step_3.trash-")
