# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One history in metrics.jsonl whatever happened to the run, and trackers that cannot hurt it."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mesh_transformer.config import ConfigError, TrackConfig
from mesh_transformer.reports.metrics_log import (
    FILE,
    QUEUE_LINES,
    MetricsError,
    MetricsLog,
    Sink,
    Tracker,
    read_metrics,
)

ROOT = Path(__file__).parents[2]


def open_log(run_dir: Path, first_step: int = 0, **track) -> MetricsLog:
    return MetricsLog(run_dir, TrackConfig(**track), config={}, first_step=first_step)


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir / FILE)]


def test_lines_are_what_was_written(tmp_path):
    with open_log(tmp_path / "new" / "run") as log:
        log.train(1, {"loss": 2.5, "skipped": 0})
        log.evaluation(1, "stdlib", {"bits_per_byte": 1.25})
        log.event(1, "samples", 'a\u2028b\n"c"', {"parameters": 7})
    train, evaluation, event = read_metrics(log.path)
    assert all(line.pop("time") > 1e9 for line in (train, evaluation, event))
    assert train == {"step": 1, "kind": "train", "loss": 2.5, "skipped": 0}
    assert evaluation == {"step": 1, "kind": "evaluation", "set": "stdlib", "bits_per_byte": 1.25}
    assert event == {"step": 1, "kind": "event", "event": "samples", "text": 'a\u2028b\n"c"', "parameters": 7}


def test_a_line_is_there_when_written_not_when_closed(tmp_path):
    with open_log(tmp_path) as log:
        log.train(1, {"loss": 1.0})
        assert steps(tmp_path) == [1]


def test_numbers_of_numpy_and_numbers_that_are_not_finite(tmp_path):
    with open_log(tmp_path) as log:
        values = {"loss": np.float32("nan"), "grad_norm": float("inf"), "lr": np.float32(0.5), "n": np.int64(3)}
        log.train(1, {**values, "layers": np.array([1.0, -np.inf])})
    (line,) = read_metrics(log.path)
    assert (line["loss"], line["grad_norm"], line["lr"], line["n"], line["layers"]) == (None, None, 0.5, 3, [1.0, None])
    assert line["not_finite"] == {"loss": "nan", "grad_norm": "inf"}
    assert "NaN" not in log.path.read_text()


def test_resuming_cuts_off_what_comes_after(tmp_path):
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
    assert after[:-1] == [*before[:5], before[7]], "what stays is the same to the byte"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_log_that_need_not_be_cut_is_not_rewritten(tmp_path):
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
def test_a_last_line_that_a_crash_cut_short(tmp_path, cut):
    with open_log(tmp_path) as log:
        log.train(1, {"loss": 1.0})
        log.train(2, {"loss": 0.5})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + cut)
    assert steps(tmp_path) == [1, 2]
    with open_log(tmp_path, first_step=2) as log:
        log.train(3, {"loss": 0.25})
    assert log.path.read_bytes().startswith(whole)
    assert steps(tmp_path) == [1, 2, 3]


def test_killed_while_writing(tmp_path):
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
def test_damage_elsewhere_is_an_error_with_its_place(tmp_path, damage):
    path = tmp_path / FILE
    path.write_bytes(b'{"step": 1, "kind": "train"}\n' + damage + b'{"step": 2, "kind": "train"}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: not a line of metrics.*remove it"):
        read_metrics(path)
    before = path.read_bytes()
    with pytest.raises(MetricsError):
        open_log(tmp_path)
    assert path.read_bytes() == before


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / FILE) == []


def test_tensorboard_has_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with open_log(tmp_path, tensorboard=True) as log:
        log.train(3, {"loss": 2.0, "skipped": 4, "grad_norm": float("nan"), "layer_grad_norms": [1.0]})
        log.evaluation(3, "web", {"bits_per_byte": 1.5})
        log.event(3, "checkpoint", "saved")
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), {}
    while data:  # records: length (8 bytes), checksum (4), event, checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        scalars |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[12 + size + 4 :]
    assert scalars == {"train/loss": (3, 2.0), "train/skipped": (3, 4.0), "evaluation/web/bits_per_byte": (3, 1.5)}


@pytest.mark.parametrize(
    ("module", "track"), [("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb_project": "p"})]
)
def test_a_tracker_that_is_not_installed_is_said_before_anything_happens(tmp_path, monkeypatch, module, track):
    (tmp_path / FILE).write_text('{"step": 9, "kind": "train"}\n')
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs {module}: pip install 'mesh-transformer\[track\]'"):
        open_log(tmp_path, **track)
    assert steps(tmp_path) == [9]


def test_a_tracker_that_fails_is_off_and_said_once(capfd):
    seen = []

    def write(line):
        seen.append(line)
        raise OSError("network is down")

    tracker = Tracker("Example", lambda: Sink(write, lambda: None))
    for step in range(50):
        tracker.put({"step": step})
    tracker.close()
    assert len(seen) == 1
    assert capfd.readouterr().err == "Example failed and is off from here on: OSError: network is down\n"


def test_a_tracker_that_cannot_start_does_not_stop_training(capfd):
    def start() -> Sink:
        raise RuntimeError("no account")

    tracker = Tracker("Example", start)
    tracker.put({"step": 1})
    tracker.close()
    assert capfd.readouterr().err == "Example failed and is off from here on: RuntimeError: no account\n"


def test_a_tracker_that_hangs_neither_slows_nor_holds_up_the_end(capfd):
    entered, leave = threading.Event(), threading.Event()

    def write(line):
        entered.set()
        leave.wait(30)

    tracker = Tracker("Example", lambda: Sink(write, lambda: None))
    tracker.put({"step": 0})
    assert entered.wait(30)
    for step in range(QUEUE_LINES + 7):
        tracker.put({"step": step})
    assert tracker.dropped == 7
    closing = threading.Thread(target=tracker.close, args=(0.3,), daemon=True)
    closing.start()
    closing.join(20)
    held_up = closing.is_alive()
    leave.set()
    assert not held_up
    assert capfd.readouterr().err == f"Example did not finish in 0.3 s; {FILE} has what it did not send\n"


def test_a_slow_tracker_gets_all_that_fits(capfd):
    lines, go = [], threading.Event()

    def start() -> Sink:
        go.wait(30)
        return Sink(lines.append, lambda: lines.append("closed"))

    tracker = Tracker("Example", start)
    for step in range(QUEUE_LINES + 2):
        tracker.put({"step": step})
    threading.Timer(0.2, go.set).start()
    tracker.close()
    assert lines == [*({"step": step} for step in range(QUEUE_LINES)), "closed"]
    assert capfd.readouterr().err == f"Example was too slow for 2 lines; {FILE} has them\n"


def test_the_format_of_a_line_is_json_and_nothing_else(tmp_path):
    with open_log(tmp_path) as log:
        log.event(1, "samples", "é\x00\x7f\ud800")
    (raw,) = log.path.read_bytes().splitlines()
    assert raw.isascii()
    assert json.loads(raw)["text"] == "é\x00\x7f\ud800"
