# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Parsing of paths and URLs, explanations of store errors, and local reads; no object store is involved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.storage.errors import CheckpointError, explain_error
from mesh_transformer.storage.paths import RemotePath, kvstore_spec, map_bytes, parse_path, read_blocks


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("s3://bucket/run", ("bucket", "run")),
        ("s3://bucket/run/", ("bucket", "run")),
        ("s3://bucket", ("bucket",)),
        ("gs://a.b-c//run/step_1", ("a.b-c", "run", "step_1")),
    ],
)
def test_urls(text, parts):
    path = parse_path(text)
    assert isinstance(path, RemotePath)
    assert path.parts == parts
    assert parse_path(str(path)) == path
    child = path / "arrays/w"
    assert (str(child), child.name, child.parent.parent) == (f"{path}/arrays/w", "w", path)
    assert str(child.relative_to(path)) == "arrays/w"
    assert child.with_name("v") == path / "arrays" / "v"


@pytest.mark.parametrize("text", ["runs/a", "/runs/a", "s3", "C:file"])
def test_local_paths(text):
    assert parse_path(text) == Path(text)


@pytest.mark.parametrize("text", ["http://host/run", "s3://", "gs:///", "hdfs://a/b", "s3://bucket/../other"])
def test_unsupported_urls(text):
    with pytest.raises(CheckpointError, match=r"unsupported URL|contains \. or \.\."):
        parse_path(text)


def test_a_url_converted_to_a_local_path_is_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="a URL was converted to a local path"):
        Store(Path("s3://bucket/run") / "checkpoints")
    assert not list(tmp_path.iterdir())


def test_kvstore_spec(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    path = parse_path("s3://bucket/run/a")
    assert kvstore_spec(path) == {"driver": "s3", "bucket": "bucket", "path": "run/a/"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert kvstore_spec(path)["endpoint"] == "http://127.0.0.1:9"
    assert kvstore_spec(path)["aws_region"] == "us-east-1"
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert kvstore_spec(path)["aws_region"] == "eu-north-1"
    assert kvstore_spec(parse_path("gs://bucket")) == {"driver": "gcs", "bucket": "bucket", "path": ""}


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (PermissionError("Access Denied"), "permission denied"),
        (ValueError("PERMISSION_DENIED: InvalidAccessKeyId"), "permission denied"),
        (
            OSError(5, "An error occurred (503) when calling the PutObject operation"),
            "the object store returned an error",
        ),
        (ValueError('UNAVAILABLE: CURL error[52] reading "http://h/bucket/x"'), "cannot connect"),
        (ConnectionResetError(104, "Connection reset by peer"), "cannot connect"),
        (FileNotFoundError("The specified bucket does not exist"), "no such bucket: bucket"),
        (FileNotFoundError("bucket/run/Timeout/c.503.0"), None),
        (ValueError('DATA_LOSS: digest mismatch in "bucket/run/Connect/c.403.0"'), None),
    ],
)
def test_explain_error(error, meaning):
    found = explain_error("s3://bucket/run", error)
    assert found is None if meaning is None else meaning in found
    assert explain_error("/bucket/run", error) is None


def test_local_reads(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    assert b"".join(bytes(block) for block in read_blocks(path)) == bytes(range(100))
    assert bytes(map_bytes(path, 10, 20)) == bytes(range(10, 20))
    for stop in (101, 10**6):
        with pytest.raises(
            ValueError, match=f"truncated: the file has 100 bytes, but an array in it ends at byte {stop:,}"
        ):
            map_bytes(path, 90, stop)
    with pytest.raises(ValueError, match="truncated"):
        map_bytes(path, 200, 300)


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['s3fs'] = sys.modules['gcsfs'] = None\n"
        "from mesh_transformer.storage.paths import parse_path\n"
        "for url in sys.argv[1:]:\n"
        "    try: parse_path(url).is_dir()\n"
        "    except ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, "s3://bucket/run", "gs://bucket/run"]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install 'mesh-transformer[remote]'" in line for line in lines)
