# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Some cases of scripts/stress/sharding.py: a mesh trains like one device, in one process and in several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("processes", "devices", "mesh", "feature"),
    [
        (1, 8, "fsdp=2 context=2 tensor=2 sequence_parallel", "local, packed, remat"),
        (1, 8, "pipeline=2 context=2 tensor=2 sequence_parallel", "local, packed, remat"),
        (1, 8, "pipeline=2 context=2 tensor=2 sequence_parallel", "norm of all heads"),
        (1, 8, "fsdp=2 context=2 tensor=2 sequence_parallel", "norm of each head"),
        (1, 8, "fsdp=2 context=2 tensor=2 sequence_parallel", "two rotations"),
        (2, 4, "pipeline=2 tensor=2", "tied"),
        (2, 4, "expert=2 tensor=2", "experts, capacity"),
        (1, 8, "expert=2 context=2 tensor=2 sequence_parallel", "latent attention, groups of experts"),
        (1, 8, "expert=2 context=2 tensor=2 sequence_parallel", "sinks, experts with biases"),
    ],
)
def test_mesh_trains_like_one_device(processes, devices, mesh, feature):
    command = [sys.executable, str(ROOT / "scripts/stress/sharding.py"), "--json", "--processes", str(processes)]
    case_name = f"{devices} devices: {mesh:<56} {feature}"
    done = subprocess.run([*command, "--only", case_name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (case,) = map(json.loads, (line for line in done.stdout.splitlines() if line.startswith("{")))
    assert 0 < case["gradient"] < 1e-5, case  # not zero: another program rounds differently
    assert case["loss"] < 1e-5
    assert case["parameter"] < 1e-5
