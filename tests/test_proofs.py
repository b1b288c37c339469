# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The counted proofs, with few trials: killed runs end in the same bits, damage is never restored, a soak finds its faults."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


def test_killed_and_stopped_runs_end_in_the_same_bits(tmp_path):
    (tmp_path / "text.txt").write_bytes(np.random.default_rng(0).integers(97, 105, 20_000, np.uint8).tobytes())
    (tmp_path / "small.toml").write_text(f"""
[model]
n_layers = 1
d_model = 16
n_heads = 2
n_vocab = 264
seq_len = 16
[data]
cache_dir = "{tmp_path / "cache"}"
[data.train.letters]
path = "{tmp_path / "text.txt"}"
[train]
steps = 60
batch_size = 8
[checkpoint]
every = 3
""")
    command = [SCRIPTS / "prove_resume.py", tmp_path / "small.toml", "--kills", "2", "--terms", "1", "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(done.stdout)
    assert (tally["kills"], tally["stops"], tally["problems"]) == (2, 1, [])
    assert tally["in_save"] >= 1
    assert tally["resumes"] >= 1
    assert (tally["not_newest"], tally["seen_twice"], tally["never_seen"], tally["ulps"]) == (0, 0, 0, 0)
    assert tally["equal_checkpoints"] == tally["checkpoints"] > 0


def test_a_proof_that_fails_says_so(load_script):
    program = load_script("stress/resume")
    assert program.parse_axes("fsdp=2,cpu_devices=4") == ["mesh.fsdp=2", "mesh.cpu_devices=4"]
    with pytest.raises(ValueError, match="expected AXIS=SIZE"):
        program.parse_axes("fsdp:2")
    assert program.format_tally(program.Tally(), False).endswith("proved")
    assert "PROBLEM: a loss" in program.format_tally(program.Tally(problems=["a loss"]), False)


def test_damage_is_found_named_and_answered_with_the_older_checkpoint(load_script, capsys, monkeypatch):
    program = load_script("stress/corruption")
    assert program.main(["--trials", "30", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["found"], result["missed"]) == (30, [])
    assert {(kind, how) for kind, how, *_ in result["table"]} == {(k, h) for k in program.KINDS for h in program.HOW}
    monkeypatch.setattr(program, "damage_file", lambda *args: "left alone")
    assert program.main(["--trials", "1"]) == 1
    assert "MISSED" in (out := capsys.readouterr().out)
    assert "restored without an error" in out


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_is_damage(load_script, tmp_path, how):
    program, path = load_script("stress/corruption"), tmp_path / "file"
    for seed in range(20):
        path.write_bytes(bytes(100))
        said = program.damage_file(path, how, random.Random(seed), 40, 60)
        left = path.read_bytes() if path.exists() else None
        assert left != bytes(100)
        if how == "flip":
            assert [i for i, byte in enumerate(left) if byte] == [int(said.split()[4])]
            assert not any(left[:40] + left[60:])
        elif how == "truncate":
            assert 40 <= len(left) < 60


def test_ulps_and_slopes(load_script):
    count, slope = load_script("stress/fault_injection").count_ulps, load_script("stress/soak").find_slope
    one = np.float32(1)
    assert count(one, np.nextafter(one, np.float32(2))) == 1
    assert count(np.float32(0.0), np.float32(-0.0)) == 0
    tiny = np.nextafter(np.float32(0), one)
    assert count(tiny, -tiny) == 2
    assert count(np.array([1, 7]), np.array([1, 4])) == 3
    assert slope([(0.0, 10), (1.0, 12), (2.0, 14)]) == pytest.approx(2)
    assert slope([(0.0, 10), (5.0, 10)]) == 0
