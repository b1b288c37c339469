# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A training run from a configuration to its last checkpoint, as a person sees it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

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
from mesh_transformer.train.loop import MeasureFn, Recorder, train
from mesh_transformer.train.pipeline import bubble_fraction
from mesh_transformer.train.provenance import write_provenance
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
    """Train, with display, metrics and report; the run folder. Raises what `open_data`, `open_run` and `train` raise."""
    if jax.process_count() != process_count():
        raise ConfigError(
            f"JAX sees {jax.process_count()} processes that nobody has introduced; say so: --set 'mesh.processes=\"auto\"'"
        )
    speaks = process_index() == 0
    console = Console(quiet=not speaks)
    with RunFolder(config, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)) as folder:
        if restart:
            run_on_all("put aside", lambda: _put_aside(folder.location, console), first_only=True)
        with stop.interruptible("the data was made"), data_progress(console) as report:
            data = open_data(config, on_progress=report)
        run = open_run(config, data, layout, log=console.print, folder=folder)
        stop.raise_if_requested("the run was opened")
        first = run.step
        if speaks:
            run.dir.mkdir(parents=True, exist_ok=True)
            replace_file(run.dir / "config.toml", config_to_toml(config).encode())
            write_provenance(run.dir, config, data, run.environment, first)
        _introduce(run, data, console)
        with (
            MetricsLog(run.dir, config.track, config=config_to_dict(config), first_step=first) as log,
            Progress(run.dir.name, config.train.steps, first, console=console) as progress,
        ):
            log.event(first, "started", f"from step {first}", {"parameters": run.n_params})
            for note in run.notes:
                log.event(first, "resumed", note)
            train(run, Recorder(run, log, progress), stop, profile=profile, measure=measure)
            log.event(run.step, "done", f"trained to step {run.step}")
        if speaks:
            write_report(run.dir)
            print_scores(console, _last_scores(run.dir))
    return folder.location


@contextmanager
def data_progress(console: Console) -> Iterator:
    """A bar while shards are made; the argument of `open_data`'s `report`."""
    columns = (TextColumn("tokenizing {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=console) as bar:
        tasks = {}

        def report(name: str, done: int, total: int, seconds: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield report


def _put_aside(run_dir: AnyPath, console: Console) -> None:
    """Rename an earlier run's folder to the first free name."""
    if isinstance(run_dir, RemotePath):
        if run_dir.exists():
            raise ConfigError(
                f"--fresh: {run_dir} holds a run, and an object store renames nothing; use another run.dir"
            )
    elif run_dir.exists():
        number = next(n for n in range(1, 10_000) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
        kept = run_dir.with_name(f"{run_dir.name}.{number}")
        os.rename(run_dir, kept)
        console.print(f"the earlier run is kept in {kept}")


def _introduce(run: Run, data: Data, console: Console) -> None:
    config, mesh = run.config, run.layout.mesh
    shapes, axes = describe_state(config)
    console.print(format_parameters(shapes, axes, run.layout), highlight=False, markup=False, soft_wrap=True)
    per_step = config.train.batch_size * config.model.seq_len
    rows = {
        "run": str(run.folder.location),
        "model": f"{run.n_params:,} parameters, {config.model.n_layers} layers, d_model {config.model.d_model}",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        + (f", in {process_count()} processes" if process_count() > 1 else ""),
        "data": f"{data.train.n_tokens:,} tokens; held out: "
        + (", ".join(f"{name} {held.n_bytes:,} bytes" for name, held in data.validation.items()) or "nothing"),
        "steps": f"{config.train.steps} x {per_step:,} tokens = {config.train.steps * per_step:,}, "
        f"{run.flops_per_sequence * config.train.batch_size:.3g} FLOPs each",
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }
    if config.mesh.pipeline > 1:
        rows["pipeline"] = f"{config.mesh.pipeline_schedule}, {bubble_fraction(config):.0%} of the time idle"
    print_rows(console, "", rows)
    for note in [*data.notes, *run.notes]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _last_scores(run_dir: Path) -> dict[str, dict]:
    return {line["set"]: line for line in read_metrics(run_dir / FILE) if line["kind"] == "evaluation"}
