# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Specifications of TPU and GPU chips, and of the TPU products that contain them.

Rates and sizes are published by the vendors; FLOP/s are for dense bfloat16 matmuls. The usable memory of a TPU is the limit
that its compiler reports when a program does not fit. The usable memory of a GPU is 95% of the size that its driver
reports, which a process can allocate with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (JAX's default is 0.75). The power of TPU v5e
and later is not published but estimated.
"""

from typing import NamedTuple

GIB, GB = 2**30, 10**9
GPU_FRACTION = 0.95  # fraction of a GPU's memory that a process can use


class Chip(NamedTuple):
    """Specification of a chip. Bandwidths are bytes per second in one direction."""

    name: str
    platform: str  # tpu or gpu
    flops: float  # peak, bfloat16 matmuls with float32 accumulation
    memory: int  # bytes that a program can use, per device
    memory_bandwidth: float
    links: int  # number of links of the fast network (ICI; NVLink counts as one link)
    link_bandwidth: float  # per link
    dcn_bandwidth: float  # to other hosts or slices: the chip's share of its host's network
    per_host: int  # chips per host
    host_memory: int  # bytes
    watts: float
    devices: int = 1  # devices that JAX reports per chip


TPU_V2 = Chip("v2", "tpu", 45e12, int(7.48 * GIB), 700e9, 4, 62e9, 3.1e9, 4, 334 * GB, 280, 2)
TPU_V3 = Chip("v3", "tpu", 123e12, int(15.48 * GIB), 900e9, 4, 82e9, 3.1e9, 4, 335 * GB, 450, 2)
TPU_V4 = Chip("v4", "tpu", 275e12, int(30.75 * GIB), 1228e9, 6, 45e9, 6.25e9, 4, 407 * GB, 192)
TPU_V5E = Chip("v5e", "tpu", 197e12, int(15.75 * GIB), 819e9, 4, 45e9, 3.1e9, 4, 192 * GB, 200)
TPU_V5P = Chip("v5p", "tpu", 459e12, int(95.74 * GIB), 2765e9, 6, 90e9, 6.25e9, 4, 448 * GB, 450)
TPU_V6E = Chip("v6e", "tpu", 918e12, int(31.25 * GIB), 1640e9, 4, 90e9, 12.5e9, 4, 720 * GB, 300)
TPU_V7X = Chip("v7x", "tpu", 2307e12, int(94.75 * GIB), 7370e9, 6, 100e9, 12.5e9, 4, 960 * GB, 960, 2)
TPUS = {chip.name: chip for chip in (TPU_V2, TPU_V3, TPU_V4, TPU_V5E, TPU_V5P, TPU_V6E, TPU_V7X)}


# CPU devices, with nominal rates so that a search can rank meshes on a laptop.
CPU = Chip("cpu", "cpu", 50e9, 4 * GIB, 10e9, 1, 5e9, 5e9, 1_000_000, 16 * GB, 0)


class GpuSpec(NamedTuple):
    """Properties that XLA needs in order to compile for a GPU; sizes in bytes."""

    product: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units per multiprocessor
    clock_ghz: float
    memory: int  # total, reported by the driver
    cache: int  # level 2
    shared: int  # shared memory per multiprocessor
    shared_optin: int  # shared memory per block, opt-in maximum
    accelerated: bool  # has architecture-specific instructions (sm_90a)


def _ampere(product: str, memory: int) -> GpuSpec:
    return GpuSpec(product, (8, 0), 108, 64, 1.41, memory, 41_943_040, 167_936, 166_912, accelerated=False)


def _hopper(product: str, memory: int) -> GpuSpec:
    return GpuSpec(product, (9, 0), 132, 128, 1.98, memory, 52_428_800, 233_472, 232_448, accelerated=True)


def _blackwell(product: str, memory: int) -> GpuSpec:
    return GpuSpec(product, (10, 0), 148, 128, 1.965, memory, 132_644_864, 233_472, 232_448, accelerated=True)


GPU_SPECS = {
    "A100-40": _ampere("NVIDIA A100-SXM4-40GB", 42_298_834_944),
    "A100-80": _ampere("NVIDIA A100-SXM4-80GB", 85_100_068_864),
    "H100": _hopper("NVIDIA H100 80GB HBM3", 84_942_979_072),
    "H200": _hopper("NVIDIA H200 141GB HBM3e", 151_397_597_184),
    "B200": _blackwell("NVIDIA B200", 191_514_411_008),
}


def _gpu(
    name: str, flops: float, bandwidth: float, nvlink: float, network: float, host_memory: int, watts: float
) -> Chip:
    memory = int(GPU_SPECS[name].memory * GPU_FRACTION)
    return Chip(name, "gpu", flops, memory, bandwidth, 1, nvlink, network, 8, host_memory, watts)


GPUS = {
    chip.name: chip
    for chip in (
        _gpu("A100-40", 312e12, 1555e9, 300e9, 25e9, 1000 * GB, 400),
        _gpu("A100-80", 312e12, 2039e9, 300e9, 25e9, 2000 * GB, 400),
        _gpu("H100", 989e12, 3352e9, 450e9, 50e9, 2000 * GB, 700),
        _gpu("H200", 989e12, 4800e9, 450e9, 50e9, 2000 * GB, 700),
        _gpu("B200", 2250e12, 7672e9, 900e9, 50e9, 2000 * GB, 1000),
    )
}


class Family(NamedTuple):
    """Products of a TPU generation, by the number in their names."""

    libtpu: str  # name of the generation in libtpu's topologies
    names: tuple[str, ...]  # accepted prefixes of product names; the first is printed
    slices: dict[int, tuple[int, ...]]  # number in the name -> shape of the torus, in chips


# Shapes of 2D and 3D tori by the number in the name of a product.
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
CUBES = {
    8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8), 384: (4, 4, 12),
    512: (4, 8, 8), 768: (4, 8, 12), 1024: (8, 8, 8), 1152: (4, 12, 12), 1536: (8, 8, 12), 2048: (8, 8, 16),
    2304: (8, 12, 12), 3072: (8, 12, 16), 4096: (8, 16, 16), 4608: (12, 12, 16), 6144: (12, 16, 16),
    8192: (16, 16, 16), 9216: (12, 16, 24), 12288: (16, 16, 24),
}  # fmt: skip


def _up_to(limit: int) -> dict[int, tuple[int, ...]]:
    return {number: shape for number, shape in CUBES.items() if number <= limit}


FAMILIES = {
    "v2": Family("v2", ("v2",), {8: (2, 2), 32: (4, 4), 128: (8, 8), 256: (8, 16), 512: (16, 16)}),
    "v3": Family(
        "v3",
        ("v3",),
        {8: (2, 2), 32: (4, 4), 64: (4, 8), 128: (8, 8), 256: (8, 16), 512: (16, 16), 1024: (16, 32), 2048: (32, 32)},
    ),
    "v4": Family("v4", ("v4",), _up_to(4096)),
    "v5e": Family("v5e", ("v5e", "v5litepod", "v5lite"), FLAT),
    "v5p": Family("v5p", ("v5p",), CUBES),
    "v6e": Family("v6e", ("v6e", "trillium"), FLAT),
    "v7x": Family("tpu7x", ("v7x", "tpu7x", "ironwood"), {2: (1, 1, 1), **_up_to(4096)}),
}

# Chips by the device kinds that JAX reports.
DEVICE_KINDS = {
    "TPU v2": TPU_V2, "TPU v3": TPU_V3, "TPU v4": TPU_V4, "TPU v5 lite": TPU_V5E, "TPU v5e": TPU_V5E, "TPU v5": TPU_V5P,
    "TPU v5p": TPU_V5P, "TPU v6 lite": TPU_V6E, "TPU v6e": TPU_V6E, "TPU7x": TPU_V7X,
} | {gpu.product: GPUS[name] for name, gpu in GPU_SPECS.items()}  # fmt: skip
