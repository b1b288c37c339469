# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The stress test of resuming, with few faults: it passes on a real run, and reports problems."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]


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
    program = ROOT / "scripts" / "stress" / "resume.py"
    command = [program, tmp_path / "small.toml", "--kills", "2", "--terms", "1", "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["kills"], result["stops"], result["problems"]) == (2, 1, [])
    assert result["in_save"] >= 1
    assert result["resumes"] >= 1
    assert (result["not_from_latest"], result["ulps"]) == (0, 0)
    assert (result["repeated_sequences"], result["missing_sequences"]) == (0, 0)
    assert result["equal_checkpoints"] == result["checkpoints"] > 0


def test_problems_are_reported(load_script):
    program = load_script("stress/resume")
    assert program.format_result(program.Result(), False).endswith("passed")
    text = program.format_result(program.Result(problems=["a loss differs"]), False)
    assert "PROBLEM: a loss differs" in text
    assert text.endswith("failed")


def test_mesh_axes_of_the_second_attempt(load_script):
    program = load_script("stress/resume")
    assert program.parse_axes("fsdp=2,cpu_devices=4") == ["mesh.fsdp=2", "mesh.cpu_devices=4"]
    with pytest.raises(ValueError, match="expected AXIS=SIZE"):
        program.parse_axes("fsdp:2")
