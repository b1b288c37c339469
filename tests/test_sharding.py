# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A few rows of scripts/stress/sharding.py: sharded = one device after five steps, in one process and in several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("processes", "devices", "mesh", "feature"),
    [
        (1, 8, "fsdp=2 context=2 tensor=2 sequence_parallel", "local, packed, remat"),
        (1, 8, "pipeline=2 context=2 tensor=2 sequence_parallel", "local, packed, remat"),
        (2, 4, "pipeline=2 tensor=2", "tied"),
        (2, 4, "expert=2 tensor=2", "experts with seats"),
    ],
)
def test_rows_of_the_grid(processes, devices, mesh, feature):
    command = [sys.executable, str(ROOT / "scripts/stress/sharding.py"), "--json", "--processes", str(processes)]
    row_name = f"{devices} devices: {mesh:<56} {feature}"
    done = subprocess.run([*command, "--only", row_name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (row,) = map(json.loads, (line for line in done.stdout.splitlines() if line.startswith("{")))
    assert 0 < row["gradient"] < 1e-5, row  # not zero: another program
    assert row["loss"] < 1e-5
    assert row["parameter"] < 1e-5
