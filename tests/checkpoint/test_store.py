# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Store: restore on another mesh bit for bit, asynchronous saves, rejected arguments, pruning."""

import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.checkpoint.store import Store, find_checkpoint

META = {"config": {"model": {"d_model": 24}}, "metrics": {"loss": 2.5, "nan": float("nan")}, "cursor": 12345678901234}


def save(root, step, arrays, axes, **options):
    store = Store(root, **options)
    store.save(step, arrays, axes=axes, meta=META)
    store.wait()
    return store


def one(value, step=0):
    """Return the smallest state."""
    return {"w": jnp.full((4, 4), value, jnp.float32), "step": jnp.int32(step)}


ONE_AXES = {"w": ("embed", "ff"), "step": ()}


def like_of(arrays):
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in arrays.items()}


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("saved_on", [(2, 2, 2), (1, 1, 1)], ids=str)
def test_restores_on_any_mesh(tmp_path, values, axes, shardings, like, digests, saved_on):
    arrays = {name: jax.device_put(value, shardings(*saved_on)[name]) for name, value in values.items()}
    store = save(tmp_path, 3, arrays, axes)
    expected = digests(values)
    for dims in [(8, 1, 1), (1, 4, 2), (2, 2, 2), (1, 1, 1), (1, 2, 4)]:
        targets = shardings(*dims)
        restored = store.restore(3, like(targets))
        assert digests(restored) == expected
        for name, array in restored.items():
            assert array.sharding == targets[name]
            assert array.dtype == values[name].dtype
        if dims != saved_on:
            before, after = (
                {(s.device.id, str(s.index)) for s in a["params/embed/w"].addressable_shards}
                for a in (arrays, restored)
            )
            assert before != after
    assert len(list((store.folder(3) / "arrays/params/embed/w").iterdir())) > 4
    assert store.verify(3) == []
    assert store.steps() == [3]


@pytest.mark.usefixtures("small_files")
def test_restored_arrays_may_be_donated(tmp_path, arrays, axes, shardings, like, values):
    """Replicas are read once, but no two devices share a buffer with each other or with the reader."""
    store = save(tmp_path, 1, arrays, axes)
    restored = store.restore(1, like(shardings(8, 1, 1)))
    array = restored["params/embed/w"]
    assert len({shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}) == 8
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(array)
    for shard in doubled.addressable_shards:
        np.testing.assert_array_equal(shard.data, 2 * values["params/embed/w"])


def test_manifest_and_meta(tmp_path, arrays, axes):
    store = save(tmp_path, 5, arrays, axes)
    assert json.dumps(store.read_meta(5)) == json.dumps(META)
    manifest = store.read_manifest(5)
    assert manifest.arrays["params/layers/w_q"].axes == ("layers", "embed", "heads")
    assert manifest.arrays["params/layers/w_q"].dtype == "bfloat16"
    assert {"jax", "numpy", "python", "tensorstore"} <= manifest.versions.keys()
    text = (store.folder(5) / "manifest.json").read_text()
    assert not any(word in text for word in ("fsdp", 'tensor"', "mesh"))


def test_save_returns_before_writing_and_buffers_may_be_donated(tmp_path):
    store = Store(tmp_path)
    gate = threading.Event()
    store._executor.submit(gate.wait)  # nothing is written until the gate opens
    x = jnp.arange(1 << 20, dtype=jnp.float32)
    before, expected = x.unsafe_buffer_pointer(), np.array(x)
    store.save(1, {"x": x}, axes={"x": ("embed",)}, meta={})
    y = jax.block_until_ready(jax.jit(lambda x: -x, donate_argnums=0)(x))
    assert x.is_deleted()
    assert y.unsafe_buffer_pointer() == before, "the buffer was not reused, so the test is not conclusive"
    assert store.steps() == []
    assert store.holds(1)
    gate.set()
    store.wait()
    assert store.steps() == [1]
    template = {"x": jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=y.sharding)}
    np.testing.assert_array_equal(store.restore(1, template)["x"], expected)


def test_meta_is_copied_immediately(tmp_path):
    store = Store(tmp_path)
    gate = threading.Event()
    store._executor.submit(gate.wait)
    meta = {"metrics": {"loss": 1}}
    store.save(1, one(1), axes=ONE_AXES, meta=meta)
    meta["metrics"]["loss"] = 2
    gate.set()
    store.wait()
    assert store.read_meta(1) == {"metrics": {"loss": 1}}


def test_saves_do_not_overlap(tmp_path):
    store = Store(tmp_path)
    gate, second_returned = threading.Event(), threading.Event()
    store._executor.submit(gate.wait)
    store.save(1, one(1), axes=ONE_AXES, meta={})

    def save_again():
        store.save(2, one(2), axes=ONE_AXES, meta={})
        second_returned.set()

    thread = threading.Thread(target=save_again)
    thread.start()
    assert not second_returned.wait(0.2)
    assert store.steps() == []
    gate.set()
    thread.join()
    assert 1 in store.steps()
    store.wait()
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("at", ["wait", "check", "save"])
def test_a_failure_is_raised_once_and_later_saves_work(tmp_path, at):
    root = tmp_path / "checkpoints"
    store = save(root, 1, one(1), ONE_AXES)
    root.rename(tmp_path / "aside")
    root.write_text("in the way")
    gate = threading.Event()
    store._executor.submit(gate.wait)
    store.save(2, one(2), axes=ONE_AXES, meta={})
    store.check()  # not failed yet
    gate.set()

    def trigger():
        if at == "check":
            while True:
                store.check()
        elif at == "wait":
            store.wait()
        else:
            store.save(3, one(3), axes=ONE_AXES, meta={})

    with pytest.raises(CheckpointError, match=r"step 2 was not saved in .*bytes"):
        trigger()
    assert not store.holds(2)
    store.wait()
    root.unlink()
    (tmp_path / "aside").rename(root)
    store.save(4, one(4), axes=ONE_AXES, meta={})
    store.wait()
    assert store.steps() == [1, 4]
    assert sorted(path.name for path in root.iterdir()) == ["step_1", "step_4"]


@pytest.mark.parametrize("async_save", [True, False])
def test_full_and_readonly_disk(small_disk, async_save):
    store = Store(small_disk / "run", async_save=async_save)
    state = {"w": jnp.ones((256, 1024), jnp.float32)}  # 1 MB
    axes = {"w": ("embed", "ff")}
    store.save(1, state, axes=axes, meta={})
    store.wait()

    def save_and_wait(step, state):
        store.save(step, state, axes=axes, meta={})
        store.wait()

    def fail(step, state):
        with pytest.raises(CheckpointError, match=rf"step {step} was not saved in .*; earlier checkpoints") as raised:
            save_and_wait(step, state)
        assert [path.name for path in store.root.iterdir()] == ["step_1"]
        assert store.verify(1) == []
        return str(raised.value)

    assert "No space left" in fail(2, {"w": jnp.ones((1024, 1024), jnp.float32)})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only" in fail(3, state)
    with pytest.raises(CheckpointError, match="Read-only"):
        Store(small_disk / "other")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    store.save(4, state, axes=axes, meta={})
    store.wait()
    assert store.steps() == [1, 4]


def test_rejects_arrays_that_cannot_be_saved(tmp_path):
    store = Store(tmp_path)
    gone = jnp.ones(3)
    gone.delete()
    for arrays, axes, meta, match in [
        ({"w": np.ones(3)}, {"w": ("embed",)}, {}, "w: is of type ndarray, but must be a jax.Array"),
        ({"w": jnp.ones(3)}, {"w": ()}, {}, "w: 0 logical axes"),
        ({"w": jnp.ones(3)}, {"v": ("embed",)}, {}, r"only one of them: \['v', 'w'\]"),
        ({"w": jax.random.key(0)}, {"w": ()}, {}, "w: a random key cannot be saved"),
        ({"w": jnp.ones(3, jnp.complex64)}, {"w": ("embed",)}, {}, "w: dtype complex64"),
        ({"w": gone}, {"w": ("embed",)}, {}, "w: its buffer was donated"),
        ({"w": jnp.ones(3)}, {"w": ("embed",)}, {"x": object()}, "meta of step 1 cannot be written as JSON"),
        ({"../w": jnp.ones(3)}, {"../w": ("embed",)}, {}, r"array name '\.\./w'"),
        (
            {"a": jnp.ones(3), "a/c": jnp.ones(3)},
            {"a": ("embed",), "a/c": ("embed",)},
            {},
            "no name may be a folder of another",
        ),
        ({}, {}, {}, "must not be empty"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            store.save(1, arrays, axes=axes, meta=meta)
    with pytest.raises(CheckpointError, match="step is -1"):
        store.save(-1, one(1), axes=ONE_AXES, meta={})
    with pytest.raises(CheckpointError, match="keep_last = 0"):
        Store(tmp_path, keep_last=0)
    assert list(tmp_path.iterdir()) == []


def test_restore_names_every_difference(tmp_path, arrays, axes, shardings, like):
    store = save(tmp_path, 1, arrays, axes)
    wanted = like(shardings(1, 4, 2))
    sharding = wanted["step"].sharding
    del wanted["guard/key"]
    wanted["params/new"] = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)
    wanted["step"] = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=sharding)
    wanted["params/embed/w"] = jax.ShapeDtypeStruct((64, 24), jnp.bfloat16, sharding=sharding)
    wanted["guard/seen"] = jax.ShapeDtypeStruct((7,), jnp.bool_)
    with pytest.raises(CheckpointError) as raised:
        store.restore(1, wanted)
    for line in [
        "missing in the checkpoint: params/new",
        "unexpected in the checkpoint: guard/key",
        "step: int32[] in the checkpoint, int32[1] requested",
        "params/embed/w: float32[64, 24] in the checkpoint, bfloat16[64, 24] requested",
        "guard/seen: no sharding given in the request",
    ]:
        assert line in str(raised.value)


def test_partial_restore(tmp_path, arrays, axes, shardings, like, digests, values):
    store = save(tmp_path, 1, arrays, axes)
    wanted = {name: leaf for name, leaf in like(shardings(1, 1, 1)).items() if name.startswith("params/")}
    with pytest.raises(CheckpointError, match="unexpected in the checkpoint: opt_state/count"):
        store.restore(1, wanted)
    shutil.rmtree(store.folder(1) / "arrays/opt_state")  # not requested, so not read
    part = Store(tmp_path).restore(1, wanted, only="params/")
    assert digests(part) == {name: digest for name, digest in digests(values).items() if name in wanted}
    del wanted["params/embed/w"]
    with pytest.raises(CheckpointError, match=r'\(names beginning with "params/"\): params/embed/w'):
        store.restore(1, wanted, only="params/")


def test_pruning(tmp_path):
    store = Store(tmp_path, keep_last=2, keep_every=10)
    for step in (5, 10, 15, 20, 25, 30, 35):
        store.save(step, one(step), axes=ONE_AXES, meta={})
    store.wait()
    assert store.steps() == [10, 20, 30, 35]
    assert not store.holds(5)
    assert Store(tmp_path, keep_last=1).prune() == [10, 20, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_35"]


def test_after_falling_back_the_last_valid_step_is_not_pruned(tmp_path):
    store = Store(tmp_path, keep_last=2)
    for step in (100, 200, 300):
        store.save(step, one(step), axes=ONE_AXES, meta={})
    store.wait()
    (store.folder(300) / "COMMIT").unlink()
    data = store.folder(200) / "arrays/w/c.0.0"
    data.write_bytes(bytes(len(data.read_bytes())))
    for step in (50, 100):
        save(tmp_path / "other", step, one(step), ONE_AXES)
        shutil.copytree(tmp_path / f"other/step_{step}", tmp_path / f"step_{step}", dirs_exist_ok=True)

    logged = []
    store = Store(tmp_path, keep_last=2)
    with pytest.raises(CheckpointError, match="step_300/COMMIT: missing"):
        store.latest()
    assert store.latest_valid(logged.append) == 100
    assert ["step_300/COMMIT" in logged[0], "step_200/arrays/w/c.0.0" in logged[1]] == [True, True]
    assert len(logged) == 2
    store.restore(100, like_of(one(0)))
    assert store.holds(100)
    assert not store.holds(200)
    store.save(150, one(150), axes=ONE_AXES, meta={})
    store.wait()
    # The damaged step 200 is newer than the branch that continues: it stays, and does not count toward keep_last.
    assert store.steps() == [100, 150, 200]
    store.save(200, one(7), axes=ONE_AXES, meta={})
    store.wait()
    assert store.verify(200) == []
    assert store.steps() == [150, 200]
    np.testing.assert_array_equal(store.restore(200, like_of(one(0)))["w"], 7)
    assert store.latest_valid(logged.append) == 200


@pytest.mark.parametrize(
    ("damaged", "start", "next_step", "left"), [((3, 4), 2, 5, [2, 3, 4, 5]), ((), 2, 3, [2, 3, 4])]
)
def test_steps_that_count_toward_keep_last(tmp_path, damaged, start, next_step, left):
    """Damaged steps and steps of an abandoned branch do not count toward keep_last."""
    store = Store(tmp_path, keep_last=9)
    for step in (1, 2, 3, 4):
        store.save(step, one(step), axes=ONE_AXES, meta={})
    store.wait()
    for step in damaged:
        path = store.folder(step) / "arrays/w/c.0.0"
        path.write_bytes(bytes(len(path.read_bytes())))
    store = Store(tmp_path, keep_last=2)
    if damaged:
        assert store.latest_valid(lambda text: None) == start
    store.restore(start, like_of(one(0)))
    store.save(next_step, one(9), axes=ONE_AXES, meta={})
    store.wait()
    assert store.steps() == left


def test_a_replaced_step_is_restored_if_the_rename_fails(tmp_path, monkeypatch):
    store = save(tmp_path, 1, one(1), ONE_AXES)
    rename = os.rename

    def fail_at_last(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_last)
    store.save(1, one(2), axes=ONE_AXES, meta={})
    with pytest.raises(CheckpointError, match="step 1 was not saved"):
        store.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert store.verify(1) == []
    np.testing.assert_array_equal(store.restore(1, like_of(one(0)))["w"], 1)


def test_a_save_is_finished_at_exit(tmp_path):
    code = (
        "import sys, jax.numpy as jnp\n"
        "from mesh_transformer.checkpoint.store import Store\n"
        "Store(sys.argv[1]).save(1, {'w': jnp.ones((2000, 1000))}, axes={'w': ('embed', 'ff')}, meta={})"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert Store(tmp_path).verify(1) == []
    assert Store(tmp_path).steps() == [1]


def test_damage_is_never_taken_for_an_empty_store(tmp_path):
    assert Store(tmp_path).latest() is None
    assert Store(tmp_path).latest_valid(print) is None
    store = save(tmp_path, 1, one(1), ONE_AXES)
    (store.folder(1) / "COMMIT").unlink()
    assert store.steps() == []
    with pytest.raises(CheckpointError, match="COMMIT: missing"):
        store.latest()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[1\] is valid"):
        store.latest_valid(lambda text: None)


def test_find_checkpoint(tmp_path):
    run = tmp_path / "run"
    save(run / "checkpoints", 8, one(8), ONE_AXES)
    store = save(run / "checkpoints", 9, one(9), ONE_AXES)
    for path in (run, run / "checkpoints", run / "checkpoints/step_9"):
        found, step = find_checkpoint(path)
        assert (found.root, step) == (run / "checkpoints", 9)
        with pytest.raises(CheckpointError, match="opened for reading"):
            found.save(1, one(1), axes=ONE_AXES, meta={})
    assert find_checkpoint(run / "checkpoints/step_8")[1] == 8
    (store.folder(9) / "arrays/w/c.0.0").unlink()
    logged = []
    assert find_checkpoint(run, log=logged.append)[1] == 8
    assert "step_9/arrays/w/c.0.0: missing" in logged[0]
    with pytest.raises(CheckpointError, match=r"no such folder; folders in .*: step_8, step_9"):
        find_checkpoint(run / "checkpoints/step_7")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"contains no checkpoint, only: notes\.txt"):
        find_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is not a folder"):
        find_checkpoint(tmp_path / "empty/notes.txt")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["notes.txt"]  # reading creates nothing


def test_a_hundred_saves_have_the_values_from_before_the_buffers_were_donated(tmp_path):
    store = Store(tmp_path, keep_last=100)
    advance = jax.jit(lambda state: {"w": jnp.sin(state["w"]) + 1, "step": state["step"] + 1}, donate_argnums=0)
    state, expected, reused = {"w": jnp.arange(300_000, dtype=jnp.float32), "step": jnp.int32(0)}, {}, 0
    for step in range(1, 101):
        before = state["w"]
        state = advance(state)
        reused += before.is_deleted()
        expected[step] = np.array(state["w"])
        store.save(step, state, axes={"w": ("embed",), "step": ()}, meta={})
    store.wait()
    assert reused == 100
    assert store.steps() == list(expected)
    for step, values in expected.items():
        stored = store.open_arrays(step)
        np.testing.assert_array_equal(stored["w"].read((slice(None),)), values)
        assert stored["step"].read(()) == step
