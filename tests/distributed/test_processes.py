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
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert (report["kills"], report["others named the one killed"]) == (1, 1)
    assert report["seconds until the others had stopped, most"] < 60
    assert report["examples seen"] == 8 * report["steps"]
    assert report["examples seen twice"] == report["examples never seen"] == 0
    assert 0 < report["largest relative difference of losses"] < 1e-6
