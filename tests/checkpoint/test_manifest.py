# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Any change to any file is detected and the file is named; a malicious manifest is rejected."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.checkpoint import manifest as manifest_module
from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.checkpoint.store import Store

FLIPS = 200


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, arrays, axes):
    """A store with steps 1 and 2, in many small files."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("mesh_transformer.checkpoint.chunk_grid.MAX_CHUNK_BYTES", 1024)
        monkeypatch.setattr("mesh_transformer.checkpoint.chunk_grid.MAX_SHARD_BYTES", 2048)
        store = Store(tmp_path_factory.mktemp("checkpoints"))
        for step in (1, 2):
            store.save(step, arrays, axes=axes, meta={"cursor": step})
        store.wait()
    return store


def kind(path):
    return path.name if path.suffix == ".json" or path.name == "COMMIT" else "shard"


def assert_detected(store, wanted, path):
    """Check that restore and verify name the damaged file and its array, and that latest_valid skips the step."""
    problems = store.verify(2)
    assert any(str(path) in problem for problem in problems), problems
    with pytest.raises(CheckpointError) as raised:
        store.restore(2, wanted)
    assert path.name in str(raised.value)
    assert str(path.parent) in str(raised.value)
    if path.parent != store.folder(2):
        name = path.parent.relative_to(store.folder(2) / "arrays").as_posix()
        assert re.search(rf"(belongs to|file of) array {re.escape(name)}", str(raised.value))


def test_every_flipped_bit_is_detected(two_steps, shardings, like, values, digests):
    store, wanted = two_steps, like(shardings(2, 2, 2))
    rng = np.random.default_rng(11)
    every = sorted(path for path in store.folder(2).rglob("*") if path.is_file())
    groups = [[p for p in every if kind(p) == k] for k in ("shard", "zarr.json", "manifest.json", "COMMIT")]
    assert [len(group) > 0 for group in groups] == [True] * 4
    hit = set()
    for trial in range(FLIPS):
        group = groups[0 if trial % 2 else trial // 2 % 4]
        path = group[int(rng.integers(len(group)))]
        original = path.read_bytes()
        changed = bytearray(original)
        at = (
            int(rng.integers(len(original)))
            if trial % 3
            else len(original) - 1 - int(rng.integers(min(64, len(original))))
        )
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        assert_detected(store, wanted, path)
        path.write_bytes(original)
        hit.add(path)
    assert len(hit) > 20
    assert digests(store.restore(2, wanted)) == digests(values)


def test_every_truncated_extended_or_missing_file_is_detected(two_steps, shardings, like):
    store, wanted = two_steps, like(shardings(1, 1, 1))
    for path in sorted(path for path in store.folder(2).rglob("*") if path.is_file()):
        original = path.read_bytes()
        for data in (b"", original[: len(original) // 2], original[:-1], original + b"\0", None):
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            assert_detected(store, wanted, path)
        path.write_bytes(original)
    assert store.verify(2) == []


@pytest.mark.parametrize("name", ["COMMIT", "manifest.json", "arrays/step/zarr.json", "arrays/step/c"])
def test_falls_back_to_the_earlier_step_and_logs_the_reason(two_steps, name):
    path = two_steps.folder(2) / name
    original = path.read_bytes()
    path.write_bytes(original[:-2] + b"!" + original[-1:])
    logged = []
    assert two_steps.latest_valid(logged.append) == 1
    assert len(logged) == 1
    assert str(path) in logged[0]
    path.write_bytes(original)
    assert two_steps.latest_valid(logged.append) == 2
    assert len(logged) == 1


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "run", keep_last=9)
    store.save(1, {"a/w": jnp.ones((4, 4)), "b": jnp.float32(1)}, axes={"a/w": ("embed", "ff"), "b": ()}, meta={})
    store.wait()
    return store


def rewrite(store, change):
    """Change the manifest as an attacker would who can also write COMMIT."""
    folder = store.folder(1)
    table = json.loads((folder / "manifest.json").read_text())
    data = change(table)
    data = json.dumps(table).encode() if data is None else data
    (folder / "manifest.json").write_bytes(data)
    (folder / "COMMIT").write_bytes(manifest_module._commit_text(data))


def test_a_rewritten_manifest_alone_is_valid(store):
    rewrite(store, lambda table: None)
    assert store.verify(1) == []


@pytest.mark.parametrize(
    "name", ["../a", "/etc/a", "a/../b2", "", "c//d", ".hidden", "c\\d", "c\0d", "b/x", "c/", "c" * 300, "..", "é"]
)
def test_hostile_names(store, name):
    rewrite(store, lambda table: table["arrays"].update({name: table["arrays"]["b"]}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: invalid manifest: .*array name"):
        store.read_manifest(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [1 << 40, 1 << 40]),
        ("shape", [1 << 80, 1]),
        ("shape", [-4, 4]),
        ("shape", [4.0, 4]),
        ("shape", [True, 4]),
        ("shape", "44"),
        ("shape", [4]),
        ("shape", [8, 4]),
        ("shape", None),
        ("shard", [0, 4]),
        ("shard", [1, 4]),
        ("shard", [1 << 50, 4]),
        ("chunk", [3, 4]),
        ("chunk", [0, 4]),
        ("dtype", "object"),
        ("dtype", "float64"),
        ("axes", ["embed"]),
        ("files", {}),
        ("files", {"zarr.json": [10, "00"], "../../b/c": [100, "00"]}),
        ("files", {"zarr.json": [10, "00"], "c.0.0": ["1", "00"]}),
        ("files", {"zarr.json": [10, "00"], "c.0.0": [1, "00"]}),
        ("files", [1]),
    ],
    ids=str,
)
def test_hostile_records(store, field, value):
    rewrite(store, lambda table: table["arrays"]["a/w"].update({field: value}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: invalid manifest"):
        store.read_manifest(1)


def test_a_large_shape_with_large_files_claimed(store):
    """Sizes are compared with the files before anything is allocated."""

    def change(table):
        record = table["arrays"]["a/w"]
        record.update(shape=[1 << 34, 4], shard=[1 << 34, 4], chunk=[1 << 14, 4])
        record["files"]["c.0.0"][0] = 1 << 50

    rewrite(store, change)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        "a/w": jax.ShapeDtypeStruct((1 << 34, 4), jnp.float32, sharding=sharding),
        "b": jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding),
    }
    with pytest.raises(CheckpointError, match=rf"c\.0\.0: size is \d+ bytes, expected {1 << 50}"):
        store.restore(1, like)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: b"[" * 100_000,
        lambda table: b"[1]",
        lambda table: b"\xff\xfe",
        lambda table: b'{"format": 1, "step": ' + b"9" * 5000 + b"}",
        lambda table: table.update(format=2),
        lambda table: table.update(step=-1),
        lambda table: table.update(meta=[]),
        lambda table: table.update(arrays=[]),
        lambda table: table.pop("versions"),
    ],
)
def test_hostile_json(store, change):
    def apply(table):
        data = change(table)
        return data if isinstance(data, bytes) else None

    rewrite(store, apply)
    with pytest.raises(CheckpointError, match=r"manifest\.json: invalid manifest"):
        store.read_manifest(1)


def test_renamed_folder_and_newer_format(store):
    store.folder(1).rename(store.folder(7))
    with pytest.raises(CheckpointError, match="step is 1, which does not match the folder"):
        store.read_manifest(7)
    commit = store.folder(7) / "COMMIT"
    lines = commit.read_bytes().rpartition(b"commit ")[0]
    commit.write_bytes(manifest_module._add_digest(lines.replace(b"checkpoint 1", b"checkpoint 2")))
    with pytest.raises(CheckpointError, match=r"COMMIT: .* is not format 1"):
        store.read_manifest(7)


@pytest.mark.parametrize("link", ["arrays/a/w/c.0.0", "arrays/a/w", "arrays/a", "arrays", "manifest.json", "COMMIT"])
def test_links_are_refused(store, tmp_path, link):
    """Links are rejected even if their targets are correct."""
    path, aside = store.folder(1) / link, tmp_path / "aside"
    shutil.move(path, aside)
    path.symlink_to(aside)
    problems = store.verify(1)
    assert problems
    assert all("a link" in problem for problem in problems)
    assert str(path) in problems[0]
    with pytest.raises(CheckpointError, match="a link"):
        store.restore(1, {}) if link in ("COMMIT", "manifest.json") else store.open_arrays(1)["a/w"].read(
            (slice(None),) * 2
        )


def test_a_linked_step_is_ignored(store, tmp_path):
    shutil.move(store.folder(1), tmp_path / "aside")
    store.folder(1).symlink_to(tmp_path / "aside")
    assert store.steps() == []
