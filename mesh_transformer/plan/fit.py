# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a measured program fits, what its memory is spent on, and what the run will need around it."""

import math
from typing import NamedTuple

from mesh_transformer.config import Config
from mesh_transformer.plan.hardware.chips import DEVICE_KINDS, Chip
from mesh_transformer.plan.hardware.topologies import parse_topology
from mesh_transformer.plan.job import CompiledStats
from mesh_transformer.plan.roofline import Roofline, make_roofline, model_flops_utilization

DAY = 86_400
OVERHEAD = 1.1  # of a data centre: energy drawn for each unit that reaches the chips


class MemoryUse(NamedTuple):
    """Bytes of one device."""

    bytes_by_kind: dict[str, int]  # add up to the peak
    peak: int  # needed
    usable: int | None  # None where it is not known (a CPU, devices at hand)
    fits: bool | None


def memory_use(stats: CompiledStats, chip: Chip | None) -> MemoryUse:
    """What a device's memory is spent on, against what is there.

    What goes in is exact. Of what the program makes, gradients are as large as their shapes say, activations those that
    its loops hand to the backward pass; the rest of the peak is temporary. Not all of these are there at once, so that
    the rest may be negative: then some lie where others were.
    """
    kinds = dict(stats.bytes_by_kind)
    usable = stats.limit_bytes or (chip.memory if chip else None)
    if stats.compiler_error:
        needed = stats.needed_bytes
        kinds["gradients, activations, logits, temporary"] = max(needed - sum(kinds.values()), 0)
        return MemoryUse(kinds, needed, usable, False)
    kinds["padding"] = max(stats.argument_bytes - sum(kinds.values()), 0)
    kinds["gradients"] = stats.gradient_bytes
    kinds["activations"] = stats.activation_bytes
    kinds["logits"] = stats.logits_bytes
    rest = stats.peak_bytes - sum(kinds.values())
    kinds["temporary" if rest >= 0 else "shared, not all at once"] = rest
    # XLA never refuses a program for a GPU: the comparison is ours.
    return MemoryUse(kinds, stats.peak_bytes, usable, None if usable is None else stats.peak_bytes <= usable)


class Cost(NamedTuple):
    """Time, energy and money of a run, at the roofline's shortest step."""

    tokens: float  # budget
    days: float
    chip_hours: float
    megawatt_hours: float
    money: float | None


class Plan(NamedTuple):
    """Everything a plan says."""

    config: Config
    stats: CompiledStats
    chip: Chip | None
    memory: MemoryUse
    roofline: Roofline | None  # None where nothing is known of the chip, or the program was not compiled
    mfu: float | None  # at the roofline's shortest step
    mfu_no_overlap: float | None  # at its longest
    cost: Cost | None
    checkpoint_bytes: int  # on disk, of one step
    host_bytes: int  # of one host at most: its devices' state, copied to be written beside training, or being restored
    host_memory: int | None
    hosts: int
    notes: list[str]
    encode: "Plan | None" = None  # of the program that reads texts, where a model with an encoder is sampled

    @property
    def fits(self) -> bool | None:
        """Whether every program does; None where it is not known."""
        return self.memory.fits if self.encode is None or not self.memory.fits else self.encode.memory.fits


def make_plan(config: Config, stats: CompiledStats, *, tokens: float | None = None, price: float | None = None) -> Plan:
    """The plan that follows from what was measured; `tokens` to train on (default: the run's own), `price` of a chip-hour."""
    topology = parse_topology(stats.topology)
    chip = topology.chip or DEVICE_KINDS.get(stats.device_kind)
    memory = memory_use(stats, chip)
    roofline = make_roofline(stats, chip) if chip and not stats.compiler_error else None
    notes = [topology.note] if topology.note else []
    if stats.low_effort:
        notes.append("compiled with --fast: memory is approximate, by some percent either way; decide without it")
    if stats.platform == "gpu" and chip:
        notes.append(
            f"usable is 95% of the memory of each {chip.name}: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (JAX takes 0.75 unless told)"
        )
    unused = topology.devices - stats.devices
    if unused > 0:
        notes.append(f"{unused} of {topology.devices} devices are not in the mesh")
    budget = tokens if tokens is not None else float(config.train.steps * stats.tokens)
    cost = mfu = slow = None
    if roofline and chip:
        mfu = model_flops_utilization(stats, chip, roofline.lower_bound)
        slow = model_flops_utilization(stats, chip, roofline.upper_bound)
        cost = _cost(
            budget,
            stats,
            roofline,
            chip,
            topology.chips if topology.shape else stats.devices // chip.devices,
            price,
        )
    on_device = sum(stats.bytes_by_kind.get(kind, 0) for kind in ("parameters", "moments", "other state"))
    return Plan(
        config=config,
        stats=stats,
        chip=chip,
        memory=memory,
        roofline=roofline,
        mfu=mfu,
        mfu_no_overlap=slow,
        cost=cost,
        checkpoint_bytes=stats.state_bytes,
        host_bytes=on_device * math.ceil(stats.devices / topology.hosts),
        host_memory=chip.host_memory if chip else None,
        hosts=topology.hosts,
        notes=notes,
        encode=None if stats.encode is None else make_plan(config, stats.encode, tokens=tokens, price=price),
    )


def _cost(
    tokens: float, measured: CompiledStats, roofline: Roofline, chip: Chip, chips: int, price: float | None
) -> Cost:
    seconds = tokens / measured.tokens * roofline.lower_bound
    chip_hours = chips * seconds / 3600
    energy = chip_hours * chip.watts * OVERHEAD / 1e6
    return Cost(tokens, seconds / DAY, chip_hours, energy, None if price is None else chip_hours * price)
