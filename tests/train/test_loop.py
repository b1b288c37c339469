# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests that training continues while its disk is full, read-only, forbidden or slow, and that its files recover."""

import contextlib
import os
import subprocess
import time
from concurrent import futures

import numpy as np
import pytest
from rich.console import Console
from tiny_run import write_tiny_run

from mesh_transformer.config import load_config
from mesh_transformer.data.dataset import open_data
from mesh_transformer.mesh import make_layout
from mesh_transformer.reports.console import Progress
from mesh_transformer.reports.metrics_log import MetricsLog, read_metrics
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.train import recorder
from mesh_transformer.train.data_log import digest_tokens, effective_history, read_log
from mesh_transformer.train.loop import train
from mesh_transformer.train.recorder import Recorder
from mesh_transformer.train.run import open_run


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_bytes(rng.integers(97, 105, 6000, np.uint8).tobytes())
    path = folder / "small.toml"
    write_tiny_run(
        path,
        folder / "text.txt",
        "runs/unused",
        mesh=dict(data=8),
        optimizer=dict(name="sgd"),
        train=dict(steps=16, batch_size=8),
        track=dict(sequences=True),
    )
    return path


class ActingProgress(Progress):
    """Runs an action after the metrics of a step are displayed."""

    def __init__(self, *args, actions=(), **options):
        super().__init__(*args, **options)
        self.actions, self.notes = dict(actions), []

    def update(self, step, values):
        super().update(step, values)
        if step in self.actions:
            self.actions.pop(step)()

    def note(self, text):
        self.notes.append(text)


def train_run(run, actions=()):
    """Train, and return the printed notes."""
    config = run.config
    run.dir.mkdir(exist_ok=True)
    with (
        MetricsLog(run.dir, config.track, config={}, first_step=run.step) as log,
        ActingProgress("test", config.train.steps, run.step, console=Console(quiet=True), actions=actions) as progress,
    ):
        train(run, Recorder(run, log, progress))
    return progress.notes


def events(run_dir, kind):
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line.get("event") == kind]


def losses(run_dir):
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory):
    config = load_config(config_file, [f'run.dir="{tmp_path_factory.mktemp("run")}"'])
    run = open_run(config, open_data(config), make_layout(config.mesh))
    notes = train_run(run)
    assert not any("SAVE FAILED" in note for note in notes)
    assert [line["text"] for line in events(run.dir, "checkpoint")] == [f"step {i} saved" for i in range(2, 17, 2)]
    return run


def test_training_survives_disk_errors(config_file, undisturbed, small_disk, monkeypatch):
    """The disk is full, out of inodes, forbidden and slow, one after the other, with asynchronous saves."""
    monkeypatch.setattr(recorder, "SLOW_SECONDS", 0.2)
    config = load_config(config_file, [f'run.dir="{small_disk / "run"}"'])
    assert config.checkpoint.async_save
    run = open_run(config, open_data(config), make_layout(config.mesh))
    ballast, folder = small_disk / "ballast", small_disk / "files"
    folder.mkdir()
    small_disk.chmod(0o755)

    def await_save():
        if run.store._pending:
            futures.wait([run.store._pending])  # the earlier save must end under its own condition

    def fill_disk():
        await_save()
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def use_up_files():
        await_save()
        ballast.unlink()
        with contextlib.suppress(OSError):
            for i in range(10**6):
                (folder / str(i)).touch()

    def forbid():
        await_save()
        for path in folder.iterdir():
            path.unlink()
        os.seteuid(65534)

    def slow_down():
        run.store._executor.submit(time.sleep, 0.5)  # the next save waits for this

    actions = {3: fill_disk, 5: use_up_files, 7: forbid, 9: lambda: os.seteuid(0), 11: slow_down}
    try:
        notes = train_run(run, actions)
    finally:
        os.seteuid(0)
    failed = events(run.dir, "save failed")
    assert {line["step"] for line in failed} >= {4, 6, 8}
    for step, words in ((4, "No space left"), (6, "No space left"), (8, "Permission denied")):
        text = next(line["text"] for line in failed if line["step"] == step)
        assert words in text
        assert "training continues" in text
        assert text in notes
    assert run.store.steps() == [14, 16]
    assert all(run.store.verify(step) == [] for step in (14, 16))
    assert sorted(os.listdir(run.dir)) == ["checkpoints", "metrics.jsonl", "report.html", "sequences.jsonl"]
    assert sorted(os.listdir(run.dir / "checkpoints")) == ["step_14", "step_16"]
    assert losses(run.dir) == losses(undisturbed.dir), "every step is logged exactly once"
    assert 14 in [line["step"] for line in events(run.dir, "slow disk")]
    assert "<details open>" in (run.dir / "report.html").read_text()
    assert "<details open>" not in (undisturbed.dir / "report.html").read_text()
    counted = effective_history(read_log(run.dir))
    assert list(counted) == list(range(1, 17))
    assert counted == effective_history(read_log(undisturbed.dir))


def test_a_failed_last_save_is_raised(config_file, undisturbed, small_disk, tmp_path):
    """Only the checkpoints are on the disk, and saves are synchronous."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(small_disk)
    config = load_config(config_file, [f'run.dir="{tmp_path / "run"}"', "checkpoint.async_save=false"])
    run = open_run(config, open_data(config), make_layout(config.mesh))

    def remount(how):
        return lambda: subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    with pytest.raises(CheckpointError, match=r"step 16 was not saved.*Read-only"):
        train_run(run, {3: remount("ro"), 5: remount("rw"), 15: remount("ro")})
    remount("rw")()
    assert [line["step"] for line in events(run.dir, "save failed")] == [4, 16]
    assert sorted(os.listdir(small_disk)) == ["step_12", "step_14"]
    assert losses(run.dir) == losses(undisturbed.dir)


def test_data_log_matches_the_data(undisturbed):
    loader, counted = undisturbed.data.train, effective_history(read_log(undisturbed.dir))
    sequences = [sequence for batch in counted.values() for sequence in batch.sequences]
    assert len(sequences) == len(set(sequences)) == 16 * 8, "each sequence is used once in an epoch"
    for batch in counted.values():
        assert digest_tokens(loader.read_sequences(batch.sequences).tokens) == batch.digest
        assert digest_tokens(loader.read_sequences(batch.sequences[::-1]).tokens) != batch.digest


def test_effective_history_of_several_attempts():
    first = (0, {1: "a", 2: "b", 3: "c"})
    assert effective_history([first]) == {1: "a", 2: "b", 3: "c"}
    assert effective_history([first, (2, {3: "d"}), (3, {}), (3, {4: "e"})]) == {1: "a", 2: "b", 3: "d", 4: "e"}
    assert effective_history([first, (1, {})]) == {1: "a"}
