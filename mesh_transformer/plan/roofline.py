# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A bound on a step's time: what its products, its memory traffic and its communication take at the hardware's rates.

    products    hardware FLOPs / (devices x peak)
    memory      bytes moved to and from HBM / bandwidth                       (read from the compiled program)
    an axis     bytes sent over it / bandwidth of the directions it lies along (read from the compiled program)
    dcn         of groups across slices or hosts: what crosses, over the chips' share of their hosts' network

A step takes at least the longest of these, if all else is hidden behind it, and at most their sum if nothing is hidden
and everything else is perfect. Real steps lie above the first; where below the second is not for a model to say.

A ring sends both ways around, so a direction of a TPU's torus that closes gives twice a link's bandwidth, and an open
one once; a group over several directions uses all of them. Devices that share a chip share its links.
"""

from typing import NamedTuple

from mesh_transformer.plan.hardware.chips import Chip
from mesh_transformer.plan.job import CompiledStats, Traffic


class Roofline(NamedTuple):
    """Seconds of one step, by what they are spent on."""

    terms: dict[str, float]

    @property
    def bound(self) -> str:
        """The longest term: what to change first."""
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def lower_bound(self) -> float:
        """Seconds of a step in which everything else hides behind the longest term."""
        return max(self.terms.values())

    @property
    def upper_bound(self) -> float:
        """Seconds of a step in which nothing hides."""
        return sum(self.terms.values())


def make_roofline(stats: CompiledStats, chip: Chip) -> Roofline:
    """The terms of a measured program on its chips."""
    share = 1 / chip.devices
    terms = {
        "products": stats.hardware_flops / (stats.devices * chip.flops * share),
        "memory": stats.hbm_bytes / (chip.memory_bandwidth * share),
    }
    for traffic in stats.traffic:
        name = "+".join(traffic.axes) or "dcn"
        for place, seconds in zip((name, "dcn"), _traffic_seconds(traffic, chip), strict=True):
            if seconds:
                terms[place] = terms.get(place, 0.0) + seconds
    return Roofline(terms)


def _traffic_seconds(traffic: Traffic, chip: Chip) -> tuple[float, float]:
    """Seconds within slices or hosts, and between them."""
    share = 1 / chip.devices
    if traffic.kind == "send":
        return 0.0, traffic.sent / (chip.dcn_bandwidth * share)
    outer = 0.0
    if traffic.groups_spanned > 1:
        # Every host or slice sends out what its members together must tell the others, each over its own share.
        local = max(traffic.group / traffic.groups_spanned, 1.0)
        crossing = (
            traffic.sent
            * ((traffic.groups_spanned - 1) / traffic.groups_spanned)
            / ((traffic.group - 1) / traffic.group)
            / local
        )
        outer = crossing / (chip.dcn_bandwidth * share)
        if local == 1.0:
            return 0.0, outer
    return traffic.sent / _bandwidth(traffic, chip), outer


def _bandwidth(traffic: Traffic, chip: Chip) -> float:
    """Bytes per second that one device sends within its slice or host."""
    if chip.platform != "tpu":
        return chip.link_bandwidth
    if traffic.torus_dims == 0:  # the two devices of a chip: through its memory
        return chip.memory_bandwidth / 2 / chip.devices
    return chip.link_bandwidth * traffic.torus_dims * (2 if traffic.wrapped else 1) / chip.devices


def model_flops_utilization(stats: CompiledStats, chip: Chip, seconds: float) -> float:
    """Share of the chips' peak that the model's own FLOPs are, for steps of so many seconds."""
    return stats.flops / (stats.devices * chip.flops / chip.devices) / seconds
