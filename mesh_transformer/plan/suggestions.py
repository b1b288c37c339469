# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The smallest change to a run with which it fits: candidates in the order of what they cost, each compiled.

First what leaves the trained function as it is and costs time alone: score fewer logits at a time, recompute more, cut
the batch into more microbatches, cut the residual stream over `tensor`, move replicas into `fsdp`, then devices into
`tensor`. Then what changes it a little: moments in bfloat16, a smaller batch, an optimizer that keeps less. One change
is tried before two.
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

REMAT_ORDER = ("none", "attention", "dots", "full", "offload")  # the more to the right, the less is kept
ESTIMATE_LIMIT = (
    1.05  # times what is usable: an estimate above it, scaled by how far the first was off, is not compiled
)
MAX_COMPILES = 8
MAX_COMBINED = 3  # changes


class ConfigChange(NamedTuple):
    """Overrides, as one would give them to --set, and what they are."""

    overrides: tuple[str, ...]
    description: str


class Suggestion(NamedTuple):
    """A change that fits, what was measured with it, and how many others were compiled in vain."""

    change: ConfigChange
    stats: CompiledStats
    tried: int


def change_config(config: Config, overrides: tuple[str, ...]) -> Config:
    """The run with overrides; ConfigError where they contradict it."""
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
    """The first candidate that compiles within the memory of the topology; None if none of those tried does.

    `measured` is of the job itself, which does not fit.
    """
    topology = parse_topology(job.topology)
    assert topology.chip is not None
    params, tried = describe_model(job.config.model), 0
    needed = memory_use(stats, topology.chip).peak
    scale = needed / estimate_training(job.config, job.topology, params).peak_bytes if needed else 1.0
    for change in propose_changes(job.config, topology.devices):
        if tried == MAX_COMPILES:
            break
        try:
            config = change_config(job.config, change.overrides)
            guess = scale * estimate_training(config, job.topology, params).peak_bytes
            if guess > ESTIMATE_LIMIT * topology.chip.memory:
                continue
            log(f"trying {change.description}")
            stats = compile_one(dataclasses.replace(job, config=config))
        except ConfigError:
            continue
        except CompileError as error:
            log(f"  left out: {error}")
            continue
        if memory_use(stats, topology.chip).fits:
            return Suggestion(change, stats, tried)
        tried += 1
    return None


def propose_changes(config: Config, devices: int) -> Iterator[ConfigChange]:
    """Single changes from the smallest to the largest, then pairs, then triples; of each, the mildest first."""
    groups = [group for group in _groups(config, devices) if group]
    for count in range(1, MAX_COMBINED + 1):
        for chosen in itertools.combinations(groups, count):
            places = itertools.product(*(range(len(group)) for group in chosen))
            for place in sorted(places, key=sum):
                changes = [group[i] for group, i in zip(chosen, place, strict=True)]
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


def _loss(config: Config, cut_by: tuple[str, ...], sizes: dict[str, int]) -> list[ConfigChange]:
    """Logits of a quarter, or a sixteenth, of the sequences at a time: as much work as before."""
    length = config.model.seq_len // math.prod(sizes[axis] for axis in cut_by)
    counts = [config.train.loss_chunks * n for n in (4, 16)]
    return [
        ConfigChange((f"train.loss_chunks={count}",), f"the loss in {count} pieces")
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
    found, now = [], config.train.grad_accum_steps
    if now > 1:  # a sum of gradients beside those of a microbatch may be larger than what the microbatches save
        found.append(
            ConfigChange(("train.grad_accum_steps=1",), f"the batch in one piece instead of {now} microbatches")
        )
    for count in (now * 2**n for n in range(1, 12)):
        if rows % count == 0:
            found.append(ConfigChange((f"train.grad_accum_steps={count}",), f"{count} microbatches instead of {now}"))
    return found


def _sequence_parallel(config: Config, sizes: dict[str, int], rules: dict[str, tuple[str, ...]]) -> list[ConfigChange]:
    if sizes.get("tensor", 1) == 1 or "tensor" in rules["activation_seq"]:
        return []
    return [ConfigChange(("mesh.sequence_parallel=true",), "the residual stream cut over tensor between blocks")]


def _mesh(config: Config, sizes: dict[str, int]) -> list[ConfigChange]:
    found, data, fsdp, tensor = [], sizes["data"], sizes["fsdp"], sizes["tensor"]
    if data > 1 and config.model.d_model % (fsdp * data) == 0:
        found.append(ConfigChange(("mesh.data=1", f"mesh.fsdp={fsdp * data}"), f"mesh fsdp={fsdp * data}"))
        data, fsdp = 1, fsdp * data
    if fsdp > 1 and fsdp % 2 == 0 and config.model.n_vocab % (2 * tensor) == 0:
        overrides = (f"mesh.data={data}", f"mesh.fsdp={fsdp // 2}", f"mesh.tensor={2 * tensor}")
        found.append(ConfigChange(overrides, f"mesh fsdp={fsdp // 2} tensor={2 * tensor}"))
    return found


def _moments(config: Config) -> list[ConfigChange]:
    if config.optimizer.moment_dtype == "bfloat16":
        return []
    return [ConfigChange(('optimizer.moment_dtype="bfloat16"',), "first moments in bfloat16")]


def _batch(config: Config) -> list[ConfigChange]:
    """One microbatch and no more: no sum of gradients beside its own."""
    train = config.train
    if train.grad_accum_steps == 1:
        return []
    size = train.batch_size // train.grad_accum_steps
    overrides = (f"train.batch_size={size}", "train.grad_accum_steps=1")
    return [ConfigChange(overrides, f"batches of {size} instead of {train.batch_size}, in one piece")]


def _optimizer(config: Config) -> list[ConfigChange]:
    if config.optimizer.name != "adamw":
        return []
    overrides = ('optimizer.name="adafactor"', 'optimizer.moment_dtype="bfloat16"')
    slim = (*overrides, "optimizer.beta1=0.0")
    return [
        ConfigChange(overrides, "adafactor with averages in bfloat16 instead of adamw"),
        ConfigChange(slim, "adafactor without averages instead of adamw"),
    ]
