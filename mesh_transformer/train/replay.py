# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Replays steps of a run from a checkpoint or from the start, to compare their losses with its log."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import Config, parse_stored
from mesh_transformer.data.dataset import open_data
from mesh_transformer.data.loader import Batch
from mesh_transformer.mesh import init_devices
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.train.provenance import ProvenanceError, diff_environments, read_provenance
from mesh_transformer.train.run import Run, open_run
from mesh_transformer.train.schedule import batch_size_at, first_sequence


class ReplayedStep(NamedTuple):
    """Result of a replayed step."""

    step: int  # number of steps taken, including this one
    loss: np.float32


def open_replay(run_dir: Path, until: int) -> tuple[Run, list[str]]:
    """Open a run read-only, at its latest checkpoint up to step `until` or at its start.

    Returns the run, and the differences between its environment and the current one. Raises ProvenanceError, and the
    errors of open_data and open_run.
    """
    provenance = read_provenance(run_dir)
    config = read_config(provenance, run_dir)
    data = open_data(config)
    if data.train.fingerprint != provenance["data_fingerprint"]:
        raise ProvenanceError(
            f"{run_dir}: data.train has the fingerprint {data.train.fingerprint}, but the run was trained on data with "
            f"the fingerprint {provenance['data_fingerprint']}; restore the earlier data to replay the run"
        )
    store = Store(run_dir / "checkpoints", writable=False)
    at = max((step for step in store.steps() if step <= until), default=0)
    run = open_run(config, data, init_devices(config.mesh), at=at)
    starts = [start for start in provenance["starts"] if start["step"] <= until]
    return run, diff_environments((starts or provenance["starts"])[-1], run.environment)


def read_config(provenance: Mapping[str, Any], run_dir: Path) -> Config:
    """Return the configuration of a run, with the run's current folder."""
    table = dict(provenance["config"])
    table["run"] = {**table["run"], "dir": str(run_dir)}
    return parse_stored(table, where=f"{run_dir}/recipe.json")


def read_batch(run: Run, step: int) -> Batch:
    """Return the batch of the step that follows `step` completed steps."""
    return run.data.train.batch(first_sequence(run.config.train, step), batch_size_at(run.config.train, step))


def read_sharded_batch(run: Run, step: int) -> Batch:
    """Return `read_batch`, sharded over the mesh."""
    return run.shard_batch(read_batch(run, step), batch_size_at(run.config.train, step))


def replay(run: Run, until: int) -> Iterator[ReplayedStep]:
    """Run the steps up to `until`, and yield the result of each step."""
    for step in range(run.step, until):
        run.state, metrics = run.train_step(run.state, read_sharded_batch(run, step))
        yield ReplayedStep(step + 1, np.float32(float(metrics["loss"])))


def read_losses(run_dir: Path) -> dict[int, np.float32]:
    """Return the losses that a run logged, by number of steps taken; nan for a loss that was not finite."""
    lines = [line for line in read_metrics(run_dir / FILE) if line["kind"] == "train"]
    return {line["step"]: np.float32(np.nan if line["loss"] is None else line["loss"]) for line in lines}
