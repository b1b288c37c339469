# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A run's steps taken again, from its recipe and a checkpoint or from nothing, beside what it logged of them."""

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
    """A step that was taken again."""

    step: int  # steps taken with it
    loss: np.float32


def open_replay(run_dir: Path, until: int) -> tuple[Run, list[str]]:
    """The run with its state at the newest checkpoint that is not beyond `until`, or at its beginning; nothing is written.

    And what is no longer as it was when the run was made. Raises RecipeError, and what open_data and open_run raise.
    """
    recipe = read_provenance(run_dir)
    config = read_config(recipe, run_dir)
    data = open_data(config)
    if data.train.fingerprint != recipe["data_fingerprint"]:
        raise ProvenanceError(
            f"{run_dir}: data.train holds other data now (fingerprint {data.train.fingerprint}, then "
            f"{recipe['data_fingerprint']}): the run cannot be made again without the data it had"
        )
    store = Store(run_dir / "checkpoints", writable=False)
    at = max((step for step in store.steps() if step <= until), default=0)
    run = open_run(config, data, init_devices(config.mesh), at=at)
    starts = [start for start in recipe["starts"] if start["step"] <= until]
    return run, diff_environments((starts or recipe["starts"])[-1], run.environment)


def read_config(recipe: Mapping[str, Any], run_dir: Path) -> Config:
    """The configuration in a recipe, in the folder where the run is now."""
    table = dict(recipe["config"])
    table["run"] = {**table["run"], "dir": str(run_dir)}
    return parse_stored(table, where=f"{run_dir}/recipe.json")


def read_batch(run: Run, step: int) -> Batch:
    """What the step after `step` steps is given."""
    return run.data.train.batch(first_sequence(run.config.train, step), batch_size_at(run.config.train, step))


def read_sharded_batch(run: Run, step: int) -> Batch:
    """`batch_of` on the mesh."""
    return run.shard_batch(read_batch(run, step), batch_size_at(run.config.train, step))


def replay(run: Run, until: int) -> Iterator[ReplayedStep]:
    """Take the steps up to `until`, one at a time."""
    for step in range(run.step, until):
        run.state, metrics = run.train_step(run.state, read_sharded_batch(run, step))
        yield ReplayedStep(step + 1, np.float32(float(metrics["loss"])))


def read_losses(run_dir: Path) -> dict[int, np.float32]:
    """What the run logged, by steps taken; nan where it was not a number."""
    lines = [line for line in read_metrics(run_dir / FILE) if line["kind"] == "train"]
    return {line["step"]: np.float32(np.nan if line["loss"] is None else line["loss"]) for line in lines}
