# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""End-to-end tests: train, stop by a signal, resume to the same bits, resume on another mesh, sample, plan."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_run import write_tiny_run

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.cli import Preempted
from mesh_transformer.config import Config, ConfigError, load_config
from mesh_transformer.data.dataset import open_data
from mesh_transformer.mesh import make_layout
from mesh_transformer.reports.console import Progress
from mesh_transformer.reports.metrics_log import MetricsLog, read_metrics
from mesh_transformer.train.loop import train
from mesh_transformer.train.recorder import Recorder
from mesh_transformer.train.run import open_run
from mesh_transformer.train.state import describe_state, flatten_state, state_shardings

ROOT = Path(__file__).parents[1]
WORDS = ["the", "mesh", "of", "devices", "holds", "every", "layer", "and", "each", "token", "knows", "its", "index"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("journey")
    rng = np.random.default_rng(0)
    for i in range(12):
        text = folder / "texts" / f"{i}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text(" ".join(rng.choice(WORDS, 400)) + "\n")
    path = folder / "tiny.toml"
    write_tiny_run(
        path,
        folder / "texts",
        folder / "run",
        model=dict(n_layers=2, d_model=32, n_heads=4, seq_len=32, dropout=0.1),
        data=dict(holdout_one_in=4),
        optimizer=dict(learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=2),
        train=dict(
            steps=20,
            batch_size=8,
            grad_accum_steps=2,
            log_grad_noise_scale=True,
            evaluate_every=6,
            evaluate_batches=1,
        ),
        checkpoint=dict(every=7, keep_last=4),
        sample=dict(prompts=["the mesh"], max_tokens=12),
    )
    return path


class StoppingProgress(Progress):
    """Sends SIGTERM to this process after the display of step `stop_at`."""

    stop_at = 10

    def update(self, step, values):
        super().update(step, values)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def run_training(config: Config, progress_class: type[Progress] = Progress) -> list[str]:
    """Train in this process, and return the notes on how the state was initialized."""
    layout = make_layout(config.mesh)
    run = open_run(config, open_data(config), layout, log=print)
    with (
        MetricsLog(run.dir, config.track, config={}, first_step=run.step) as log,
        progress_class("test", config.train.steps, run.step, console=Console(quiet=True)) as progress,
    ):
        train(run, Recorder(run, log, progress))
    return run.notes


def read_state(config: Config, step: int) -> dict[str, np.ndarray]:
    layout = make_layout(config.mesh)
    shapes, axes = describe_state(config)
    shardings = state_shardings(layout, shapes, axes)
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    named = Store(Path(config.run.dir) / "checkpoints").restore(step, flatten_state(like))
    return {name: np.asarray(array) for name, array in named.items()}


def train_losses(config: Config) -> dict[int, float]:
    lines = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def load(config_file: Path, run: str, *overrides: str) -> Config:
    return load_config(config_file, [f'run.dir="{config_file.parent / run}"', *overrides])


MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


@pytest.fixture(scope="module")
def straight(config_file) -> Config:
    config = load(config_file, "straight", *MESH)
    run_training(config)
    return config


def test_resumed_is_bit_equal_to_uninterrupted(config_file, straight):
    config = load(config_file, "stopped", *MESH)
    with pytest.raises(Preempted, match=r"SIGTERM: saved step 1[01] of 20"):
        run_training(config, StoppingProgress)
    stopped_at = max(train_losses(config))
    assert 10 <= stopped_at <= 11
    notes = run_training(config)
    assert any("resumed from" in note for note in notes)
    uninterrupted = read_state(straight, 20)
    resumed = read_state(config, 20)
    assert any(name.startswith("opt_state/") and name.endswith("w_q") for name in uninterrupted)
    assert uninterrupted.keys() == resumed.keys()
    for name, array in uninterrupted.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    assert train_losses(config) == train_losses(straight)
    assert list(train_losses(config)) == list(range(1, 21)), "the metrics log has every step once"


def test_resumed_on_another_mesh_has_the_same_losses(config_file, straight):
    config = load(config_file, "moved", *MESH)
    with pytest.raises(Preempted):
        run_training(config, StoppingProgress)
    moved = load(config_file, "moved", "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")
    assert make_layout(moved.mesh).mesh.shape != make_layout(config.mesh).mesh.shape
    run_training(moved)
    expected = train_losses(straight)
    losses = train_losses(moved)
    steps = range(1, 21)
    np.testing.assert_allclose([losses[step] for step in steps], [expected[step] for step in steps], rtol=2e-5)


def test_a_finished_run_only_evaluates(config_file, straight):
    before = read_state(straight, 20)
    run_training(straight)
    np.testing.assert_equal(read_state(straight, 20), before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_layers=3", "model.n_layers = 2"),
        ("run.seed=1", "run.seed = 0"),
        ("train.batch_size=16", "train.batch_size = 8"),
        ("data.holdout_one_in=5", "data.holdout_one_in = 4"),
    ],
)
def test_resuming_with_another_config_is_refused(config_file, straight, override, message):
    config = load(config_file, "straight", *MESH, override)
    with pytest.raises(ConfigError, match=message) as caught:
        open_run(config, open_data(config), make_layout(config.mesh))
    assert "--restart" in str(caught.value)


@pytest.mark.parametrize("load_optimizer_state", [False, True])
def test_a_run_starts_from_the_weights_of_another(config_file, straight, load_optimizer_state):
    start = (f'run.init_from="{straight.run.dir}"', f"run.load_optimizer_state={str(load_optimizer_state).lower()}")
    config = load(
        config_file, "tuned", "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2", "optimizer.learning_rate=1e-3", *start
    )
    run = open_run(config, open_data(config), make_layout(config.mesh))
    assert run.carried == {}, "the other run is no converted model"
    before = read_state(straight, 20)
    after = {name: np.asarray(array) for name, array in flatten_state(run.state).items()}
    assert run.step == 0
    assert any("started from the params" in note for note in run.notes)
    moments = [name for name in before if name.startswith("opt_state/1/")]
    assert len(moments) > 10
    assert any(np.any(before[name]) for name in moments)
    for name in before:
        if name.startswith("params/") or (load_optimizer_state and name in moments):
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
        elif name.startswith("opt_state/"):
            assert not np.any(after[name]), name


def test_starting_from_another_model_is_refused(config_file, straight):
    start = (f'run.init_from="{straight.run.dir}"', 'model.activation="relu"', "model.n_heads=2")
    config = load(config_file, "other", *MESH, *start)
    with pytest.raises(ConfigError, match=r'model\.activation = "relu" \(checkpoint: "gelu-tanh"\)'):
        open_run(config, open_data(config), make_layout(config.mesh))


def test_consecutive_skipped_steps_stop_the_run_and_save_it(config_file):
    config = load(
        config_file,
        "bad",
        "optimizer.learning_rate=1e30",
        "optimizer.clip_norm=0.0",
        "train.max_consecutive_skips=3",
        "mesh.data=1",
    )
    layout = make_layout(config.mesh, jax.devices()[:1])
    run = open_run(config, open_data(config), layout)
    with (
        MetricsLog(run.dir, config.track, config={}, first_step=0) as log,
        Progress("bad", 20, 0, console=Console(quiet=True)) as progress,
        pytest.raises(RuntimeError, match=r"3 consecutive steps were skipped.*sequences \d+ to \d+"),
    ):
        train(run, Recorder(run, log, progress))
    saved = read_state(config, max(run.store.steps()))
    assert all(np.isfinite(array).all() for name, array in saved.items() if name.startswith("params/"))
    skipped = [line for line in read_metrics(run.dir / "metrics.jsonl") if line.get("event") == "skipped"]
    assert len(skipped) >= 3


def call(*arguments: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True, **options
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_commands(config_file):
    """Use the programs as a user does: train, interrupt during compilation, continue, sample, plan, mistype a field."""
    run_dir_override = f'run.dir="{config_file.parent / "command"}"'
    process = call("device_train.py", config_file, "--set", run_dir_override)
    while "compiling" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 75, err
    assert "run the same command again to continue" in err

    started = time.monotonic()
    status, out, err = finish(
        call("device_train.py", config_file, "--set", run_dir_override, "--set", "mesh.cpu_devices=4")
    )
    assert status == 0, err
    assert "held-out bits per byte" in out
    assert "python device_sample.py" in out
    assert "resumed from" in out
    assert time.monotonic() - started < 300
    run_dir = config_file.parent / "command"
    assert "<svg" in (run_dir / "report.html").read_text()
    assert load_config(run_dir / "config.toml").train.steps == 20

    sample = ("device_sample.py", run_dir, "--prompt", "the ", "--n", 2, "--max-tokens", 8, "--json")
    status, out, err = finish(call(*sample))
    assert status == 0, err
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 2
    assert all(len(record["tokens"]) <= 8 and record["prompt"] == "the " for record in records)

    topology = ("--topology", "cpu-4", "--set", "mesh.fsdp=2", "--json")
    status, out, err = finish(call("device_plan.py", config_file, *topology))
    assert status == 0, err
    plan = json.loads(out)
    assert plan["devices"] == 4
    assert plan["bytes_by_kind"]["parameters"] < 4 * plan["parameters"]

    status, out, err = finish(call("device_train.py", config_file, "--set", "train.stepz=3"))
    assert (status, out) == (2, "")
    assert "did you mean 'steps'" in err
