# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A training run: mesh, data, checkpoint store, state and compiled steps, opened in that order."""

import bisect
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import Config, ConfigError, config_to_dict, format_value
from mesh_transformer.convert.model_cache import find_model
from mesh_transformer.data.dataset import Data
from mesh_transformer.data.loader import Batch
from mesh_transformer.distributed.coordination import broadcast_from_first, gather
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.train.compile import (
    abstract_batch,
    compile_barrier,
    config_for_flops,
    jit_eval_step,
    jit_train_step,
)
from mesh_transformer.train.flops import count_flops
from mesh_transformer.train.loss import TokenLosses
from mesh_transformer.train.provenance import environment_info
from mesh_transformer.train.resume import flatten_table, init_from, read_carried_meta, restore_state
from mesh_transformer.train.run_folder import RunFolder
from mesh_transformer.train.schedule import batch_ramp
from mesh_transformer.train.state import TrainState, describe_state, flatten_state, make_init_state, state_shardings
from mesh_transformer.train.step import Metrics, make_train_step


@dataclasses.dataclass
class Run:
    """State, data and compiled steps of a run. Only `state` changes during training."""

    config: Config
    folder: RunFolder
    layout: MeshLayout
    data: Data
    store: Store
    axes: Mapping[str, tuple[str, ...]]  # logical axes of every array of the state, by name
    state: TrainState
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[Any, Batch], TokenLosses]
    flops_per_sequence: float  # of a training step, without recomputation
    notes: list[str]  # origin of the state, for the log
    # Metadata of the converted model from which the run was started (run.init_from), or empty.
    carried: Mapping[str, Any]
    environment: Mapping[str, Any]  # versions, devices and commit of this start of the program (provenance.py)

    @property
    def dir(self) -> Path:
        """Local folder of metrics, configuration and report: the run folder, or its mirror."""
        return self.folder.path

    @property
    def step(self) -> int:
        """Number of steps taken; waits for the step in flight."""
        return int(self.state.step)

    @property
    def n_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def local_rows(self, size: int) -> list[int]:
        """Return the rows of a batch of `size` sequences on this process's devices; processes may share rows."""
        slices = self._batch_sharding(size).addressable_devices_indices_map((size, self.config.model.seq_len)).values()
        return sorted({row for index in slices if index is not None for row in range(size)[index[0]]})

    def shard_batch(self, batch: Batch, size: int) -> Batch:
        """Return a batch of `size` sequences as global arrays on the mesh; `batch` has this process's `local_rows`."""
        sharding = self._batch_sharding(size)
        rows = self.local_rows(size)

        def put(values: np.ndarray) -> jax.Array:
            def read(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None, "JAX requests shards of this process's devices only"
                first, last, _ = index[0].indices(size)
                start = bisect.bisect_left(rows, first)
                return values[start : start + last - first, *index[1:]]

            return jax.make_array_from_callback((size, *values.shape[1:]), sharding, read)

        return jax.tree.map(put, batch)

    def _batch_sharding(self, size: int) -> NamedSharding:
        return self.layout.sharding(("batch", "sequence"), (size, self.config.model.seq_len), "batch")

    def save(self, meta: Mapping[str, Any]) -> None:
        """Pass the state to the checkpoint store; after the return, the state may be donated to the next step."""
        meta = {
            "config": config_to_dict(self.config),
            "tokenizer": self.data.tokenizer.to_json(),
            "data_fingerprint": self.data.train.fingerprint,
            "start": dict(self.environment),
            **self.carried,
            **meta,
        }
        self.store.save(self.step, flatten_state(self.state), axes=self.axes, meta=meta)


def open_run(
    config: Config,
    data: Data,
    layout: MeshLayout,
    *,
    log: Callable[[str], None] = print,
    folder: RunFolder | None = None,
    at: int | None = None,
) -> Run:
    """Open a run with the state of its latest checkpoint, or with a new state if it has none.

    `at` selects the checkpoint of that step, or a new state if 0, and opens the run folder read-only. Raises ConfigError
    if the batch does not fit the mesh or the checkpoint does not fit the configuration, and CheckpointError for a damaged
    checkpoint (unless checkpoint.resume allows an older one).
    """
    check_batches(config, layout)
    _check_processes_agree(config, data)
    shapes, axes = describe_state(config)
    shardings = state_shardings(layout, shapes, axes)
    folder = folder or RunFolder(config, log)
    store = Store(
        folder.checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        async_save=config.checkpoint.async_save,
        writable=at is None,
    )

    def find_step() -> int | None:
        return store.latest() if config.checkpoint.resume == "latest" else store.latest_valid(log)

    step = broadcast_from_first("latest step", find_step) if at is None else at or None
    if step is not None:
        state, notes = restore_state(config, data, store, step, shapes, shardings)
        carried = read_carried_meta(store, step)
    else:
        notes, carried = [], {}
        state = jax.jit(make_init_state(config), out_shardings=shardings)(jax.random.key(config.run.seed))
        if config.run.init_from:
            source, source_step = find_model(config.run.init_from)
            state, notes = init_from(config, state, shardings, source, source_step)
            carried = read_carried_meta(source, source_step)
    batch = abstract_batch(config, layout)
    flops = count_flops(make_train_step(config_for_flops(config)), shapes, batch) / config.train.batch_size
    return Run(
        config=config,
        folder=folder,
        layout=layout,
        data=data,
        store=store,
        axes=flatten_state(axes),
        state=state,
        train_step=compile_barrier(jit_train_step(config, layout, shardings)),
        eval_step=compile_barrier(jit_eval_step(config, layout)),
        flops_per_sequence=flops,
        notes=notes,
        carried=carried,
        environment=environment_info(layout),
    )


def check_batches(config: Config, layout: MeshLayout) -> None:
    """Raise ConfigError, with a size that fits, if a batch or microbatch is not divisible over the mesh."""
    divisor = layout.batch_shards * config.train.grad_accum_steps
    for _, size in batch_ramp(config.train):
        if size % divisor:
            raise ConfigError(
                f"train.batch_size: {size} sequences are not divisible by {layout.batch_shards} device(s) along the "
                f"batch x train.grad_accum_steps={config.train.grad_accum_steps}; use, for example, "
                f"{max(size // divisor, 1) * divisor}"
            )


def _check_processes_agree(config: Config, data: Data) -> None:
    """Raise ConfigError if a process has another configuration or other data than process 0."""
    table = flatten_table(config_to_dict(config))
    local_text = json.dumps({key: value for key, value in table.items() if not key.startswith("mesh.process")})
    tables = [json.loads(text) for text in gather("configuration", local_text)]
    first = tables[0]
    for process, other in enumerate(tables):
        if changed := [key for key in sorted(first | other) if first.get(key) != other.get(key)]:
            raise ConfigError(
                f"process {process} has {changed[0]} = {format_value(other.get(changed[0]))}, but process 0 has "
                f"{format_value(first.get(changed[0]))}; start all processes with the same configuration"
            )
    fingerprints = gather("data", data.train.fingerprint)
    for process, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise ConfigError(
                f"data.train of process {process} has the fingerprint {fingerprint}, but that of process 0 has "
                f"{fingerprints[0]}; give all hosts the same files"
            )
