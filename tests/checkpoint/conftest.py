# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A small state with every kind of array, sharded over a mesh and stored in many small files."""

import hashlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from faulty_proxy import Proxy, run_proxy
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.checkpoint import chunk_grid
from mesh_transformer.storage import paths

SPECS = {
    "params/embed/w": PartitionSpec(("fsdp", "tensor")),
    "params/layers/w_q": PartitionSpec(None, "fsdp", "tensor"),
    "params/layers/b": PartitionSpec(None, "tensor"),
    "opt_state/mu/embed/w": PartitionSpec("fsdp", "tensor"),
    "guard/window": PartitionSpec(),
}


def make_values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42], np.float32)
    odd = np.append(odd, np.array([0x7FC12345, 0xFFA00001], np.uint32).view(np.float32))  # NaNs that carry bits
    return {
        "params/embed/w": rng.standard_normal((64, 24), np.float32),
        "params/layers/w_q": rng.standard_normal((3, 16, 40), np.float32).astype(ml_dtypes.bfloat16),
        "params/layers/b": rng.standard_normal((3, 8), np.float32).astype(np.float16),
        "opt_state/mu/embed/w": np.zeros((64, 24), np.float32),
        "opt_state/count": np.array(41, np.int32),
        "guard/window": odd,
        "guard/seen": rng.random(7) < 0.5,
        "guard/key": rng.integers(0, 2**32, 2, np.uint32),
        "guard/none": np.zeros((0, 4), np.float32),
        "step": np.array(0, np.int32),
    }


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_grid, "MAX_CHUNK_BYTES", 256)
    monkeypatch.setattr(chunk_grid, "MAX_SHARD_BYTES", 1024)


@pytest.fixture(scope="session")
def values() -> dict[str, np.ndarray]:
    return make_values()


@pytest.fixture(scope="session")
def axes(values: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    return {name: ("layers", "embed", "heads")[: value.ndim] for name, value in values.items()}


@pytest.fixture(scope="session")
def shardings() -> Callable[..., dict[str, NamedSharding]]:
    """`shardings(data, fsdp, tensor)` returns the sharding of each array on a mesh of these sizes."""

    def make(*dims: int) -> dict[str, NamedSharding]:
        mesh = jax.make_mesh(
            dims,
            ("data", "fsdp", "tensor"),
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
            devices=jax.devices()[: int(np.prod(dims))],
        )
        return {name: NamedSharding(mesh, SPECS.get(name, PartitionSpec())) for name in make_values()}

    return make


@pytest.fixture(scope="session")
def arrays(values: Mapping[str, np.ndarray], shardings: Callable[..., Any]) -> dict[str, jax.Array]:
    targets = shardings(2, 2, 2)
    return {name: jax.device_put(value, targets[name]) for name, value in values.items()}


@pytest.fixture(scope="session")
def like(arrays: Mapping[str, jax.Array]) -> Callable[..., dict[str, jax.ShapeDtypeStruct]]:
    """`like(shardings)` returns the argument of `restore`."""

    def make(targets: Mapping[str, NamedSharding]) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=targets[name]) for name, a in arrays.items()}

    return make


@pytest.fixture(scope="session")
def digests() -> Callable[..., dict[str, str]]:
    """`digests(arrays)` is equal for two states if and only if all bits are."""
    return lambda arrays: {name: hashlib.sha256(np.asarray(a).tobytes()).hexdigest() for name, a in arrays.items()}


BUCKET = "bucket"
S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""
GS_SERVER = "from gcp_storage_emulator.__main__ import main; main()"


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Run an S3 server with a bucket in a subprocess; return its port."""
    boto3 = pytest.importorskip("boto3", reason="needs moto[server], which installs boto3")
    pytest.importorskip("moto", reason="needs moto[server], an S3 server for tests")
    pytest.importorskip("s3fs", reason="needs s3fs (the extra `remote`)")
    environment = {**os.environ, "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 26)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", S3_SERVER], env=environment, text=True, **pipes) as process:
        assert process.stdin
        assert process.stdout
        port = int(process.stdout.readline())
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
                              aws_access_key_id="a", aws_secret_access_key="b")  # fmt: skip
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield port
        process.stdin.close()
        process.wait(10)


@pytest.fixture(scope="session")
def gs_port() -> Iterator[int]:
    """Run a Google Cloud Storage server with a bucket in a subprocess; return its port."""
    pytest.importorskip("gcsfs", reason="needs gcsfs (the extra `remote`)")
    pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator, a server for tests")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["start", f"--port={port}", "--host=127.0.0.1", "--in-memory", f"--default-bucket={BUCKET}"]
    null = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-c", GS_SERVER, *flags], stdout=null, stderr=null) as process:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b/{BUCKET}").close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield port
        process.kill()


@pytest.fixture(scope="session")
def running_s3_proxy(s3_port: int) -> Iterator[Proxy]:
    with run_proxy(s3_port) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def running_gs_proxy(gs_port: int) -> Iterator[Proxy]:
    with run_proxy(gs_port) as proxy:
        yield proxy


@pytest.fixture
def no_store_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in paths.ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def s3_proxy(
    running_s3_proxy: Proxy, no_store_variables: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Proxy:
    """A proxy without a rule in front of the S3 server, to which s3:// URLs are directed."""
    running_s3_proxy.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running_s3_proxy.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "no-such-file"))
    return running_s3_proxy


@pytest.fixture
def gs_proxy(running_gs_proxy: Proxy, no_store_variables: None, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """A proxy without a rule in front of the Google Cloud Storage server, to which gs:// URLs are directed."""
    running_gs_proxy.reset()
    address = f"http://127.0.0.1:{running_gs_proxy.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # for fsspec
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # for TensorStore
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    return running_gs_proxy


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Retry failed requests after short pauses."""
    monkeypatch.setattr(paths, "FIRST_PAUSE", "5ms")
    paths._make_context.cache_clear()
    yield
    paths._make_context.cache_clear()
