# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Suggestion of the smallest configuration change with which a run fits in memory.

Changes are compiled in order of their cost. The first changes cost only time and do not affect the training result: more
loss chunks, more recomputation, more microbatches, residual stream sharded over `tensor`, replicas moved to `fsdp`, then
devices moved to `tensor`. The last changes affect the result: moments in bfloat16, a smaller batch, an optimizer with less
state. Single changes are tried before combinations.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args, get_type_hints

from mesh_transformer.config import Config, ConfigError, ModelConfig, config_to_dict, merge_override, parse_config
from mesh_transformer.plan.compile_jobs import CompileError
from mesh_transformer.plan.estimate import describe_model, estimate_training, mesh_sizes
from mesh_transformer.plan.fit import memory_use
from mesh_transformer.plan.hardware.topologies import parse_topology
from mesh_transformer.plan.job import CompiledStats, CompileJob

REMAT_ORDER = ("none", "attention", "dots", "full", "offload")  # by decreasing activation memory
ESTIMATE_LIMIT = 1.05  # fraction of the usable memory; changes with a higher scaled estimate are not compiled
MAX_COMPILES = 8
MAX_COMBINED = 3  # changes tried together


class ConfigChange(NamedTuple):
    """Overrides, written as for --set, and their description."""

    overrides: tuple[str, ...]
    description: str


class Suggestion(NamedTuple):
    """A change with which the run fits, its statistics, and the number of changes that were compiled before and do not fit."""

    change: ConfigChange
    stats: CompiledStats
    tried: int


def change_config(config: Config, overrides: tuple[str, ...]) -> Config:
    """Return the configuration with `overrides` applied. Raises ConfigError if the result is invalid."""
    table = config_to_dict(config)
    for override in overrides:
        merge_override(table, override)
    return parse_config(table, where="--set " + " --set ".join(overrides))


def suggest_change(
    job: CompileJob,
    stats: CompiledStats,
    compile_one: Callable[[CompileJob], CompiledStats],
    *,
    log: Callable[[str], None] = lambda line: None,
) -> Suggestion | None:
    """Return the first change with which a job fits, or None if no tested change suffices.

    `stats` are the statistics of the job without changes.
    """
    topology = parse_topology(job.topology)
    assert topology.chip is not None
    params, tried = describe_model(job.config.model), 0
    required = memory_use(stats, topology.chip).peak
    scale = required / estimate_training(job.config, job.topology, params).peak_bytes if required else 1.0
    for change in propose_changes(job.config, topology.devices):
        if tried == MAX_COMPILES:
            break
        try:
            config = change_config(job.config, change.overrides)
            estimate = scale * estimate_training(config, job.topology, params).peak_bytes
            if estimate > ESTIMATE_LIMIT * topology.chip.memory:
                continue
            log(f"trying {change.description}")
            stats = compile_one(dataclasses.replace(job, config=config))
        except ConfigError:
            continue
        except CompileError as error:
            log(f"  skipped: {error}")
            continue
        if memory_use(stats, topology.chip).fits:
            return Suggestion(change, stats, tried)
        tried += 1
    return None


def propose_changes(config: Config, devices: int) -> Iterator[ConfigChange]:
    """Yield single changes by increasing cost, then pairs, then triples."""
    groups = [group for group in _groups(config, devices) if group]
    for count in range(1, MAX_COMBINED + 1):
        for chosen in itertools.combinations(groups, count):
            indices = itertools.product(*(range(len(group)) for group in chosen))
            for choice in sorted(indices, key=sum):
                changes = [group[i] for group, i in zip(chosen, choice, strict=True)]
                overrides = tuple(override for change in changes for override in change.overrides)
                yield ConfigChange(overrides, " and ".join(change.description for change in changes))


def _groups(config: Config, devices: int) -> list[list[ConfigChange]]:
    sizes, rules = mesh_sizes(config, devices)
    return [
        _loss(config, rules["sequence"], sizes),
        _remat(config),
        _grad_accum(config, sizes, rules),
        _sequence_parallel(config, sizes, rules),
        _mesh(config, sizes),
        _moments(config),
        _batch(config),
        _optimizer(config),
    ]


def _loss(config: Config, sequence_axes: tuple[str, ...], sizes: dict[str, int]) -> list[ConfigChange]:
    """Compute the loss in 4 or 16 times as many chunks, which does not change the number of FLOPs."""
    length = config.model.seq_len // math.prod(sizes[axis] for axis in sequence_axes)
    counts = [config.train.loss_chunks * n for n in (4, 16)]
    return [
        ConfigChange((f"train.loss_chunks={count}",), f"loss in {count} chunks")
        for count in counts
        if length % count == 0
    ]


def _remat(config: Config) -> list[ConfigChange]:
    known = get_args(get_type_hints(ModelConfig)["remat"])
    stronger = REMAT_ORDER[REMAT_ORDER.index(config.model.remat) + 1 :]
    return [ConfigChange((f'model.remat="{name}"',), f"remat {name}") for name in stronger if name in known]


def _grad_accum(config: Config, sizes: dict[str, int], rules: dict[str, tuple[str, ...]]) -> list[ConfigChange]:
    rows = config.train.batch_size
    for axis in rules["batch"]:
        rows //= sizes[axis]
    changes, current = [], config.train.grad_accum_steps
    if current > 1:  # the accumulated gradients may need more memory than microbatches save
        changes.append(ConfigChange(("train.grad_accum_steps=1",), f"one batch instead of {current} microbatches"))
    for count in (current * 2**n for n in range(1, 12)):
        if rows % count == 0:
            description = f"{count} microbatches instead of {current}"
            changes.append(ConfigChange((f"train.grad_accum_steps={count}",), description))
    return changes


def _sequence_parallel(config: Config, sizes: dict[str, int], rules: dict[str, tuple[str, ...]]) -> list[ConfigChange]:
    if sizes.get("tensor", 1) == 1 or "tensor" in rules["activation_seq"]:
        return []
    return [ConfigChange(("mesh.sequence_parallel=true",), "residual stream sharded over tensor between blocks")]


def _mesh(config: Config, sizes: dict[str, int]) -> list[ConfigChange]:
    changes, data, fsdp, tensor = [], sizes["data"], sizes["fsdp"], sizes["tensor"]
    if data > 1 and config.model.d_model % (fsdp * data) == 0:
        changes.append(ConfigChange(("mesh.data=1", f"mesh.fsdp={fsdp * data}"), f"mesh fsdp={fsdp * data}"))
        data, fsdp = 1, fsdp * data
    if fsdp > 1 and fsdp % 2 == 0 and config.model.n_vocab % (2 * tensor) == 0:
        overrides = (f"mesh.data={data}", f"mesh.fsdp={fsdp // 2}", f"mesh.tensor={2 * tensor}")
        changes.append(ConfigChange(overrides, f"mesh fsdp={fsdp // 2} tensor={2 * tensor}"))
    return changes


def _moments(config: Config) -> list[ConfigChange]:
    if config.optimizer.moment_dtype == "bfloat16":
        return []
    return [ConfigChange(('optimizer.moment_dtype="bfloat16"',), "first moments in bfloat16")]


def _batch(config: Config) -> list[ConfigChange]:
    """Reduce the batch to one microbatch, which needs no accumulated gradients."""
    train = config.train
    if train.grad_accum_steps == 1:
        return []
    size = train.batch_size // train.grad_accum_steps
    overrides = (f"train.batch_size={size}", "train.grad_accum_steps=1")
    return [ConfigChange(overrides, f"batch size {size} instead of {train.batch_size}, without microbatches")]


def _optimizer(config: Config) -> list[ConfigChange]:
    if config.optimizer.name != "adamw":
        return []
    overrides = ('optimizer.name="adafactor"', 'optimizer.moment_dtype="bfloat16"')
    no_momentum = (*overrides, "optimizer.beta1=0.0")
    return [
        ConfigChange(overrides, "adafactor with bfloat16 momentum instead of adamw"),
        ConfigChange(no_momentum, "adafactor without momentum instead of adamw"),
    ]
