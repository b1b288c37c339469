# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""End-to-end test of runs of several processes: killed, preempted, and moved to another number of processes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_preempted_and_moved():
    """One process of two is killed, then one gets SIGTERM, then one process finishes alone on another mesh."""
    command = [sys.executable, ROOT / "scripts" / "stress" / "processes.py", "--json", "--trials", "1"]
    moves = ["--moves", "2:data=2,fsdp=2", "1:tensor=2,fsdp=2"]
    done = subprocess.run([*command, *moves], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert (result["kills"], result["killed_process_named"]) == (1, 1)
    assert result["max_stop_seconds"] < 60
    assert result["examples"] == 8 * result["steps"]
    assert result["repeated_examples"] == result["missing_examples"] == 0
    assert 0 < result["max_loss_difference"] < 1e-6
