# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and runs on gs://: a real server that speaks Google Cloud Storage's language, and the faulty proxy.

What test_remote.py asks of object stores in general it asks of S3; here is what another protocol could break.
"""

import collections
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from faulty_proxy import run_proxy

from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.checkpoint.store import Store, find_checkpoint
from mesh_transformer.config import load_config
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.mesh import make_layout
from mesh_transformer.reports.metrics_log import read_metrics
from mesh_transformer.storage import paths
from mesh_transformer.storage.errors import StorageError
from mesh_transformer.storage.paths import parse_path
from mesh_transformer.train.session import train_config

pytest.importorskip("gcsfs", reason="needs gcsfs (the extra `remote`)")
pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator, a server for tests")

BUCKET = "bucket"


@pytest.fixture(scope="module")
def behind():
    """The port of a server of its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from gcp_storage_emulator.__main__ import main; main()"
    where = [f"--port={port}", "--host=127.0.0.1", "--in-memory", f"--default-bucket={BUCKET}"]
    with subprocess.Popen([sys.executable, "-c", program, "start", *where], stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL) as process:  # fmt: skip
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b/{BUCKET}").close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield port
        process.kill()


@pytest.fixture(scope="module")
def running_proxy(behind):
    with run_proxy(behind) as proxy:
        yield proxy


@pytest.fixture
def proxy(running_proxy, monkeypatch):
    running_proxy.reset()
    for name in paths.ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    address = f"http://127.0.0.1:{running_proxy.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # fsspec's word for it
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # and TensorStore's
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    return running_proxy


@pytest.fixture
def url(proxy, request):
    return f"gs://{BUCKET}/{re.sub('[^a-z]', '-', request.node.name)}"


@pytest.mark.usefixtures("small_files")
def test_restores_on_another_mesh(proxy, url, arrays, axes, shardings, like, digests, values):
    store = Store(f"{url}/checkpoints")
    store.save(3, arrays, axes=axes, meta={"loss": 1.5})
    store.wait()
    found, step = find_checkpoint(url)
    assert (str(found.root), step, found.steps()) == (f"{url}/checkpoints", 3, [3])
    restored = found.restore(3, like(shardings(1, 4, 2)))
    assert digests(restored) == digests(values)
    assert found.verify(3) == []
    assert not [name for name in ObjectStoreBackend(parse_path(url)).list_files() if "OWNER" in name]
    proxy.log.clear()
    index = (slice(63, 64), slice(0, 24))
    np.testing.assert_array_equal(found.read_slice(3, "params/embed/w", index), values["params/embed/w"][index])
    read = [entry for entry in proxy.log if re.search("embed(/|%2F)w(/|%2F)c", entry[1])]
    assert 0 < sum(entry[3] for entry in read) < values["params/embed/w"].nbytes / 4, "not by range"


@pytest.mark.usefixtures("small_files")
def test_a_flipped_byte_is_found_and_named(url, arrays, axes):
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


def test_faults_that_pass_lose_nothing(proxy, url, arrays, axes, like, shardings, digests, values, monkeypatch):
    monkeypatch.setattr(places, "FIRST_PAUSE", "5ms")
    paths._make_context.cache_clear()
    draw, met, last = np.random.default_rng(0), collections.Counter(), {}

    def fault(method, path):
        if last.get((method, path), 0) >= 2 or draw.random() > 0.1:
            last[method, path] = 0
            return None
        last[method, path] = last.get((method, path), 0) + 1
        kind = (503, 429, 500)[draw.integers(3)]
        met[kind] += 1
        return kind

    proxy.rule = fault
    store = Store(url)
    store.save(1, arrays, axes=axes, meta={})
    store.wait()
    assert digests(store.restore(1, like(shardings(2, 2, 2)))) == digests(values)
    assert set(met) == {503, 429, 500}
    proxy.reset()
    assert Store(url).steps() == [1]
    assert store.verify(1) == []
    paths._make_context.cache_clear()


def test_what_does_not_pass_is_one_clear_line(proxy, url):
    proxy.rule = lambda method, path: 403
    with pytest.raises(StorageError, match=rf"{url}.*permission denied"):
        Store(url)


def test_a_run_lives_in_the_store(proxy, url, tmp_path):
    """It goes on where it was, on this machine and on one that has never seen it."""
    ObjectStoreBackend(parse_path(url)).write_files({"texts/a.txt": " ".join(str(i) for i in range(900)).encode()})
    path = tmp_path / "tiny.toml"
    path.write_text(f"""
[run]
dir = "{url}/run"
[model]
n_layers = 1
d_model = 16
n_heads = 2
n_vocab = 264
seq_len = 16
[data.train.texts]
path = "{url}/texts"
[train]
steps = 3
batch_size = 2
log_every = 1
[checkpoint]
every = 2
""")

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
    assert not Path("gs:").exists()
