# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One history in metrics.jsonl whatever happened to the run, and trackers that cannot hurt it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mesh_transformer.config import TrackConfig
from mesh_transformer.reports.metrics_log import FILE, MetricsError, MetricsLog, read_metrics

ROOT = Path(__file__).parents[2]


def open_log(run_dir: Path, first_step: int = 0, **track) -> MetricsLog:
    return MetricsLog(run_dir, TrackConfig(**track), config={}, first_step=first_step)


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir / FILE)]


def test_lines_round_trip(tmp_path):
    with open_log(tmp_path / "new" / "run") as log:
        log.train(1, {"loss": 2.5, "skipped": 0})
        log.evaluation(1, "stdlib", {"bits_per_byte": 1.25})
        log.event(1, "samples", 'a\u2028b\n"c"', {"parameters": 7})
    train, evaluation, event = read_metrics(log.path)
    assert all(line.pop("time") > 1e9 for line in (train, evaluation, event))
    assert train == {"step": 1, "kind": "train", "loss": 2.5, "skipped": 0}
    assert evaluation == {"step": 1, "kind": "evaluation", "set": "stdlib", "bits_per_byte": 1.25}
    assert event == {"step": 1, "kind": "event", "event": "samples", "text": 'a\u2028b\n"c"', "parameters": 7}


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path):
    with open_log(tmp_path) as log:
        log.train(1, {"loss": 1.0})
        assert steps(tmp_path) == [1]


def test_numpy_and_non_finite_numbers(tmp_path):
    with open_log(tmp_path) as log:
        values = {"loss": np.float32("nan"), "grad_norm": float("inf"), "lr": np.float32(0.5), "n": np.int64(3)}
        log.train(1, {**values, "layers": np.array([1.0, -np.inf])})
    (line,) = read_metrics(log.path)
    assert (line["loss"], line["grad_norm"], line["lr"], line["n"], line["layers"]) == (None, None, 0.5, 3, [1.0, None])
    assert line["not_finite"] == {"loss": "nan", "grad_norm": "inf"}
    assert "NaN" not in log.path.read_text()


def test_resuming_removes_later_lines(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(1, 8):
            log.train(step, {"loss": 1.0 / step})
        log.event(5, "checkpoint", "step 5 saved")
    before = log.path.read_bytes().splitlines(keepends=True)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 5]
    with open_log(tmp_path, first_step=5) as log:
        log.train(6, {"loss": 9.0})
    after = log.path.read_bytes().splitlines(keepends=True)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 5, 6]
    assert after[:-1] == [*before[:5], before[7]], "retained lines are the same to the byte"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_log_without_later_lines_is_not_rewritten(tmp_path):
    with open_log(tmp_path) as log:
        log.train(1, {"loss": 1.0})
    before = log.path.stat().st_ino
    with open_log(tmp_path, first_step=1):
        pass
    assert log.path.stat().st_ino == before
    with open_log(tmp_path, first_step=0):
        pass
    assert log.path.read_bytes() == b""


@pytest.mark.parametrize(
    "cut", [b'{"step": 3, "ki', b'{"step": 3, "kind": "train", "loss": 1.0}', b"\x00\x00\x00", b"\xe2\x80"]
)
def test_an_incomplete_last_line_is_ignored(tmp_path, cut):
    with open_log(tmp_path) as log:
        log.train(1, {"loss": 1.0})
        log.train(2, {"loss": 0.5})
    complete = log.path.read_bytes()
    log.path.write_bytes(complete + cut)
    assert steps(tmp_path) == [1, 2]
    with open_log(tmp_path, first_step=2) as log:
        log.train(3, {"loss": 0.25})
    assert log.path.read_bytes().startswith(complete)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_killed_writer_loses_no_line(tmp_path):
    program = f"""
import itertools
from pathlib import Path
from mesh_transformer.config import TrackConfig
from mesh_transformer.reports.metrics_log import MetricsLog
with MetricsLog(Path({str(tmp_path)!r}), TrackConfig(), config={{}}, first_step=0) as log:
    for step in itertools.count(1):
        log.train(step, {{"loss": 1.0}})
        if step == 500:
            print("going", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "going\n"
        writer.send_signal(signal.SIGKILL)
    written = steps(tmp_path)
    assert len(written) >= 500
    assert written == list(range(1, len(written) + 1))


@pytest.mark.parametrize("damage", [b"{garbage\n", b"[1]\n", b'{"kind": "train"}\n', b"\n", b"\xff\xfe\n"])
def test_damage_before_the_last_line_is_an_error_with_its_line(tmp_path, damage):
    path = tmp_path / FILE
    path.write_bytes(b'{"step": 1, "kind": "train"}\n' + damage + b'{"step": 2, "kind": "train"}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: not a metrics line.*remove the line"):
        read_metrics(path)
    before = path.read_bytes()
    with pytest.raises(MetricsError):
        open_log(tmp_path)
    assert path.read_bytes() == before


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / FILE) == []


def test_lines_are_ascii_json(tmp_path):
    with open_log(tmp_path) as log:
        log.event(1, "samples", "é\x00\x7f\ud800")
    (raw,) = log.path.read_bytes().splitlines()
    assert raw.isascii()
    assert json.loads(raw)["text"] == "é\x00\x7f\ud800"
