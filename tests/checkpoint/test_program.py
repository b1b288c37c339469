# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""scripts/checkpoint.py: inspect, verify and diff, as text and as JSON."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.checkpoint.manifest import ArrayRecord, CheckpointError
from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import ConfigError


@pytest.fixture(scope="module")
def program(load_script):
    return load_script("checkpoint")


@pytest.fixture
def runs(tmp_path):
    """Return a folder with runs a and b, saved at step 10; some arrays differ."""
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    other = w.copy()
    other[1, 2] += 0.5
    other[2, 0] = np.nan
    same = {
        "params/w": jnp.array(w),
        "params/b": jnp.ones(4, jnp.bfloat16),
        "step": jnp.int32(10),
        "nan": jnp.array(np.nan),
    }
    changes = {"params/w": jnp.array(other), "params/b": jnp.ones(5, jnp.bfloat16), "extra": jnp.array([True])}
    axes = {"params/w": ("embed", "ff"), "params/b": ("ff",), "step": (), "nan": (), "extra": ("replicated",)}
    meta = {"config": {"model": {"n_layers": 2, "d_model": 4}}, "metrics": {"loss": 1.25}}
    for name, arrays in (("a", same), ("b", same | changes)):
        store = Store(tmp_path / name / "checkpoints")
        store.save(10, arrays, axes={key: axes[key] for key in arrays}, meta=meta)
        store.wait()
    return tmp_path


def test_inspect(program, runs, capsys):
    assert program.main(["inspect", str(runs / "a")]) == 0
    text = capsys.readouterr().out
    for part in [
        "step 10",
        "16 parameters",
        "params/w  3x4     embed ff  float32      48",
        "n_layers = 2",
        "loss 1.25",
    ]:
        assert part in text
    assert program.main(["inspect", str(runs / "a/checkpoints/step_10"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["parameters"], result["bytes"]) == (10, 16, 64)
    array = result["arrays"]["params/b"]
    assert len(array.pop("digest")) == 32
    assert array == {"shape": [4], "axes": ["ff"], "dtype": "bfloat16", "bytes": 8}


def test_verify(program, runs, capsys):
    assert program.main(["verify", str(runs / "a")]) == 0
    assert "step_10: intact" in capsys.readouterr().out
    folder = runs / "a/checkpoints/step_10/arrays"
    (folder / "step/c").unlink()
    data = bytearray((folder / "params/w/c.0.0").read_bytes())
    data[5] ^= 4
    (folder / "params/w/c.0.0").write_bytes(data)
    assert program.main(["verify", str(runs / "a")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["step/c: missing" in lines[0], "w/c.0.0: damaged" in lines[1], len(lines)] == [True, True, 2]
    assert program.main(["verify", str(runs / "a"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == lines
    (folder.parent / "COMMIT").write_text("")
    assert program.main(["verify", str(runs / "a/checkpoints/step_10")]) == 1
    assert "COMMIT: damaged" in capsys.readouterr().out


def test_diff(program, runs, capsys):
    assert program.main(["diff", str(runs / "a"), str(runs / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
    assert program.main(["diff", str(runs / "a"), str(runs / "b"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] is False
    assert (result["left_only"], result["right_only"]) == ([], ["extra"])
    assert result["arrays"]["params/b"] == {"equal": False, "left": "bfloat16[4]", "right": "bfloat16[5]"}
    expected = {"equal": False, "size": 12, "different": 2, "max_difference": 0.5, "not_a_number": 1}
    assert result["arrays"]["params/w"] == expected
    assert result["arrays"]["nan"]["equal"] is True
    assert program.main(["diff", str(runs / "a"), str(runs / "b")]) == 0
    text = capsys.readouterr().out
    assert "differs     params/w: 2 of 12 values, max |difference| 0.5, 1 NaN on one side" in text
    assert "only right  extra" in text
    assert "2 of 4 common arrays are identical" in text
    data = runs / "b/checkpoints/step_10/arrays/params/w/c.0.0"
    data.write_bytes(bytes(len(data.read_bytes())))
    with pytest.raises(CheckpointError, match=r"c\.0\.0"):
        program.main(["diff", str(runs / "a"), str(runs / "b")])


def test_diff_of_two_dtypes_prints_the_difference(program, tmp_path, capsys):
    values = np.array([[1.0, 1 + 2**-9], [3.0, 4.0]], np.float32)
    for name, dtype in (("a", jnp.float32), ("b", jnp.bfloat16)):
        store = Store(tmp_path / name)
        store.save(1, {"params/w": jnp.asarray(values, dtype)}, axes={"params/w": ("embed", "ff")}, meta={})
        store.wait()
    assert program.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    expected = "params/w: float32[2, 2] and bfloat16[2, 2], 1 of 4 values, max |difference| 0.00195312"
    assert expected in capsys.readouterr().out


def test_diff_in_small_blocks_finds_all_differences(program, runs, capsys, monkeypatch):
    monkeypatch.setattr(program, "BLOCK_BYTES", 8)
    assert program.main(["diff", str(runs / "a"), str(runs / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arrays"]["params/w"]["different"] == 2


@pytest.mark.parametrize(
    ("shape", "shard"), [((), ()), ((0, 4), (1, 4)), ((7, 5, 3), (4, 5, 4)), ((1, 9), (1, 3)), ((64, 2), (64, 2))]
)
def test_blocks_cover_an_array_once(program, monkeypatch, shape, shard):
    monkeypatch.setattr(program, "BLOCK_BYTES", 40)
    count = np.zeros(shape, int)
    for block in program._blocks(ArrayRecord(shape, "float32", ("embed",) * len(shape), shard, shard)):
        count[block] += 1
        assert count[block].size <= 10
    assert (count == 1).all()


def test_wrong_usage(program, runs, capsys):
    with pytest.raises(ConfigError, match="diff takes 2 PATH arguments, got 1"):
        program.main(["diff", str(runs / "a")])
    with pytest.raises(ConfigError, match="verify takes 1 PATH argument, got 2"):
        program.main(["verify", str(runs / "a"), str(runs / "b")])
    with pytest.raises(CheckpointError, match="no such folder"):
        program.main(["inspect", str(runs / "c")])
