# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""ObjectStoreBackend with S3: commit protocol, leftovers, faults, uploads and downloads; a real server behind a faulty proxy."""

import collections
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, load_file
from tiny_run import write_tiny_run

from mesh_transformer.checkpoint import local_backend
from mesh_transformer.checkpoint.object_store_backend import ObjectStoreBackend
from mesh_transformer.checkpoint.store import Store, find_checkpoint
from mesh_transformer.config import ConfigError, ModelConfig, load_config
from mesh_transformer.convert.import_plan import ImportPlan, PlannedArray
from mesh_transformer.convert.lazy_arrays import FileArray, InMemory, full_index
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.convert.upload import upload_folder
from mesh_transformer.convert.writers import WriteOptions, write_gptj_v1, write_huggingface
from mesh_transformer.data.download import download_dataset
from mesh_transformer.data.errors import DataError
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.reports.metrics_log import read_metrics
from mesh_transformer.storage import paths
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import parse_path
from mesh_transformer.storage.resume_log import open_staging_log
from mesh_transformer.train.session import train_config

boto3 = pytest.importorskip("boto3", reason="needs moto[server], which installs boto3")

ROOT = Path(__file__).parents[2]
BUCKET = "bucket"


@pytest.fixture(scope="module")
def client(s3_port):
    """A client of the server that bypasses the proxy."""
    made = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{s3_port}",
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    yield made
    made.close()


@pytest.fixture
def proxy(s3_proxy):
    return s3_proxy


@pytest.fixture
def url(proxy, request):
    return f"s3://{BUCKET}/{re.sub('[^a-z]', '-', request.node.name)}"


@pytest.fixture
def no_retries(monkeypatch):
    """Raise errors without retries."""
    for name, value in {"ATTEMPTS": 1, "BODY_ATTEMPTS": 1, "FIRST_PAUSE": "1ms"}.items():
        monkeypatch.setattr(paths, name, value)
    caches = (paths._filesystem, paths._make_context)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(scope="module")
def program(load_script):
    return {name: load_script(name) for name in ("checkpoint", "reshard_checkpoint")}


AXES = {"w": ("embed", "ff"), "step": ()}


def one(value):
    return {"w": jnp.full((4, 4), value, jnp.float32), "step": jnp.int32(value)}


def save(store, *steps):
    for step in steps:
        store.save(step, one(step), axes=AXES, meta={"config": {"model": {"n_layers": 2}}})
        store.wait()
    return store


def restore(store, step):
    like = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in one(0).items()}
    return store.restore(step, like)


def keys(url):
    return sorted(ObjectStoreBackend(parse_path(url)).list_files())


def path_of(url, name):
    return "/".join([*parse_path(url).parts[1:], name])


def test_local_and_remote_checkpoints_have_the_same_bytes(url, tmp_path, program, capsys):
    for root in (url, tmp_path / "run"):
        save(Store(root), 1)
    local = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert set(keys(url)) == local
    for name in local - {"step_1/manifest.json", "step_1/COMMIT"}:  # they contain the time
        assert (parse_path(url) / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert program["checkpoint"].main(["diff", url, str(tmp_path / "run")]) == 0
    assert "2 of 2 common arrays are identical" in capsys.readouterr().out
    save(Store(tmp_path / "run"), 2)
    assert program["checkpoint"].main(["diff", str(tmp_path / "run"), url]) == 0
    assert "differs     w: 16 of 16 values" in capsys.readouterr().out


def test_inspect_reads_only_the_manifest(proxy, url, program, capsys):
    store = Store(f"{url}/checkpoints")
    state = {"w": jnp.ones((1000, 1000)), "step": jnp.int32(3)}
    store.save(3, state, axes=AXES, meta={})
    store.wait()
    proxy.log.clear()
    assert program["checkpoint"].main(["inspect", url]) == 0
    assert "step 3" in capsys.readouterr().out
    gets = [entry for entry in proxy.log if entry[0] == "GET" and "list-type" not in entry[1]]
    assert sorted(entry[1].rpartition("/")[2] for entry in gets) == ["COMMIT", "manifest.json"]
    assert sum(entry[3] for entry in proxy.log) < 20_000
    assert len(proxy.log) <= 12


CHILD = """
import sys, jax.numpy as jnp
from mesh_transformer.checkpoint.store import Store
store = Store(sys.argv[1])
for step in map(int, sys.argv[2:]):
    state = {"w": jnp.full((4, 4), step, jnp.float32), "step": jnp.int32(step)}
    store.save(step, state, axes={"w": ("embed", "ff"), "step": ()}, meta={})
print("leaving", flush=True)
"""


def spawn(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environment, stdout=subprocess.PIPE)


def test_killed_before_its_commit(proxy, url, monkeypatch):
    """A pending save is finished before its process exits normally."""
    child = spawn(url, "1", "2")

    def kill(method, path):
        if method == "PUT" and path.endswith("step_2/COMMIT"):
            os.kill(child.pid, signal.SIGKILL)
            return "cut"
        return None

    proxy.rule = kill
    assert (child.communicate()[0], child.returncode) == (b"leaving\n", -signal.SIGKILL)
    proxy.reset()
    reader = Store(url, writable=False)
    assert (reader.steps(), reader.latest(), reader.latest_valid(print)) == ([1], 1, 1)
    left = [key for key in keys(url) if key.startswith("step_2/")]
    assert len(left) == 6
    assert [bool(re.fullmatch(rf"step_2/OWNER\..*-{child.pid}-.*", key)) for key in left].count(True) == 1
    with pytest.raises(CheckpointError, match="step_2/COMMIT: missing"):
        reader.read_manifest(2)
    assert Store(url).steps() == [1]
    assert [key for key in keys(url) if not key.startswith("step_1/")] == []
    np.testing.assert_array_equal(restore(reader, 1)["w"], 1)


def test_leftovers(url, client, monkeypatch):
    """Steps of live processes of this host stay, and for an hour those of other hosts."""
    host, pid, start, _ = local_backend.make_owner().rsplit("-", 3)
    save(Store(url), 1)
    marks = {2: local_backend.make_owner(), 3: f"{host}-{pid}-{int(start) + 1}-00", 4: "other.host-1-1-00", 5: None}
    for step, owner in marks.items():
        for name in [f"OWNER.{owner}"] * bool(owner) + ["arrays/w/c.0.0"]:
            client.put_object(Bucket=BUCKET, Key=path_of(url, f"step_{step}/{name}"), Body=b"x")

    def steps():
        return {int(key.split("/")[0][5:]) for key in keys(url)}

    Store(url, writable=False)
    assert steps() == {1, 2, 3, 4, 5}
    Store(url)
    assert steps() == {1, 2, 4, 5}
    monkeypatch.setattr(local_backend, "OTHER_HOST_SECONDS", -5)
    assert Store(url).latest() == 1
    assert steps() == {1, 2}


def test_a_failed_save_leaves_nothing(proxy, url):
    store = save(Store(url), 1)
    proxy.rule = lambda method, path: 403 if method == "PUT" and "step_2/arrays/w/c" in path else None
    with pytest.raises(CheckpointError, match=rf"step 2 was not saved in {url} \(68 bytes\): .*permission denied"):
        save(store, 2)
    assert {key.split("/")[0] for key in keys(url)} == {"step_1"}
    proxy.rule = lambda method, path: 403 if method == "PUT" and "step_1/OWNER" in path else None
    with pytest.raises(CheckpointError, match="step 1 was not saved"):
        save(store, 1)
    assert store.verify(1) == [], "a save that could not begin deleted the earlier one"
    proxy.reset()
    save(store, 2)
    assert store.steps() == [1, 2]


def test_a_replaced_step_is_never_incomplete(proxy, url):
    store = save(Store(url), 1, 2)
    observed = []

    def watch(method, path):
        if method in ("PUT", "DELETE") and "step_2/" in path:
            observed.append((method, path.split("step_2/")[1]))
        return None

    proxy.rule = watch
    store.save(2, one(7), axes=AXES, meta={})
    store.wait()
    names = [(method, re.sub(r"^OWNER.*", "OWNER", name)) for method, name in observed]
    assert names[:2] == [("PUT", "OWNER"), ("DELETE", "COMMIT")]
    assert names[-3:] == [("PUT", "manifest.json"), ("PUT", "COMMIT"), ("DELETE", "OWNER")]
    assert {name for method, name in names if method == "DELETE"} >= {"arrays/w/c.0.0", "manifest.json"}
    np.testing.assert_array_equal(restore(store, 2)["w"], 7)


def test_pruning_takes_commit_first(proxy, url):
    store = Store(url, keep_last=2, keep_every=10)
    save(store, 5, 10)
    proxy.log.clear()
    save(store, 15, 20)
    assert store.steps() == [10, 15, 20]
    assert {key.split("/")[0] for key in keys(url)} == {"step_10", "step_15", "step_20"}
    deleted = [entry[1].split("step_5/")[1] for entry in proxy.log if entry[0] == "DELETE" and "step_5/" in entry[1]]
    assert deleted[0] == "COMMIT"
    assert len(deleted) == 6


def test_damage_is_reported_by_every_command(url, client, program, capsys):
    store = save(Store(url), 1, 2)
    key = path_of(url, "step_2/arrays/w/c.0.0")
    data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[7] ^= 4
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    assert program["checkpoint"].main(["verify", f"{url}/step_2"]) == 1
    assert capsys.readouterr().out.startswith(
        f"{url}/step_2/arrays/w/c.0.0: damaged: its digest does not match the manifest"
    )
    with pytest.raises(CheckpointError, match=rf"{url}/step_2/arrays/w/c\.0\.0: damaged or unreadable") as raised:
        restore(store, 2)
    assert not isinstance(raised.value, StorageError)
    logged = []
    assert find_checkpoint(url, log=logged.append)[1] == 1
    assert f"{url}/step_2/arrays/w/c.0.0: damaged" in logged[0]
    client.delete_object(Bucket=BUCKET, Key=key)
    assert "c.0.0: missing (no such object); it belongs to array w" in store.verify(2)[0]


def test_one_fault_of_each_kind_is_retried(proxy, url):
    """The first request of each kind fails, each in a different way, including listings."""
    failed = {}

    def fail_once(method, path):
        name = "list" if "list-type" in path else path.rpartition("/")[2][:5]
        if (method, name) in failed:
            return None
        failed[method, name] = (503, "cut", 500)[len(failed) % 3]
        return failed[method, name]

    proxy.rule = fail_once
    store = save(Store(url), 1)
    np.testing.assert_array_equal(restore(store, 1)["w"], 1)
    assert store.verify(1) == []
    assert {method for method, _ in failed} == {"GET", "HEAD", "PUT", "DELETE"}
    assert {("GET", "list"), ("GET", "c.0.0"), ("PUT", "c.0.0"), ("PUT", "COMMI"), ("GET", "manif")} <= failed.keys()
    assert len([entry for entry in proxy.log if entry[2] in (503, 500, "cut")]) == len(failed)


FAILING = {503: "the object store returned an error", "cut": "cannot connect", 403: "permission denied; .* need list"}


@pytest.mark.usefixtures("no_retries")
def test_a_permanent_fault_is_one_clear_line(proxy, url):
    """A network failure is not damage: no older step is used because of it."""
    store = save(Store(url), 1, 2)
    of_the_store = [store.latest, lambda: Store(url), lambda: find_checkpoint(url)]
    of_an_array = [lambda: restore(store, 2), lambda: store.verify(2), lambda: store.latest_valid(print)]
    for number, (action, words) in enumerate(FAILING.items()):
        for requests, where in ((of_the_store[number:], ""), (of_an_array[: 3 - number], "/step_2/arrays/w/c.0.0")):
            proxy.rule = lambda method, path, action=action, where=where: action if where in path else None
            for request in requests:
                with pytest.raises(StorageError, match=rf"{url}{where}.*: {words}") as raised:
                    request()
                assert "\n" not in str(raised.value)
    proxy.rule = lambda method, path: 503 if method == "PUT" and "step_3" in path else None
    with pytest.raises(CheckpointError, match=r"step 3 was not saved .*the object store returned an error"):
        save(store, 3)
    proxy.reset()
    assert store.latest_valid(print) == 2


def test_no_such_bucket_and_no_credentials(proxy, monkeypatch):
    for request in (lambda: find_checkpoint("s3://elsewhere/run"), lambda: Store("s3://elsewhere/run")):
        with pytest.raises(StorageError, match=r"s3://elsewhere/run.*: no such bucket: elsewhere; create it"):
            request()
    with pytest.raises(CheckpointError, match=rf"no such folder; folders in s3://{BUCKET}: "):
        find_checkpoint(f"s3://{BUCKET}/nothing-here")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match=r"s3://bucket/run: no credentials; set AWS_ACCESS_KEY_ID and .*PROFILE"):
        find_checkpoint(f"s3://{BUCKET}/run")
    assert Path(os.environ["AWS_CONFIG_FILE"]).exists() is False


CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=4, n_vocab=64, seq_len=16, rope_dims=4, head_bias=True,
                     residual="parallel", positions="rope-interleaved", norm="layernorm", activation="gelu-tanh",
                     tied_embeddings=False, qkv_bias=False, attention_out_bias=False, ff_bias=True)  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model folder of transformers, with random weights."""
    folder = tmp_path_factory.mktemp("models") / "theirs"
    rng = np.random.default_rng(3)
    described = flatten_names(describe_params(CONFIG))
    arrays = {
        f"params/{name}": PlannedArray(InMemory(rng.normal(size=p.shape).astype("f")), p.axes)
        for name, p in described.items()
    }
    model = {key: value for key, value in dataclasses.asdict(CONFIG).items() if value is not None}
    with open_staging_log(folder, {}) as log:
        return write_huggingface(folder, ImportPlan(CONFIG, model, arrays, 0), log, WriteOptions())


def convert(program, *arguments):
    assert program["reshard_checkpoint"].main([*map(str, arguments), "--json"]) == 0


def test_from_here_to_there_and_back(proxy, url, model_folder, program, tmp_path, capsys):
    """Every kind of model folder as a remote source and as a remote destination; the bits are the same at the end."""
    staging = ("--staging", tmp_path)
    puts = lambda: [entry[1] for entry in proxy.log if entry[0] == "PUT" and entry[2] == 200]  # noqa: E731
    proxy.rule = lambda method, path: 403 if method == "PUT" and "w_tokens/c" in path else None
    with pytest.raises(StorageError, match=rf"{url}/ours/.*/w_tokens/c.0.0: permission denied"):
        convert(program, model_folder, f"{url}/ours", *staging)
    assert Store(f"{url}/ours", writable=False).steps() == []
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        find_checkpoint(f"{url}/ours")
    begun = {path for path in puts() if "/c." in path}
    assert len(begun) > 10
    proxy.reset()
    capsys.readouterr()
    convert(program, model_folder, f"{url}/ours", *staging)
    report = json.loads(capsys.readouterr().out)
    assert not begun & set(puts()), "what was there was put again"
    assert puts()[-1].endswith("step_0/COMMIT")
    assert 3 <= report["upload"]["put"] < report["upload"]["objects"]
    assert find_checkpoint(f"{url}/ours")[0].verify(0) == []
    assert not [key for key in keys(f"{url}/ours") if key == "UPLOADING"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=rf"{url}/ours exists; choose another destination or pass --overwrite"):
        convert(program, model_folder, f"{url}/ours", *staging)
    remote, original = parse_path(f"{url}/theirs"), parse_path(f"{url}/v1")
    convert(program, f"{url}/ours", remote, "--format", "huggingface", *staging)
    assert puts()[-1].endswith("/theirs/config.json")
    before, after = load_file(model_folder / "model.safetensors"), load((remote / "model.safetensors").read_bytes())
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    source = open_checkpoint(model_folder)
    write_gptj_v1(tmp_path / "v1", source.plan, WriteOptions(), shards=2)
    upload_folder(tmp_path / "v1", original, lambda *_: None)
    assert puts()[-1].endswith("/v1/meta.json")
    for found in (open_checkpoint(remote), open_checkpoint(original, original / "config.json")):
        arrays = found.plan.values
        assert arrays.keys() >= source.plan.values.keys()
        for name, array in source.plan.values.items():
            np.testing.assert_array_equal(arrays[name].read(full_index(array)), array.read(full_index(array)))


def test_an_object_that_changes_during_an_upload_is_detected(proxy, url, client, tmp_path):
    """Uploaded objects are read back and compared; a difference leaves the upload incomplete."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights").write_bytes(bytes(range(256)))
    key, tampered = path_of(url, "weights"), []

    def tamper(method, path):
        if method == "GET" and path.endswith("/weights") and not tampered:
            client.put_object(Bucket=BUCKET, Key=key, Body=bytes(256))
            tampered.append(path)

    proxy.rule = tamper
    with pytest.raises(CheckpointError, match=f"{url}/weights: the object read back differs from the uploaded file"):
        upload_folder(tmp_path, parse_path(url), lambda *_: None)
    assert keys(url) == ["UPLOADING", "weights"]
    client.put_object(Bucket=BUCKET, Key=path_of(url, "old/extra"), Body=b"x")
    progress_calls = []
    done = upload_folder(tmp_path, parse_path(url), lambda *progress: progress_calls.append(progress))
    assert (done.objects, done.put, keys(url)) == (2, 2, ["config.json", "weights"])
    assert progress_calls[-1][1] == progress_calls[-1][2] == 2 * 258
    assert client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == bytes(range(256))


def test_byte_ranges_of_objects(proxy, url, client, monkeypatch):
    monkeypatch.setattr("mesh_transformer.convert.lazy_arrays.MIN_REQUEST_BYTES", 8 * 48 * 4)
    values = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
    remote = parse_path(url) / "file"
    client.put_object(Bucket=BUCKET, Key=path_of(url, "file"), Body=b"header--" + values.tobytes() + b"end")
    array = FileArray(remote, 8, values.shape, values.dtype)
    index = (slice(60, 64), slice(5, 7))
    np.testing.assert_array_equal(array.read(index), values[index])
    np.testing.assert_array_equal(array.read((slice(56, 57), slice(0, 48))), values[56:57])
    assert sum(entry[3] for entry in proxy.log) == 8 * 48 * 4  # rows 56 to 63, once
    with remote.open() as file:
        assert (file.read(6), file.seek(-3, os.SEEK_END), file.read()) == (b"header", 8 + values.nbytes, b"end")
    with pytest.raises(ValueError, match=f"{url}/file: truncated"):
        FileArray(remote, 8, (65, 48), values.dtype).read((slice(0, 65), slice(0, 48)))
    empty = FileArray(remote, 8, (0, 48), values.dtype).read((slice(0, 0), slice(0, 48)))
    assert empty.shape == (0, 48)
    np.testing.assert_array_equal(FileArray(remote, 12, (), values.dtype).read(()), 1.0)


@pytest.mark.usefixtures("short_pauses")
def test_fifty_random_faults_lose_nothing(proxy, url):
    """Errors, overload, cut connections, truncated responses and stalls at random; no request fails in all attempts."""
    rng, injected, last = np.random.default_rng(0), collections.Counter(), {}

    def fault(method, path):
        path = path.partition("?")[0]
        may = last.get((method, path), 0) < 2 and sum(injected.values()) < 60
        kind = rng.choice(
            ["503", "429", "500", "cut", "half", "stall", ""], p=[0.06, 0.06, 0.06, 0.06, 0.06, 0.01, 0.69]
        )
        if not may or not kind or (kind == "half" and method != "GET"):
            last[method, path] = 0
            return None
        last[method, path] = last.get((method, path), 0) + 1
        injected[str(kind)] += 1
        return int(kind) if kind.isdigit() else str(kind)

    proxy.rule = fault
    store, step = Store(url), 0
    while sum(injected.values()) < 50:
        step += 1
        save(store, step)
        np.testing.assert_array_equal(restore(store, step)["w"], step)
        assert store.steps()[-1] == step
    assert set(injected) == {"503", "429", "500", "cut", "half", "stall"}
    proxy.reset()
    assert Store(url).steps() == [step - 1, step]
    assert store.verify(step) == store.verify(step - 1) == []
    assert {key.split("/")[0] for key in keys(url)} == {f"step_{step - 1}", f"step_{step}"}


@pytest.fixture
def remote_run(url, client, tmp_path):
    """Return the configuration of a run whose files and text are in the store."""
    for i in range(3):
        text = " ".join(f"{i}.{j}" for j in range(400))
        client.put_object(Bucket=BUCKET, Key=path_of(url, f"texts/{i}.txt"), Body=text.encode())
    return write_tiny_run(tmp_path / "tiny.toml", f"{url}/texts", f"{url}/run")


def test_uploads_of_a_run_survive_a_failing_store(proxy, url, client, remote_run, tmp_path):
    """Text, checkpoints, metrics and report are in the store; a failing store costs no step, and another machine resumes."""

    def go(steps, cache):
        config = load_config(remote_run, [f"train.steps={steps}", f'data.cache_dir="{tmp_path / cache}"'])
        layout = make_layout(config.mesh, jax.devices()[:1])
        assert str(train_config(config, layout, StopRequest(()))) == f"{url}/run"
        return [line["step"] for line in read_metrics(next((tmp_path / cache / "runs").glob("*/run")) / "metrics.jsonl")
                if line["kind"] == "train"]  # fmt: skip

    proxy.rule = lambda method, path: 403 if method == "PUT" and path.endswith("metrics.jsonl") else None
    assert go(3, "here") == [1, 2, 3]
    assert "run/metrics.jsonl" not in keys(url)
    proxy.reset()
    assert go(4, "here") == [1, 2, 3, 4], "the mirror has what could not be put"
    assert {"run/metrics.jsonl", "run/report.html", "run/config.toml", "run/checkpoints/step_4/COMMIT"} <= set(
        keys(url)
    )
    assert go(5, "there") == [1, 2, 3, 4, 5], "in another folder it resumes from what the store has"
    proxy.log.clear()
    assert go(6, "there") == [1, 2, 3, 4, 5, 6]
    assert not proxy.count("GET", "texts/.*txt"), "fetched again, though nothing changed"
    config = load_config(remote_run)
    with pytest.raises(ConfigError, match=r"choose another run\.dir"):
        train_config(config, make_layout(config.mesh, jax.devices()[:1]), StopRequest(()), restart=True)


def test_datasets_are_downloaded_completely(proxy, url, client, tmp_path):
    put = lambda name, body: client.put_object(Bucket=BUCKET, Key=path_of(url, name), Body=body)  # noqa: E731
    for name in ("a/one.txt", "a/b/two.txt", "shard.bin", "shard.idx", "half.bin"):
        put(name, name.encode())
    folder = Path(download_dataset(f"{url}/a", tmp_path))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")} == {"one.txt", "b/two.txt"}
    shard = download_dataset(f"{url}/shard", tmp_path)
    assert Path(f"{shard}.bin").read_bytes() == b"shard.bin"
    assert download_dataset(f"{url}/shard.idx", tmp_path).endswith("/shard")
    put("a/one.txt", b"changed")
    client.delete_object(Bucket=BUCKET, Key=path_of(url, "a/b/two.txt"))
    assert [path.read_bytes() for path in Path(download_dataset(f"{url}/a", tmp_path)).rglob("*.txt")] == [b"changed"]
    with pytest.raises(DataError, match=r"a \.bin and an \.idx file"):
        download_dataset(f"{url}/half", tmp_path)
    with pytest.raises(DataError, match=rf"{url}/none: no such object or folder; {url} contains: a, half.bin, shard"):
        download_dataset(f"{url}/none", tmp_path)
    put("a/one.txt", b"newer and longer")
    proxy.rule = lambda method, path: 403 if method == "GET" and path.endswith("one.txt") else None
    with pytest.raises(DataError, match=rf"{url}/a: cannot be downloaded: .*permission denied"):
        download_dataset(f"{url}/a", tmp_path)
    assert (folder / "one.txt").read_bytes() == b"changed", "a file is replaced completely or not at all"
