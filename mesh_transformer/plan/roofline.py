# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Roofline bounds on the time of a step: matmuls, memory traffic and communication at the hardware's rates.

    matmul      hardware FLOPs / (devices x peak)
    memory      bytes moved to and from HBM / bandwidth                         (from the compiled program)
    mesh axis   bytes sent over it / bandwidth of the torus dimensions it spans (from the compiled program)
    dcn         data-center network: bytes sent between slices or hosts / the chips' share of the host network

With full overlap a step takes the longest of these times (lower bound), without overlap their sum (upper bound). Real steps
take longer than the lower bound; the model does not predict whether they take longer than the upper bound.

A ring sends in both directions, so a torus dimension that is a ring has twice the bandwidth of a link, and a dimension that
is not a ring has the bandwidth of one link. A group that spans several dimensions uses all of them. Devices that share a chip
share its links.
"""

from typing import NamedTuple

from mesh_transformer.plan.hardware.chips import Chip
from mesh_transformer.plan.job import CompiledStats, Traffic


class Roofline(NamedTuple):
    """Seconds of one step by resource: matmul, memory, each combination of mesh axes, and dcn."""

    terms: dict[str, float]

    @property
    def bound(self) -> str:
        """Return the name of the longest term."""
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def lower_bound(self) -> float:
        """Return the seconds of a step with full overlap."""
        return max(self.terms.values())

    @property
    def upper_bound(self) -> float:
        """Return the seconds of a step without overlap."""
        return sum(self.terms.values())


def make_roofline(stats: CompiledStats, chip: Chip) -> Roofline:
    """Return the roofline of a compiled program on its chips."""
    share = 1 / chip.devices
    terms = {
        "matmul": stats.hardware_flops / (stats.devices * chip.flops * share),
        "memory": stats.hbm_bytes / (chip.memory_bandwidth * share),
    }
    for traffic in stats.traffic:
        name = "+".join(traffic.axes) or "dcn"
        for term, seconds in zip((name, "dcn"), _traffic_seconds(traffic, chip), strict=True):
            if seconds:
                terms[term] = terms.get(term, 0.0) + seconds
    return Roofline(terms)


def _traffic_seconds(traffic: Traffic, chip: Chip) -> tuple[float, float]:
    """Return the seconds of the traffic within slices or hosts, and between them."""
    share = 1 / chip.devices
    if traffic.kind == "send":
        return 0.0, traffic.sent / (chip.dcn_bandwidth * share)
    between = 0.0
    if traffic.groups_spanned > 1:
        # Each member sends its share of the traffic between hosts or slices over its share of the network.
        local = max(traffic.group / traffic.groups_spanned, 1.0)
        crossing = (
            traffic.sent
            * ((traffic.groups_spanned - 1) / traffic.groups_spanned)
            / ((traffic.group - 1) / traffic.group)
            / local
        )
        between = crossing / (chip.dcn_bandwidth * share)
        if local == 1.0:
            return 0.0, between
    return traffic.sent / _bandwidth(traffic, chip), between


def _bandwidth(traffic: Traffic, chip: Chip) -> float:
    """Return the bytes per second that one device sends within its slice or host."""
    if chip.platform != "tpu":
        return chip.link_bandwidth
    if traffic.torus_dims == 0:  # the two devices of a chip communicate through the memory of the chip
        return chip.memory_bandwidth / 2 / chip.devices
    return chip.link_bandwidth * traffic.torus_dims * (2 if traffic.wrapped else 1) / chip.devices


def model_flops_utilization(stats: CompiledStats, chip: Chip, seconds: float) -> float:
    """Return the model FLOPs per second as a fraction of the chips' peak, for a step of `seconds`."""
    return stats.flops / (stats.devices * chip.flops / chip.devices) / seconds
