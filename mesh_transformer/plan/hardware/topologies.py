# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Topologies by product name: kind and number of chips, and abstract devices to compile for.

v3-8, v4-2048, v5p-1024, v7x-128      number of cores, two per chip
v5e-256 (v5litepod-256), v6e-8        number of chips
2xv5e-256                             two slices, connected by the data-center network
H100, 8xH100, 128x8xH100              one GPU; GPUs of one host; hosts x GPUs per host
cpu-8                                 the local CPU as eight devices
local                                 the local devices
"""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mesh_transformer.config import ConfigError
from mesh_transformer.plan.hardware.chips import FAMILIES, GPU_SPECS, GPUS, TPUS, Chip, GpuSpec

NVLINK_HOST = 8  # GPUs of a host, which NVLink connects
DEFAULT_A100 = "A100-80"


class MissingCompilerError(RuntimeError):
    """The compiler of a platform is not installed; the message has the install command."""


class Topology(NamedTuple):
    """A named set of devices."""

    name: str
    chip: Chip | None  # None: local devices, which are not known in advance
    shape: tuple[int, ...]  # chips of one slice per dimension; (devices,) for a CPU; () for local
    slices: int = 1  # number of slices, or hosts of GPUs, connected by the slower network
    note: str = ""  # assumption made for an ambiguous name

    @property
    def chips(self) -> int:
        """Return the number of chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Return the number of devices that JAX reports; 0 for local devices."""
        return self.chips * (self.chip.devices if self.chip else 1) if self.shape else 0

    @property
    def hosts(self) -> int:
        """Return the number of host machines."""
        if self.chip is None:
            return 1
        return self.slices * math.ceil(math.prod(self.shape) / self.chip.per_host)


def parse_topology(name: str) -> Topology:
    """Return the topology named `name`. Raises ConfigError, with the closest names, if it is unknown."""
    if name == "local":
        return Topology(name, None, ())
    if match := re.fullmatch(r"cpu-([1-9]\d*)", name):
        return Topology(name, None, (int(match[1]),))
    if match := re.fullmatch(r"(?:([1-9]\d*)x)?([a-z0-9]+?)-([1-9]\d*)", name):
        tpu_slice = _find_slice(match[2], int(match[3]))
        if tpu_slice:
            kind, shape = tpu_slice
            return Topology(name, TPUS[kind], shape, int(match[1] or 1))
    if match := re.fullmatch(r"(?:([1-9]\d*)x)?(?:([1-9]\d*)x)?([A-Z][A-Z0-9]*(?:-\d+)?)", name, re.I):
        outer, inner, gpu = match[1], match[2], match[3].upper()
        if gpu in GPUS or gpu == "A100":
            return _gpu_topology(name, int(outer or 1) if inner else 1, int(inner or outer or 1), gpu)
    raise ConfigError(f"--topology {name}: unknown product; {_nearest(name)}")


def _find_slice(prefix: str, number: int) -> tuple[str, tuple[int, ...]] | None:
    for kind, family in FAMILIES.items():
        if prefix in family.names and number in family.slices:
            return kind, family.slices[number]
    return None


def _gpu_topology(name: str, hosts: int, gpus: int, gpu: str) -> Topology:
    note = ""
    if gpu == "A100":
        gpu = DEFAULT_A100
        note = f"A100 means {DEFAULT_A100} with 80 GB; use A100-40 for 40 GB"
    if gpus > NVLINK_HOST:
        n_hosts = math.ceil(gpus / NVLINK_HOST)
        raise ConfigError(
            f"--topology {name}: a host has at most {NVLINK_HOST} GPUs; write hosts x GPUs per host, for example "
            f"{n_hosts}x{NVLINK_HOST}x{gpu}"
        )
    return Topology(name, GPUS[gpu], (gpus,), hosts, note)


def product_names() -> list[str]:
    """Return the names of all products with one slice or host."""
    tpus = [f"{family.names[0]}-{number}" for family in FAMILIES.values() for number in family.slices]
    return tpus + [f"{count}{gpu}" for gpu in GPUS for count in ("", "2x", "4x", "8x")] + ["cpu-8", "local"]


def _nearest(name: str) -> str:
    """Return the names closest to `name`, by number within a generation and otherwise by spelling, with examples."""
    match = re.fullmatch(r"((?:[1-9]\d*x)?)([a-z0-9]+?)-(\d+)", name)
    for family in FAMILIES.values():
        if match and match[2] in family.names:
            near = sorted(sorted(family.slices, key=lambda n: abs(math.log(n / max(int(match[3]), 1))))[:3])
            return "the nearest are " + ", ".join(f"{match[1]}{family.names[0]}-{number}" for number in near)
    aliases = {f"{alias}-{n}": None for family in FAMILIES.values() for alias in family.names for n in family.slices}
    near = difflib.get_close_matches(name, [*product_names(), *aliases, "16x8xH100"], n=3, cutoff=0.4)
    hint = f"the nearest are {', '.join(near)}; " if near else ""
    return hint + "examples: v3-8, v5p-1024, 2xv5e-256, 8xH100, 16x8xA100-80, cpu-8, local"


def make_devices(topology: Topology) -> Sequence[Any]:
    """Return the abstract devices of a TPU or GPU topology, to compile for.

    Raises MissingCompilerError if the compiler of the platform is not installed.
    """
    from jax.experimental import topologies

    assert topology.chip is not None, "local and cpu-N are JAX's own devices"
    try:
        if topology.chip.platform == "gpu":
            description = topologies.get_topology_desc(
                platform="cuda",
                target_config=gpu_target(GPU_SPECS[topology.chip.name]),
                topology=f"1x{topology.slices}x{math.prod(topology.shape)}",
            )
        else:
            description = topologies.get_topology_desc(platform="tpu", **_libtpu_options(topology))
    except (RuntimeError, NotImplementedError) as error:
        if "not installed" in str(error) or "not implemented" in str(error):
            raise MissingCompilerError(
                f"--topology {topology.name}: the compiler for {topology.chip.platform.upper()}s is not installed; run: "
                "pip install 'mesh-transformer[plan]' (installs libtpu, under Google's license, and the CUDA plugin)"
            ) from None
        raise
    return description.devices


def _libtpu_options(topology: Topology) -> dict[str, Any]:
    assert topology.chip is not None
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip with two cores, as on the hardware
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    shape = "x".join(map(str, topology.shape))
    return dict(topology_name=f"{FAMILIES[topology.chip.name].libtpu}:{shape}", **options)


def gpu_target(gpu: GpuSpec) -> str:
    """Return the text of XLA's GpuTargetConfigProto for a GPU, with which XLA compiles without querying a device."""
    feature = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    major, minor = gpu.capability
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_optin}
  shared_memory_per_core: {gpu.shared}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(GPUS_BANDWIDTH[gpu.product])}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.product}"
"""


GPUS_BANDWIDTH = {GPU_SPECS[name].product: chip.memory_bandwidth for name, chip in GPUS.items()}
