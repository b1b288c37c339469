# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Trackers: TensorBoard receives the scalars; a missing, failing, hanging or slow tracker does not affect training."""

import sys
import threading
from pathlib import Path

import pytest

from mesh_transformer.config import ConfigError, TrackConfig
from mesh_transformer.reports.metrics_log import FILE, MetricsLog, read_metrics
from mesh_transformer.reports.trackers import QUEUE_LINES, Sink, Tracker


def open_log(run_dir: Path, **track) -> MetricsLog:
    return MetricsLog(run_dir, TrackConfig(**track), config={}, first_step=0)


def test_tensorboard_has_the_scalars(tmp_path):
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
def test_a_missing_tracker_is_an_error_before_the_log_is_opened(tmp_path, monkeypatch, module, track):
    (tmp_path / FILE).write_text('{"step": 9, "kind": "train"}\n')
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs {module}: pip install 'mesh-transformer\[track\]'"):
        open_log(tmp_path, **track)
    assert [line["step"] for line in read_metrics(tmp_path / FILE)] == [9]


def test_a_failing_tracker_is_disabled_and_warns_once(capfd):
    written = []

    def write(line):
        written.append(line)
        raise OSError("network is down")

    tracker = Tracker("Example", lambda: Sink(write, lambda: None))
    for step in range(50):
        tracker.put({"step": step})
    tracker.close()
    assert len(written) == 1
    assert (
        capfd.readouterr().err
        == f"Example failed and is disabled for the rest of the run (OSError: network is down); {FILE} has all lines\n"
    )


def test_a_tracker_that_cannot_start_does_not_stop_training(capfd):
    def start() -> Sink:
        raise RuntimeError("no account")

    tracker = Tracker("Example", start)
    tracker.put({"step": 1})
    tracker.close()
    assert (
        capfd.readouterr().err
        == f"Example failed and is disabled for the rest of the run (RuntimeError: no account); {FILE} has all lines\n"
    )


def test_a_hanging_tracker_does_not_delay_training_or_its_end(capfd):
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
    is_delayed = closing.is_alive()
    leave.set()
    assert not is_delayed
    assert (
        capfd.readouterr().err
        == f"Example did not finish within 0.3 s, so its last lines were not sent; {FILE} has all lines\n"
    )


def test_a_slow_tracker_gets_all_lines_of_the_queue(capfd):
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
    assert capfd.readouterr().err == f"Example was too slow, so 2 lines were not sent; {FILE} has all lines\n"
