# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and runs in object stores of both schemes: a real server behind a faulty proxy.

test_object_store_backend.py has the tests that need S3.
"""

import collections
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import write_tiny_run

from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.checkpoint.store import Store, find_checkpoint
from mesh_transformer.config import load_config
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.mesh import make_layout
from mesh_transformer.reports.metrics_log import read_metrics
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import parse_path
from mesh_transformer.train.session import train_config


@pytest.fixture(params=["s3", "gs"])
def scheme(request):
    return request.param


@pytest.fixture
def proxy(scheme, request):
    return request.getfixturevalue(f"{scheme}_proxy")


@pytest.fixture
def url(proxy, scheme, request):
    return f"{scheme}://bucket/{re.sub('[^a-z]', '-', request.node.name)}"


@pytest.mark.usefixtures("small_files")
def test_restores_on_another_mesh(proxy, url, arrays, axes, shardings, like, digests, values):
    store = Store(f"{url}/checkpoints")
    store.save(3, arrays, axes=axes, meta={"loss": float("nan")})
    assert store.holds(3)
    store.wait()
    found, step = find_checkpoint(url)
    assert (str(found.root), step, found.steps()) == (f"{url}/checkpoints", 3, [3])
    targets = shardings(1, 4, 2)
    restored = found.restore(3, like(targets))
    assert digests(restored) == digests(values)
    assert {a.sharding for a in restored.values()} == set(targets.values())
    assert found.verify(3) == []
    assert np.isnan(found.read_meta(3)["loss"])
    assert find_checkpoint(f"{url}/checkpoints/step_3")[1] == 3
    with pytest.raises(CheckpointError, match="opened for reading"):
        found.save(4, arrays, axes=axes, meta={})
    assert not [name for name in ObjectStoreBackend(parse_path(url)).list_files() if "OWNER" in name]
    proxy.log.clear()
    index = (slice(63, 64), slice(0, 24))
    np.testing.assert_array_equal(found.open_arrays(3)["params/embed/w"].read(index), values["params/embed/w"][index])
    read = [entry for entry in proxy.log if re.search("embed(/|%2F)w(/|%2F)c", entry[1])]
    assert 0 < sum(entry[3] for entry in read) < values["params/embed/w"].nbytes / 4, "the whole array was read"


@pytest.mark.usefixtures("small_files")
def test_a_flipped_byte_is_detected_and_named(url, arrays, axes):
    store = Store(url)
    store.save(1, arrays, axes=axes, meta={})
    store.wait()
    folder = ObjectStoreBackend(parse_path(url))
    name = next(name for name in folder.list_files() if "embed/w/c" in name)
    data = bytearray((parse_path(url) / name).read_bytes())
    data[len(data) // 2] ^= 1
    folder.write_files({name: bytes(data)})
    (problem,) = Store(url, writable=False).verify(1)
    assert name.split("/", 1)[1] in str(problem)


@pytest.mark.usefixtures("short_pauses")
def test_temporary_faults_are_retried(proxy, url, arrays, axes, like, shardings, digests, values):
    rng = np.random.default_rng(0)
    injected = collections.Counter()
    last = {}

    def fault(method, path):
        if last.get((method, path), 0) >= 2 or rng.random() > 0.1:
            last[method, path] = 0
            return None
        last[method, path] = last.get((method, path), 0) + 1
        kind = (503, 429, 500)[rng.integers(3)]
        injected[kind] += 1
        return kind

    proxy.rule = fault
    store = Store(url)
    store.save(1, arrays, axes=axes, meta={})
    store.wait()
    assert digests(store.restore(1, like(shardings(2, 2, 2)))) == digests(values)
    assert set(injected) == {503, 429, 500}
    proxy.reset()
    assert Store(url).steps() == [1]
    assert store.verify(1) == []


def test_a_permanent_fault_is_one_clear_line(proxy, url):
    proxy.rule = lambda method, path: 403
    with pytest.raises(StorageError, match=rf"{url}.*permission denied"):
        Store(url)


def test_a_run_resumes_in_the_store(scheme, url, tmp_path):
    """It resumes on the same machine and on another one."""
    ObjectStoreBackend(parse_path(url)).write_files({"texts/a.txt": " ".join(str(i) for i in range(900)).encode()})
    path = write_tiny_run(tmp_path / "tiny.toml", f"{url}/texts", f"{url}/run")

    def go(steps, cache):
        config = load_config(path, [f"train.steps={steps}", f'data.cache_dir="{tmp_path / cache}"'])
        assert str(train_config(config, make_layout(config.mesh, jax.devices()[:1]), StopRequest(()))) == f"{url}/run"
        (log,) = (tmp_path / cache / "runs").glob("*/run/metrics.jsonl")
        return [line["step"] for line in read_metrics(log) if line["kind"] == "train"]

    assert go(3, "here") == [1, 2, 3]
    assert go(4, "here") == [1, 2, 3, 4]
    assert go(5, "there") == [1, 2, 3, 4, 5]
    names = set(ObjectStoreBackend(parse_path(f"{url}/run")).list_files())
    assert {"metrics.jsonl", "report.html", "config.toml", "checkpoints/step_5/COMMIT"} <= names
    assert not [name for name in names if "OWNER" in name]
    assert not Path(f"{scheme}:").exists()
