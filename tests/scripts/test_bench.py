# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of scripts/bench: every program starts, and the tables are computed from the measurements as documented."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "scripts/bench").glob("*.py") if path.stem != "__init__")
OLD_PATHS = sorted(path.stem for path in (ROOT / "scripts").glob("bench_*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_names_the_program(name, load_script, capsys):
    with pytest.raises(SystemExit) as end:
        load_script(f"bench/{name}").main(["--help"])
    assert end.value.code == 0
    assert f"python scripts/bench/{name}.py" in capsys.readouterr().out


def test_old_paths_run_the_benchmarks():
    assert OLD_PATHS == ["bench_checkpoint", "bench_data", "bench_sample", "bench_train"]
    command = [sys.executable, "scripts/bench_sample.py", "--cache", "int8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--cache was renamed: use --kv-cache-dtype" in done.stderr


def test_gain_of_experts_is_interpolated(load_script):
    moe = load_script("bench/moe")
    dense = [moe.Point(10, 1.0, 3.0), moe.Point(20, 2.0, 2.0), moe.Point(20, 2.0, 2.1)]
    experts = [moe.Point(10, 2.0, 2.5), moe.Point(20, 4.0, 1.5), moe.Point(20, 4.0, 1.6)]
    text = moe.format_gain({"dense": [dense, dense], "experts": [experts]})
    assert "at step 15: 0.75 of its steps, 1.50 of its time" in text
    assert "do not reach" in moe.format_gain({"dense": [experts], "experts": [dense]})


def test_a_median_round_has_the_worst_memory_and_difference(load_script):
    rounds = [
        {"ratio": ratio, "peak_memory_mb": memory, "max_logit_difference": difference}
        for ratio, memory, difference in ((0.9, 300, 1e-5), (0.5, 200, 3e-5), (0.7, 100, 2e-5))
    ]
    assert load_script("bench/reshard").median_round(rounds) == {
        "ratio": 0.7,
        "peak_memory_mb": 300,
        "max_logit_difference": 3e-5,
    }


def test_a_projection_grows_with_bytes_or_documents(load_script):
    data = load_script("bench/data")
    builds = [
        {"mb": 1.0, "documents": 10, "stages": {"filter": 3.0, "removals": 1.0}},
        {"mb": 3.0, "documents": 30, "stages": {"filter": 7.0, "removals": 5.0}},
    ]
    first, *_, last = data.project(builds)
    filter_seconds = 2.0 * data.PILE_MB  # 2 seconds per MB; the first second is start-up
    removal_hours = 0.2 * data.PILE_DOCUMENTS / 3600  # one task on any number of machines
    assert first["stages"]["filter"] == pytest.approx(filter_seconds / 32 / 3600)
    assert last["stages"]["filter"] == pytest.approx(filter_seconds / (128 * 32) / 3600)
    assert first["stages"]["removals"] == last["stages"]["removals"] == pytest.approx(removal_hours)
    assert data.project(builds[:1]) == []
