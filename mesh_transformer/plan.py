# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The training step compiled without arrays: what a run needs in memory and arithmetic before anything is paid for."""

import json
import math
from dataclasses import replace
from typing import NamedTuple

import jax

from mesh_transformer.config import Config, ConfigError
from mesh_transformer.mesh import Layout, use_layout
from mesh_transformer.train.flops import count_flops
from mesh_transformer.train.run import abstract_batch, check_batches, without_remat
from mesh_transformer.train.state import describe_state, flatten_state, format_parameters, state_shardings
from mesh_transformer.train.step import make_train_step

KINDS = {"params": "parameters", "opt_state": "optimizer state"}


class Plan(NamedTuple):
    """What one training step needs. Bytes are for each device, operations for all of them together."""

    devices: int
    parameters: int
    tokens_per_step: int
    bytes_by_kind: dict[str, int]  # parameters, optimizer state, other state, batch, temporary
    peak_bytes: int
    flops_per_step: float  # of the products, without what remat computes again
    hardware_flops_per_step: float  # with it


def plan_training(config: Config, layout: Layout) -> tuple[Plan, str]:
    """Lower and compile the very step that training runs, from shapes alone, and the table of parameters; nothing is allocated."""
    check_batches(config, layout)
    shapes, axes = describe_state(config)
    shardings = state_shardings(layout, shapes, axes)
    batch = abstract_batch(config, layout)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    step = make_train_step(config)
    with use_layout(layout):
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch).compile()
    by_kind = dict.fromkeys((*KINDS.values(), "other state"), 0)
    for name, leaf in flatten_state(state).items():
        held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        by_kind[KINDS.get(name.split("/")[0], "other state")] += held
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say what a program needs"
    by_kind["batch"] = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in batch)
    by_kind["gradients, activations, temporary"] = memory.temp_size_in_bytes
    plan = Plan(
        devices=layout.mesh.size,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        tokens_per_step=config.train.batch_size * config.model.seq_len,
        bytes_by_kind=by_kind,
        peak_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        flops_per_step=count_flops(make_train_step(without_remat(config)), shapes, batch),
        hardware_flops_per_step=count_flops(step, shapes, batch),
    )
    return plan, format_parameters(shapes, axes, layout)


def format_plan(plan: Plan, sharding_table: str) -> str:
    """The plan as people read it."""
    rows = [(kind, f"{size / 2**20:,.1f} MiB") for kind, size in plan.bytes_by_kind.items()]
    rows.append(("arguments and temporary together", f"{plan.peak_bytes / 2**20:,.1f} MiB"))
    rows.append(("parameters", f"{plan.parameters:,}"))
    rows.append(("tokens a step", f"{plan.tokens_per_step:,}"))
    rows.append(("model FLOPs a step", f"{plan.flops_per_step:.4g}"))
    rows.append(("hardware FLOPs a step", f"{plan.hardware_flops_per_step:.4g}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    return "\n".join([sharding_table, "", f"each of {plan.devices} device(s), from the compiled step:", *lines])


def plan_to_json(plan: Plan) -> str:
    """The plan as one JSON object."""
    return json.dumps(plan._asdict())


def parse_topology(name: str) -> int | None:
    """Fake CPU devices that a topology asks for ("cpu-8"), or None for the devices at hand ("local")."""
    if name == "local":
        return None
    kind, _, count = name.partition("-")
    if kind == "cpu" and count.isdigit() and int(count):
        return int(count)
    raise ConfigError(f"--topology {name}: use local, or cpu-N for N devices made of this CPU")


def with_cpu_devices(config: Config, count: int | None) -> Config:
    """The same run on `count` devices made of the CPU; unchanged for None."""
    return config if count is None else replace(config, mesh=replace(config.mesh, cpu_devices=count))
