# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a measured program fits, what its memory is spent on, and what the run will need around it."""

import math
from typing import NamedTuple

from mesh_transformer.config import Config
from mesh_transformer.plan.hardware.chips import KINDS, Chip
from mesh_transformer.plan.hardware.topologies import parse_topology
from mesh_transformer.plan.job import Measured
from mesh_transformer.plan.roofline import Roofline, make_roofline, model_flops_utilization

DAY = 86_400
OVERHEAD = 1.1  # of a data centre: energy drawn for each unit that reaches the chips


class Memory(NamedTuple):
    """Bytes of one device."""

    kinds: dict[str, int]  # add up to the peak
    peak: int  # needed
    usable: int | None  # None where it is not known (a CPU, devices at hand)
    fits: bool | None


def judge_memory(measured: Measured, chip: Chip | None) -> Memory:
    """What a device's memory is spent on, against what is there.

    What goes in is exact. Of what the program makes, gradients are as large as their shapes say, activations those that
    its loops hand to the backward pass; the rest of the peak is temporary. Not all of these are there at once, so that
    the rest may be negative: then some lie where others were.
    """
    kinds = dict(measured.kinds)
    usable = measured.limit_bytes or (chip.memory if chip else None)
    if measured.refused:
        needed = measured.needed_bytes
        kinds["gradients, activations, logits, temporary"] = max(needed - sum(kinds.values()), 0)
        return Memory(kinds, needed, usable, False)
    kinds["padding"] = max(measured.argument_bytes - sum(kinds.values()), 0)
    kinds["gradients"] = measured.gradients
    kinds["activations"] = measured.kept_bytes
    kinds["logits"] = measured.logits_bytes
    rest = measured.peak_bytes - sum(kinds.values())
    kinds["temporary" if rest >= 0 else "shared, not all at once"] = rest
    # XLA never refuses a program for a GPU: the comparison is ours.
    return Memory(kinds, measured.peak_bytes, usable, None if usable is None else measured.peak_bytes <= usable)


class Cost(NamedTuple):
    """Time, energy and money of a run, at the roofline's shortest step."""

    tokens: float  # budget
    days: float
    chip_hours: float
    megawatt_hours: float
    money: float | None


class Verdict(NamedTuple):
    """Everything a plan says."""

    config: Config
    measured: Measured
    chip: Chip | None
    memory: Memory
    roofline: Roofline | None  # None where nothing is known of the chip, or the program was not compiled
    mfu: float | None  # at the roofline's shortest step
    mfu_unhidden: float | None  # at its longest
    cost: Cost | None
    checkpoint_bytes: int  # on disk, of one step
    host_bytes: int  # of one host at most: its devices' state, copied to be written beside training, or being restored
    host_memory: int | None
    hosts: int
    notes: list[str]
    reading: "Verdict | None" = None  # of the program that reads texts, where a model with an encoder is sampled

    @property
    def fits(self) -> bool | None:
        """Whether every program does; None where it is not known."""
        return self.memory.fits if self.reading is None or not self.memory.fits else self.reading.memory.fits


def judge(config: Config, measured: Measured, *, tokens: float | None = None, price: float | None = None) -> Verdict:
    """The plan that follows from what was measured; `tokens` to train on (default: the run's own), `price` of a chip-hour."""
    topology = parse_topology(measured.topology)
    chip = topology.chip or KINDS.get(measured.device_kind)
    memory = judge_memory(measured, chip)
    roofline = make_roofline(measured, chip) if chip and not measured.refused else None
    notes = [topology.note] if topology.note else []
    if measured.fast:
        notes.append("compiled with --fast: memory is approximate, by some percent either way; decide without it")
    if measured.platform == "gpu" and chip:
        notes.append(
            f"usable is 95% of the memory of each {chip.name}: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (JAX takes 0.75 unless told)"
        )
    unused = topology.devices - measured.devices
    if unused > 0:
        notes.append(f"{unused} of {topology.devices} devices are not in the mesh")
    budget = tokens if tokens is not None else float(config.train.steps * measured.tokens)
    cost = mfu = slow = None
    if roofline and chip:
        mfu = model_flops_utilization(measured, chip, roofline.shortest)
        slow = model_flops_utilization(measured, chip, roofline.longest)
        cost = _cost(
            budget,
            measured,
            roofline,
            chip,
            topology.chips if topology.shape else measured.devices // chip.devices,
            price,
        )
    on_device = sum(measured.kinds.get(kind, 0) for kind in ("parameters", "moments", "other state"))
    return Verdict(
        config=config,
        measured=measured,
        chip=chip,
        memory=memory,
        roofline=roofline,
        mfu=mfu,
        mfu_unhidden=slow,
        cost=cost,
        checkpoint_bytes=measured.state_bytes,
        host_bytes=on_device * math.ceil(measured.devices / topology.hosts),
        host_memory=chip.host_memory if chip else None,
        hosts=topology.hosts,
        notes=notes,
        reading=None if measured.reading is None else judge(config, measured.reading, tokens=tokens, price=price),
    )


def _cost(tokens: float, measured: Measured, roofline: Roofline, chip: Chip, chips: int, price: float | None) -> Cost:
    seconds = tokens / measured.tokens * roofline.shortest
    chip_hours = chips * seconds / 3600
    energy = chip_hours * chip.watts * OVERHEAD / 1e6
    return Cost(tokens, seconds / DAY, chip_hours, energy, None if price is None else chip_hours * price)
