# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Topologies by product name, and consistency of the hardware table."""

import math
import re

import pytest

from mesh_transformer.config import ConfigError
from mesh_transformer.plan.hardware.chips import FAMILIES, GPU_SPECS, GPUS, TPUS
from mesh_transformer.plan.hardware.topologies import gpu_target, parse_topology, product_names
from mesh_transformer.plan.run import parse_amount


@pytest.mark.parametrize(
    ("name", "kind", "chips", "devices", "hosts"),
    [
        ("v2-8", "v2", 4, 8, 1),
        ("v3-8", "v3", 4, 8, 1),
        ("v3-256", "v3", 128, 256, 32),
        ("v4-8", "v4", 4, 4, 1),
        ("v4-2048", "v4", 1024, 1024, 256),
        ("v5e-1", "v5e", 1, 1, 1),
        ("v5litepod-256", "v5e", 256, 256, 64),
        ("v5p-1024", "v5p", 512, 512, 128),
        ("v5p-12288", "v5p", 6144, 6144, 1536),
        ("v6e-256", "v6e", 256, 256, 64),
        ("v7x-8", "v7x", 4, 8, 1),
        ("2xv5e-256", "v5e", 512, 512, 128),
        ("H100", "H100", 1, 1, 1),
        ("h100", "H100", 1, 1, 1),
        ("8xH100", "H100", 8, 8, 1),
        ("128x8xH100", "H100", 1024, 1024, 128),
        ("12x8xA100-40", "A100-40", 96, 96, 12),
        ("4xB200", "B200", 4, 4, 1),
    ],
)
def test_names(name, kind, chips, devices, hosts):
    topology = parse_topology(name)
    assert topology.chip is not None
    assert (topology.chip.name, topology.chips, topology.devices, topology.hosts) == (kind, chips, devices, hosts)


def test_local_devices():
    assert parse_topology("cpu-8").devices == 8
    assert parse_topology("local").devices == 0


def test_an_assumed_default_is_noted():
    topology = parse_topology("8xA100")
    assert topology.chip is GPUS["A100-80"]
    assert "use A100-40 for 40 GB" in topology.note
    assert not parse_topology("8xA100-40").note


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v5e-12", "the nearest are v5e-8, v5e-16, v5e-32"),
        ("v5p-1000", "v5p-1024"),
        ("2xv5e-12", "2xv5e-8"),
        ("v8-8", "v3-8"),
        ("16xH100", "2x8xH100"),
        ("8xV100", "8xH100"),
        ("cpu-0", "examples: v3-8"),
        ("2xlocal", "local"),
        ("", "examples: v3-8"),
    ],
)
def test_unknown_names_are_rejected_with_the_closest(name, hint):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        parse_topology(name)


def test_product_names_are_unique_and_parsed():
    names = product_names()
    assert len(names) == len(set(names))
    assert all(parse_topology(name).name == name for name in names)


def test_slice_shapes_match_their_numbers():
    for kind, family in FAMILIES.items():
        cores = kind in ("v2", "v3", "v4", "v5p", "v7x")  # named by cores, two per chip
        for number, shape in family.slices.items():
            assert math.prod(shape) * (2 if cores else 1) == number, f"{kind}-{number}"


def test_specifications_are_plausible():
    for chip in [*TPUS.values(), *GPUS.values()]:
        assert 40e12 < chip.flops < 3000e12
        assert 7 * 2**30 < chip.memory < 200 * 2**30
        assert chip.dcn_bandwidth < chip.link_bandwidth < chip.memory_bandwidth
        assert chip.memory * chip.devices * chip.per_host < 2 * chip.host_memory
    for name, gpu in GPU_SPECS.items():
        assert GPUS[name].memory == int(gpu.memory * 0.95)
        text = gpu_target(gpu)
        assert text.count("{") == text.count("}")
        assert f"device_memory_size: {gpu.memory}" in text
        assert f"memory_bandwidth: {GPUS[name].memory_bandwidth:.0f}\n" in text


def test_amounts():
    assert parse_amount("300B") == 300e9
    assert parse_amount("1.5T") == 1.5e12
    assert parse_amount("2e9") == 2e9
    for wrong in ("300G", "0", "-1", "many"):
        with pytest.raises(ConfigError, match="300B"):
            parse_amount(wrong)
