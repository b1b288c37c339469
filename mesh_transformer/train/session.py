# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A training session: opens the data and the run of a configuration, trains, and prints progress and results."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBars

from mesh_transformer.config import Config, ConfigError, config_to_dict, config_to_toml
from mesh_transformer.data.dataset import Data, open_data
from mesh_transformer.distributed.coordination import process_count, process_index, run_on_all
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.reports.console import Progress, print_rows, print_scores
from mesh_transformer.reports.html_report import write_report
from mesh_transformer.reports.metrics_log import FILE, MetricsLog, read_metrics
from mesh_transformer.storage.atomic_files import replace_file
from mesh_transformer.storage.paths import AnyPath, RemotePath
from mesh_transformer.train.loop import MeasureFn, train
from mesh_transformer.train.pipeline import bubble_fraction
from mesh_transformer.train.provenance import write_provenance
from mesh_transformer.train.recorder import Recorder
from mesh_transformer.train.run import Run, open_run
from mesh_transformer.train.run_folder import RunFolder
from mesh_transformer.train.state import describe_state, format_parameters


def train_config(
    config: Config,
    layout: MeshLayout,
    stop: StopRequest,
    *,
    restart: bool = False,
    profile: tuple[int, int] | None = None,
    measure: MeasureFn | None = None,
) -> AnyPath:
    """Train as configured, with progress display, metrics and report, and return the run folder.

    `restart` renames the folder of an earlier run, `profile` gives the steps to trace, and `measure` runs evaluation tasks.
    Raises the errors of `open_data`, `open_run` and `train`.
    """
    if jax.process_count() != process_count():
        raise ConfigError(
            f"JAX reports {jax.process_count()} processes, but mesh.processes is not set; "
            "pass --set 'mesh.processes=\"auto\"'"
        )
    if not config.model.causal:
        raise ConfigError(
            "model.causal=false cannot be trained on next-token prediction, because each token attends to its own target; set "
            "model.causal=true, or add an encoder to a decoder with model.n_encoder_layers"
        )
    is_main = process_index() == 0
    console = Console(quiet=not is_main)
    with RunFolder(config, lambda text: _print_line(console, text)) as folder:
        if restart:
            run_on_all("archive run", lambda: _archive_run(folder.location, console), first_only=True)
        with stop.interruptible("building the data"), data_progress(console) as on_progress:
            data = open_data(config, on_progress=on_progress)
        run = open_run(config, data, layout, log=console.print, folder=folder)
        stop.raise_if_requested("opening the run")
        first = run.step
        if is_main:
            run.dir.mkdir(parents=True, exist_ok=True)
            replace_file(run.dir / "config.toml", config_to_toml(config).encode())
            write_provenance(run.dir, config, data, run.environment, first)
        _print_summary(run, data, console)
        with (
            MetricsLog(run.dir, config.track, config=config_to_dict(config), first_step=first) as log,
            Progress(run.dir.name, config.train.steps, first, console=console) as progress,
        ):
            log.event(first, "started", f"from step {first}", {"parameters": run.n_params})
            for note in run.notes:
                log.event(first, "resumed", note)
            train(run, Recorder(run, log, progress), stop, profile=profile, measure=measure)
            log.event(run.step, "done", f"trained to step {run.step}")
        if is_main:
            write_report(run.dir)
            print_scores(console, _last_scores(run.dir))
    return folder.location


@contextmanager
def data_progress(console: Console) -> Iterator[Callable[[str, int, int, float], None]]:
    """Show progress bars while shards are built; yields the `on_progress` argument of `open_data`."""
    columns = (TextColumn("tokenizing {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with ProgressBars(*columns, console=console) as bars:
        tasks = {}

        def on_progress(name: str, done: int, total: int, seconds: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield on_progress


def _archive_run(run_dir: AnyPath, console: Console) -> None:
    """Rename the folder of an earlier run to the first free name."""
    if isinstance(run_dir, RemotePath):
        if run_dir.exists():
            raise ConfigError(
                f"--restart: {run_dir} contains a run, and folders of an object store cannot be renamed; "
                "choose another run.dir"
            )
    elif run_dir.exists():
        number = next(n for n in range(1, 10_000) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
        archived = run_dir.with_name(f"{run_dir.name}.{number}")
        os.rename(run_dir, archived)
        console.print(f"the earlier run was renamed to {archived}")


def _print_summary(run: Run, data: Data, console: Console) -> None:
    config, mesh = run.config, run.layout.mesh
    shapes, axes = describe_state(config)
    _print_line(console, format_parameters(shapes, axes, run.layout))
    tokens = config.train.batch_size * config.model.seq_len
    flops = run.flops_per_sequence * config.train.batch_size
    devices = [f"{mesh.size} x {mesh.devices.flat[0].device_kind}"]
    devices += [f"{axis} {size}" for axis, size in mesh.shape.items()]
    if process_count() > 1:
        devices.append(f"in {process_count()} processes")
    validation = ", ".join(f"{name} {held_out.n_bytes:,} bytes" for name, held_out in data.validation.items())
    rows = {
        "run": str(run.folder.location),
        "model": f"{run.n_params:,} parameters, {config.model.n_layers} layers, d_model {config.model.d_model}",
        "devices": ", ".join(devices),
        "data": f"{data.train.n_tokens:,} tokens; validation: {validation or 'none'}",
        "steps": f"{config.train.steps} x {tokens:,} tokens = {config.train.steps * tokens:,}, {flops:.3g} FLOPs each",
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }
    if config.mesh.pipeline > 1:
        rows["pipeline"] = f"{config.mesh.pipeline_schedule}, bubble {bubble_fraction(config):.0%}"
    print_rows(console, "", rows)
    for note in [*data.notes, *run.notes]:
        _print_line(console, note)


def _print_line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _last_scores(run_dir: Path) -> dict[str, dict[str, Any]]:
    return {line["set"]: line for line in read_metrics(run_dir / FILE) if line["kind"] == "evaluation"}
