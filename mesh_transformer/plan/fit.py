# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Plan of a run, derived from a compiled program: memory use, step time, cost, checkpoint size and host memory."""

import math
from typing import NamedTuple

from mesh_transformer.config import Config
from mesh_transformer.plan.hardware.chips import DEVICE_KINDS, Chip
from mesh_transformer.plan.hardware.topologies import parse_topology
from mesh_transformer.plan.job import CompiledStats
from mesh_transformer.plan.roofline import Roofline, make_roofline, model_flops_utilization

DAY = 86_400
PUE = 1.1  # power usage effectiveness: energy of the data center / energy of its chips


class MemoryUse(NamedTuple):
    """Memory use of one device in bytes."""

    bytes_by_kind: dict[str, int]  # kind -> bytes; the sum is the peak
    peak: int  # required bytes
    usable: int | None  # None if unknown (a CPU, local devices)
    fits: bool | None


def memory_use(stats: CompiledStats, chip: Chip | None) -> MemoryUse:
    """Return a device's memory use by kind, and whether it fits.

    The sizes of the arguments are exact. Gradients have the size of their shapes, activations are the arrays that loops save
    for the backward pass, and the rest of the peak is temporary. The rest is negative if some of these kinds share memory
    because they do not exist at the same time.
    """
    by_kind = dict(stats.bytes_by_kind)
    usable = stats.limit_bytes or (chip.memory if chip else None)
    if stats.compiler_error:
        required = stats.needed_bytes
        by_kind["gradients, activations, logits, temporary"] = max(required - sum(by_kind.values()), 0)
        return MemoryUse(by_kind, required, usable, False)
    by_kind["padding"] = max(stats.argument_bytes - sum(by_kind.values()), 0)
    by_kind["gradients"] = stats.gradient_bytes
    by_kind["activations"] = stats.activation_bytes
    by_kind["logits"] = stats.logits_bytes
    rest = stats.peak_bytes - sum(by_kind.values())
    by_kind["temporary" if rest >= 0 else "shared (not all live at once)"] = rest
    # XLA does not reject programs that are too large for a GPU, so the peak is compared here.
    return MemoryUse(by_kind, stats.peak_bytes, usable, None if usable is None else stats.peak_bytes <= usable)


class Cost(NamedTuple):
    """Time, energy and money of a run, at the roofline's lower bound."""

    tokens: float  # tokens to train on
    days: float
    chip_hours: float
    megawatt_hours: float
    money: float | None


class Plan(NamedTuple):
    """Result of planning a run on a topology."""

    config: Config
    stats: CompiledStats
    chip: Chip | None
    memory: MemoryUse
    roofline: Roofline | None  # None for an unknown chip, or if the program was not compiled
    mfu: float | None  # at the lower bound of the step time
    mfu_no_overlap: float | None  # at the upper bound of the step time
    cost: Cost | None
    checkpoint_bytes: int  # size of one checkpoint on disk
    host_bytes: int  # maximum per host: a copy of the state of its devices during a save or a restore
    host_memory: int | None
    hosts: int
    notes: list[str]
    encode: "Plan | None" = None  # plan of the program that encodes prompts, if an encoder-decoder model decodes

    @property
    def fits(self) -> bool | None:
        """Return whether all programs fit; None if unknown."""
        return self.memory.fits if self.encode is None or not self.memory.fits else self.encode.memory.fits


def make_plan(config: Config, stats: CompiledStats, *, tokens: float | None = None, price: float | None = None) -> Plan:
    """Return the plan of a compiled program.

    `tokens` is the number of tokens to train on (default: the tokens of train.steps steps), `price` the price per chip-hour.
    """
    topology = parse_topology(stats.topology)
    chip = topology.chip or DEVICE_KINDS.get(stats.device_kind)
    memory = memory_use(stats, chip)
    roofline = make_roofline(stats, chip) if chip and not stats.compiler_error else None
    notes = [topology.note] if topology.note else []
    if stats.low_effort:
        notes.append(
            "compiled with --low-effort: memory is accurate to a few percent; plan again without it before starting the run"
        )
    if stats.platform == "gpu" and chip:
        notes.append(
            f"the usable memory is 95% of the memory of each {chip.name}: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 "
            "(JAX's default is 0.75)"
        )
    unused = topology.devices - stats.devices
    if unused > 0:
        notes.append(f"the mesh does not use {unused} of {topology.devices} devices; enlarge an axis in [mesh]")
    budget = tokens if tokens is not None else float(config.train.steps * stats.tokens)
    cost = mfu = mfu_no_overlap = None
    if roofline and chip:
        mfu = model_flops_utilization(stats, chip, roofline.lower_bound)
        mfu_no_overlap = model_flops_utilization(stats, chip, roofline.upper_bound)
        chips = topology.chips if topology.shape else stats.devices // chip.devices
        cost = _cost(budget, stats, roofline, chip, chips, price)
    device_state_bytes = sum(stats.bytes_by_kind.get(kind, 0) for kind in ("parameters", "moments", "other state"))
    return Plan(
        config=config,
        stats=stats,
        chip=chip,
        memory=memory,
        roofline=roofline,
        mfu=mfu,
        mfu_no_overlap=mfu_no_overlap,
        cost=cost,
        checkpoint_bytes=stats.state_bytes,
        host_bytes=device_state_bytes * math.ceil(stats.devices / topology.hosts),
        host_memory=chip.host_memory if chip else None,
        hosts=topology.hosts,
        notes=notes,
        encode=None if stats.encode is None else make_plan(config, stats.encode, tokens=tokens, price=price),
    )


def _cost(tokens: float, stats: CompiledStats, roofline: Roofline, chip: Chip, chips: int, price: float | None) -> Cost:
    seconds = tokens / stats.tokens * roofline.lower_bound
    chip_hours = chips * seconds / 3600
    energy = chip_hours * chip.watts * PUE / 1e6
    return Cost(tokens, seconds / DAY, chip_hours, energy, None if price is None else chip_hours * price)
