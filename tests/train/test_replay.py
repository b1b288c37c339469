# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests that a reproduced run and a replayed step equal the log, and that a changed log is detected."""

import json
import shutil

import numpy as np
import pytest
from tiny_run import write_tiny_run

from mesh_transformer.config import load_config
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.mesh import make_layout
from mesh_transformer.train import replay
from mesh_transformer.train.provenance import ProvenanceError, diff_environments, read_provenance
from mesh_transformer.train.session import train_config


@pytest.fixture(scope="module")
def programs(load_script):
    return {name: load_script(name) for name in ("reproduce", "replay_step")}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_bytes(rng.integers(97, 105, 4000, np.uint8).tobytes())
    write_tiny_run(
        folder / "small.toml",
        folder / "text.txt",
        folder / "run",
        model=dict(n_layers=2, dropout=0.1),
        optimizer=dict(name="sgd"),
        train=dict(steps=6, batch_size=8),
        checkpoint=dict(every=4),
    )
    config = load_config(folder / "small.toml")
    return train_config(config, make_layout(config.mesh), StopRequest())


@pytest.fixture(autouse=True)
def all_devices(monkeypatch):
    """Use the devices of the test process, which are initialized already."""
    monkeypatch.setattr(replay, "init_devices", make_layout)


def test_contents_of_recipe_json(run_dir):
    provenance = read_provenance(run_dir)
    assert provenance["config"]["train"]["steps"] == 6
    assert [start["step"] for start in provenance["starts"]] == [0]
    start = provenance["starts"][0]
    assert {"python", "jax", "dm-haiku", "optax", "tensorstore"} <= start["versions"].keys()
    assert start["devices"] == {"cpu": 8}
    assert len(provenance["data_fingerprint"]) == 16
    other = {**start, "devices": {"TPU v4": 8}, "versions": {**start["versions"], "jax": "0.1"}}
    assert diff_environments(other, start) == [
        'devices: was {"TPU v4": 8}, now {"cpu": 8}',
        f"jax: was 0.1, now {start['versions']['jax']}",
    ]
    assert diff_environments(start, dict(start)) == []


def test_reproduced_run_differs_only_in_the_changed_loss(run_dir, programs, capsys, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    index = next(i for i, line in enumerate(map(json.loads, lines)) if line["step"] == 2 and "loss" in line)
    line = json.loads(lines[index])
    lines[index] = json.dumps({**line, "loss": float(np.nextafter(np.float32(line["loss"]), np.float32(np.inf)))})
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}

    assert programs["reproduce"].main([str(copy), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["compared"], result["first_differing_step"], result["ulps"]) == (6, 2, 1)
    assert result["differing_arrays"] == [], "the last checkpoint was not changed"
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before, "the run folder was not written"
    assert "step 2 is the first step whose loss differs" in programs["reproduce"].format_result(result)
    untouched = {**result, "first_differing_step": None}
    assert "6 losses up to step 6 are equal, bit for bit" in programs["reproduce"].format_result(untouched)


def test_a_replayed_step_equals_its_log(run_dir, programs, capsys):
    assert programs["replay_step"].main([str(run_dir), "6", "--json", "--worst", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["equal"], result["from_checkpoint"]) == (True, 4)
    assert result["loss"] == result["logged"]
    norms = {norm["module"]: norm for norm in result["norms"]}
    assert {"all", "layer 0", "layer 1"} <= norms.keys()
    for side in ("parameters", "gradients"):
        parts = sum(norm[side] ** 2 for module, norm in norms.items() if module != "all")
        assert parts == pytest.approx(norms["all"][side] ** 2, rel=1e-4)
    worst, next_worst = result["worst"]
    assert worst["loss"] >= next_worst["loss"]
    assert 8 * 5 <= worst["sequence"] < 8 * 6
    assert len(worst["text"]) == 16
    assert worst["text"] in (run_dir.parent / "text.txt").read_text()
    assert "equal to the logged loss" in programs["replay_step"].format_result(result)
    assert "NOT equal to the logged loss" in programs["replay_step"].format_result({**result, "equal": False})


def test_missing_provenance_and_changed_data_are_errors(run_dir, programs, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    with pytest.raises(ProvenanceError, match=r"recipe\.json: no such file"):
        programs["reproduce"].main([str(tmp_path)])
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    provenance = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps({**provenance, "data_fingerprint": "0" * 16}))
    with pytest.raises(ProvenanceError, match="restore the earlier data to replay the run"):
        programs["reproduce"].main([str(copy)])
