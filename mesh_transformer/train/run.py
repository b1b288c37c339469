# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training run works with, opened in order: mesh, data, state (new or restored), compiled steps."""

import bisect
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.checkpoint.store import Store, find_checkpoint
from mesh_transformer.config import Config, ConfigError, config_to_dict, parse_stored, parse_model
from mesh_transformer.data.dataset import Data
from mesh_transformer.data.loader import Batch
from mesh_transformer.distributed.coordination import broadcast_from_first, gather, process_count
from mesh_transformer.mesh import MeshLayout, use_layout
from mesh_transformer.train.flops import count_flops
from mesh_transformer.train.loss import TokenLosses
from mesh_transformer.train.provenance import environment_info
from mesh_transformer.train.run_folder import RunFolder
from mesh_transformer.train.schedule import batch_ramp
from mesh_transformer.train.state import (
    TrainState,
    describe_state,
    flatten_state,
    make_init_state,
    state_shardings,
    unflatten_state,
)
from mesh_transformer.train.step import Metrics, make_eval_step, make_train_step

# Settings that may change when a run is resumed without changing what it computes, or that are plainly meant to.
MAY_CHANGE = (
    "run.dir", "run.init_from", "run.load_optimizer_state", "mesh", "model.remat", "model.attention_kernel", "model.scan_unroll",
    "model.preset", "data.cache_dir", "data.validation", "data.max_epochs", "evaluate",
)  # fmt: skip
MAY_CHANGE_SECTIONS = ("optimizer", "train", "checkpoint", "sample", "track")  # said aloud
MUST_STAY = (
    "train.batch_size",
    "train.batch_ramp_from",
    "train.batch_ramp_steps",
    "optimizer.name",
    "train.log_grad_noise_scale",
)


@dataclasses.dataclass
class Run:
    """A run that is ready to train. `state` is the only thing that changes."""

    config: Config
    folder: RunFolder
    layout: MeshLayout
    data: Data
    store: Store
    axes: Mapping[str, tuple[str, ...]]  # logical axes of every array of the state, by name
    state: TrainState
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[Any, Batch], TokenLosses]
    flops_per_sequence: float  # of a training step, without what is recomputed
    notes: list[str]  # what a person should know of how the state came to be
    environment: Mapping[str, Any]  # versions, devices and code of this start of the program (recipe.py)

    @property
    def dir(self) -> Path:
        """Where metrics, configuration and report are written: the run folder, or its mirror on this machine."""
        return self.folder.path

    @property
    def step(self) -> int:
        """Steps taken; waits for the one in flight."""
        return int(self.state.step)

    @property
    def n_params(self) -> int:
        """Number of learned values."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def local_rows(self, size: int) -> list[int]:
        """Rows of a batch of `size` sequences that this process's devices need; other processes may need them too."""
        slices = self._batch_sharding(size).addressable_devices_indices_map((size, self.config.model.seq_len)).values()
        return sorted({row for index in slices if index is not None for row in range(size)[index[0]]})

    def shard_batch(self, batch: Batch, size: int) -> Batch:
        """A batch of `size` sequences as global arrays on the mesh, from the `rows` of it that this process has read."""
        sharding, own = self._batch_sharding(size), self.local_rows(size)

        def put(values: np.ndarray) -> jax.Array:
            def find(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None, "it is of a device of this process"
                first, last, _ = index[0].indices(size)
                start = bisect.bisect_left(own, first)
                return values[start : start + last - first, *index[1:]]

            return jax.make_array_from_callback((size, *values.shape[1:]), sharding, find)

        return jax.tree.map(put, batch)

    def _batch_sharding(self, size: int) -> NamedSharding:
        return self.layout.sharding(("batch", "sequence"), (size, self.config.model.seq_len), "batch")

    def save(self, meta: Mapping[str, Any]) -> None:
        """Hand the state to the store; returns when it may change again."""
        meta = {
            "config": config_to_dict(self.config),
            "tokenizer": self.data.tokenizer.to_json(),
            "data_fingerprint": self.data.train.fingerprint,
            "start": dict(self.environment),
            **meta,
        }
        self.store.save(self.step, flatten_state(self.state), axes=self.axes, meta=meta)


def open_run(
    config: Config,
    data: Data,
    layout: MeshLayout,
    *,
    report: Callable[[str], None] = print,
    folder: RunFolder | None = None,
    at: int | None = None,
) -> Run:
    """Everything in place to train `config`: the newest checkpoint of its run folder restored, or a new state.

    With `at` it is the checkpoint of that step, or for 0 a new state, and the run folder is only read. Raises ConfigError
    where batch and mesh, or checkpoint and configuration, contradict each other, and CheckpointError for a damaged
    checkpoint (unless checkpoint.resume allows an older one).
    """
    check_batches(config, layout)
    _check_same(config, data)
    shapes, axes = describe_state(config)
    shardings = state_shardings(layout, shapes, axes)
    keep = config.checkpoint
    folder = folder or RunFolder(config, report)
    store = Store(
        folder.checkpoints,
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        asynchronous=keep.async_save,
        writable=at is None,
    )
    notes: list[str] = []
    newest = store.newest if keep.resume == "latest" else lambda: store.newest_intact(report)
    step = broadcast_from_first("newest step", newest) if at is None else at or None
    state = None if step is None else _restore(config, data, store, step, shapes, shardings, notes)
    if state is None:
        init = jax.jit(make_init_state(config), out_shardings=shardings)
        state = init(jax.random.key(config.run.seed))
        if config.run.init_from:
            state = init_from(config, state, shardings, notes)
    batch = abstract_batch(config, layout)
    flops = count_flops(make_train_step(without_remat(config)), shapes, batch) / config.train.batch_size
    return Run(
        config=config,
        folder=folder,
        layout=layout,
        data=data,
        store=store,
        axes=flatten_state(axes),
        state=state,
        train_step=compile_barrier(jit_train_step(config, layout, shardings)),
        eval_step=compile_barrier(jax.jit(with_layout(make_eval_step(config), layout), out_shardings=replicated(layout))),
        flops_per_sequence=flops,
        notes=notes,
        environment=environment_info(layout),
    )


def jit_train_step(config: Config, layout: MeshLayout, shardings: TrainState) -> Any:
    """The training step, ready to run or to be compiled from shapes alone: the one program of training and planning."""
    step = with_layout(make_train_step(config), layout)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(layout)))


def replicated(layout: MeshLayout) -> NamedSharding:
    """What the host looks at lies whole on every device, so that every process has it."""
    return NamedSharding(layout.mesh, PartitionSpec())


def with_layout(function: Callable[..., Any], layout: MeshLayout) -> Callable[..., Any]:
    """`function`, traced under `layout` whenever it is."""

    def wrapped(*args: Any) -> Any:
        with use_layout(layout):
            return function(*args)

    return wrapped


def abstract_state(shapes: TrainState, shardings: TrainState) -> TrainState:
    """A state as shapes and shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def compile_barrier(step: Any) -> Callable[..., Any]:
    """`step`, a jitted function of something and a batch, such that no process of several runs it before all can.

    Else one may wait in its first collective while another still compiles, which XLA endures for 30 s on a CPU.
    """
    if process_count() == 1:
        return step
    compiled: dict[tuple[int, ...], Callable[..., Any]] = {}

    def meet(first: Any, batch: Batch) -> Any:
        shape = batch.tokens.shape
        if shape not in compiled:
            compiled[shape] = step.lower(first, batch).compile()
            gather("compiled", "")
        return compiled[shape](first, batch)

    return meet


def check_batches(config: Config, layout: MeshLayout) -> None:
    """Every batch and microbatch divides over the mesh; ConfigError with the nearest sizes that do."""
    pieces = layout.batch_shards * config.train.grad_accum_steps
    for _, size in batch_ramp(config.train):
        if size % pieces:
            raise ConfigError(
                f"train.batch_size: {size} sequences do not divide over {layout.batch_shards} device(s) along the batch x "
                f"train.grad_accum_steps={config.train.grad_accum_steps}; use, for example, {max(size // pieces, 1) * pieces}"
            )


def _check_same(config: Config, data: Data) -> None:
    """All processes train the same configuration on the same data; ConfigError names the first that does not."""
    table = _flatten(config_to_dict(config))
    own = json.dumps({key: value for key, value in table.items() if not key.startswith("mesh.process")})
    described = [json.loads(text) for text in gather("configuration", own)]
    for process, other in enumerate(described):
        if changed := [key for key in sorted(described[0] | other) if described[0].get(key) != other.get(key)]:
            raise ConfigError(
                f"process {process} has {changed[0]} = {other.get(changed[0])!r}, and process 0 has "
                f"{described[0].get(changed[0])!r}; start all processes with the same configuration"
            )
    for process, fingerprint in enumerate(prints := gather("data", data.train.fingerprint)):
        if fingerprint != prints[0]:
            raise ConfigError(
                f"process {process} finds other data in data.train than process 0 (fingerprint {fingerprint}, there "
                f"{prints[0]}); give all hosts the same files"
            )


def check_resume(saved: Mapping[str, Any], config: Config, where: str) -> list[str]:
    """Settings that differ between a checkpoint's configuration and this one, as notes; ConfigError if one must not."""
    before, now = _flatten(saved), _flatten(config_to_dict(config))
    notes = []
    for path in sorted(before.keys() | now.keys()):
        old, new = before.get(path), now.get(path)
        if old == new or any(path == free or path.startswith(free + ".") for free in MAY_CHANGE):
            continue
        if path in MUST_STAY or path.split(".")[0] not in MAY_CHANGE_SECTIONS:
            section = path.rpartition(".")[0]
            has, other = (any(key.startswith(f"{section}.") for key in table) for table in (before, now))
            was, says = (repr(old) if has else f"no {section}"), (repr(new) if other else f"no {section}")
            raise ConfigError(
                f"{where} was made with {path} = {was}, but the configuration says {says}; "
                "set it back, use another run.dir, or start over with --fresh"
            )
        notes.append(f"{path} = {new!r} (was {old!r})")
    return notes


def _restore(
    config: Config,
    data: Data,
    store: Store,
    step: int,
    shapes: TrainState,
    shardings: TrainState,
    notes: list[str],
) -> TrainState:
    where = f"{store.root}/step_{step}"
    meta = store.read_meta(step)
    saved = parse_stored(meta["config"], where=where)  # a field that was not there yet has its default
    notes += check_resume(config_to_dict(saved), config, where)
    if meta["data_fingerprint"] != data.train.fingerprint:
        raise ConfigError(
            f"{where} was trained on other data than data.train now holds (fingerprint {meta['data_fingerprint']}, "
            f"now {data.train.fingerprint}); restore the data, use another run.dir, or start over with --fresh"
        )
    named = store.restore(step, flatten_state(abstract_state(shapes, shardings)))
    notes.append(f"resumed from {where}")
    return unflatten_state(named, shapes)


def init_from(config: Config, state: TrainState, shardings: TrainState, notes: list[str]) -> TrainState:
    """A new state with the weights of another checkpoint (`run.init_from`), and with `run.load_optimizer_state` its moments.

    The step, the schedule and the guard begin anew; arrays become of the state's types. Raises ConfigError if the model
    is another function, and CheckpointError for damage, or moments of another optimizer.
    """
    store, step = find_checkpoint(config.run.init_from)
    where = f"{store.root}/step_{step}"
    before = parse_model(store.read_meta(step)["config"]["model"], where=where).describe_function()
    now = config.model.describe_function()
    if config.model.positions != "learned":  # nothing learned depends on the length
        before["seq_len"] = now["seq_len"]
    before, now = _flatten({"model": before}), _flatten({"model": now})
    if changed := [key for key in sorted(before.keys() | now.keys()) if now.get(key) != before.get(key)]:
        words = ", ".join(f"{key} = {now.get(key)!r} (there {before.get(key)!r})" for key in changed)
        raise ConfigError(f"run.init_from: {where} is of another model: {words}; set these as they are there")
    named, places, records = flatten_state(state), flatten_state(shardings), store.read_manifest(step).arrays
    parts = ("params/", "opt_state/") if config.run.load_optimizer_state else ("params/",)
    for part in parts:
        like = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, records[name].dtype if name in records else leaf.dtype, sharding=places[name]
            )
            for name, leaf in named.items()
            if name.startswith(part)
        }
        restored = store.restore(step, like, only=part)
        named |= {name: array.astype(named[name].dtype) for name, array in restored.items()}
    found = unflatten_state(named, state)
    is_schedule = lambda leaf: isinstance(leaf, optax.ScaleByScheduleState)  # noqa: E731
    fresh = jax.tree.map(
        lambda new, old: new if is_schedule(new) else old, state.opt_state, found.opt_state, is_leaf=is_schedule
    )
    notes.append(f"started from the {' and '.join(part.strip('/') for part in parts)} of {where}")
    return found.replace(opt_state=fresh)


def abstract_batch(config: Config, layout: MeshLayout | None = None) -> Batch:
    """A whole batch as shapes, with a layout and shardings."""

    def describe(length: int, dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        shape = (config.train.batch_size, length)
        sharding = layout and layout.sharding(("batch", "sequence"), shape, "batch")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    integers, sources = describe(config.target_len), config.model.n_encoder_layers and describe(config.model.seq_len)
    return Batch(integers, integers, integers, integers, describe(config.target_len, np.float32), sources)


def without_remat(config: Config) -> Config:
    """The same run with nothing computed twice, or for nothing while a pipeline fills: its FLOPs are the model's own."""
    model = dataclasses.replace(config.model, remat="none", attention_kernel="auto")
    return dataclasses.replace(config, model=model, mesh=dataclasses.replace(config.mesh, pipeline=1))


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        )
    return flat
