# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Devices -> mesh; logical axes -> partition specs; `constrain` for activations; the table of what lies where.

Model code names the role of every dimension ("embed", "heads", ...). One rules table maps roles to mesh axes:

    weights      embed -> fsdp    heads, kv_heads, ff -> tensor    vocab -> tensor and pipeline    layers -> pipeline
                 expert -> expert
    activations  batch -> data, fsdp and expert    sequence -> context    stream -> context (and tensor: sequence_parallel)

and XLA's partitioner inserts the communication. The table is strict: a name without a rule, a mesh axis used twice on
one array, or a size that does not divide is an error that names the array.
"""

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mesh_transformer.config import ConfigError, MeshConfig
from mesh_transformer.host_memory import trim_memory

# From the slowest connection to the fastest: neighbours on the last axis are neighbours in the machine.
MESH_AXES = ("data", "pipeline", "fsdp", "expert", "context", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": ("pipeline",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ff": ("tensor",),
    "expert": ("expert",),  # weights of experts; the tokens come to them
    "router": (),  # a router's outputs: one for each expert, wherever that is
    "vocab": ("tensor", "pipeline"),  # every stage takes part in scoring
    "position": (),
    "buckets": (),
    # statistics
    "replicated": (),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "microbatch": (),  # microbatches of a batch
    "stage": ("pipeline",),
    "sequence": ("context",),  # inside a block
    "activation_seq": ("context",),  # between blocks
    "activation_embed": (),
}


class MeshLayout(NamedTuple):
    """A mesh and the rules that place arrays on it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]

    def spec(self, axes: Sequence[str], shape: Sequence[int], name: str) -> PartitionSpec:
        """The partition of an array called `name` whose dimensions have these logical axes; ConfigError if it has none."""
        parts: list[str | tuple[str, ...] | None] = []
        used: dict[str, str] = {}
        for axis, size in zip(axes, shape, strict=True):
            if axis not in self.rules:
                raise ConfigError(f"{name}: no rule for the logical axis {axis!r}; add mesh.rules.{axis}")
            mesh_axes = tuple(a for a in self.rules[axis] if self.mesh.shape[a] > 1)
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise ConfigError(
                        f"{name}: the logical axes {used[mesh_axis]!r} and {axis!r} both lie on the mesh axis "
                        f'{mesh_axis!r}; change one with mesh.rules.{axis} = ""'
                    )
                used[mesh_axis] = axis
            pieces = math.prod(self.mesh.shape[a] for a in mesh_axes)
            if size % pieces:
                raise ConfigError(
                    f"{name}: {axis} = {size} does not divide over {' x '.join(mesh_axes)} = {pieces}; "
                    f'change the size or the mesh, or replicate it with mesh.rules.{axis} = ""'
                )
            parts.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
        while parts and parts[-1] is None:
            parts.pop()
        return PartitionSpec(*parts)

    def sharding(self, axes: Sequence[str], shape: Sequence[int], name: str) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    @property
    def batch_shards(self) -> int:
        """Pieces a batch is cut into; batch and microbatch sizes are multiples of it."""
        return self.num_shards("batch")

    def num_shards(self, axis: str) -> int:
        """Pieces a dimension with this logical axis is cut into."""
        return math.prod(self.mesh.shape[a] for a in self.rules[axis])


def init_devices(config: MeshConfig) -> MeshLayout:
    """The layout over this machine's devices, or over `config.cpu_devices` pieces of its CPU; call before other JAX work."""
    if config.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    keep_freed_memory(True)
    if jax.default_backend() != "cpu":
        keep_freed_memory(False)
    return make_layout(config)


# Parameters of glibc's mallopt: those for keeping memory, and glibc's own defaults.
_MALLOC = {-4: (0, 65_536), -1: (-1, 131_072)}  # mapped blocks, free bytes to keep
_ARENAS = -8


def keep_freed_memory(keep: bool, *, one_arena: bool | None = None) -> None:
    """Have malloc keep what is freed, or not; Linux with glibc only, elsewhere nothing happens.

    XLA's CPU client asks malloc for a step's temporary buffers anew in every step. Given back to the kernel in between,
    every page of them is faulted in and cleared again: a third of the time of a training step of a few million parameters.
    One arena, made before JAX starts its threads, because only the first one grows without limit; by default where memory
    is kept.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_ARENAS, int(keep if one_arena is None else one_arena))
        for parameter, values in _MALLOC.items():
            libc.mallopt(parameter, values[0 if keep else 1])
        if not keep:
            trim_memory()


def make_layout(config: MeshConfig, devices: Sequence[Any] | None = None) -> MeshLayout:
    """The mesh `config` asks for over `devices` (all, if not given), with its rules; ConfigError if sizes do not fit."""
    devices = list(jax.devices() if devices is None else devices)
    inner = config.fsdp * config.expert * config.tensor * config.context * config.pipeline
    data = config.data if config.data > 0 else len(devices) // inner
    wanted = data * inner
    sizes = {axis: data if axis == "data" else getattr(config, axis) for axis in MESH_AXES}
    if wanted == 0 or wanted > len(devices) or (config.data == -1 and wanted != len(devices)):
        given = " ".join(f"{axis}={size}" for axis, size in {**sizes, "data": config.data}.items())
        raise ConfigError(
            f"mesh: {given} does not fit {len(devices)} device(s); the product must not exceed their number, "
            "and with data=-1 the other axes together must divide it (mesh.cpu_devices=8 splits a CPU into eight)"
        )
    # Auto axes: the partitioner propagates shardings from parameters, batch and `constrain`; JAX's default is Explicit.
    mesh = Mesh(_device_grid(sizes, devices[:wanted], config.slices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    rules = make_rules(config.rules)
    if len(ring := [axis for axis in rules["sequence"] if sizes[axis] > 1]) > 1:
        raise ConfigError(f"mesh.rules.sequence: {' and '.join(ring)} do not make one ring; name one mesh axis")
    if config.sequence_parallel and "activation_seq" not in config.rules:
        rules["activation_seq"] = (*rules["sequence"], "tensor")
    return MeshLayout(mesh, rules)


def _device_grid(sizes: Mapping[str, int], devices: list[Any], slices: int | None) -> np.ndarray:
    """Devices as an array with the mesh's axes: neighbours lie side by side, and slices apart along one axis alone.

    Between slices (pods, or machines) the network is slow. They lie along `data`, whose gradients are added up once, or
    along `pipeline`, which moves one activation from stage to stage; never along an axis that talks in every layer.
    """
    # GPUs call every machine a slice, though they may well talk in every layer across machines: there slices are asked for.
    found = {getattr(device, "slice_index", None) or 0 if device.platform == "tpu" else 0 for device in devices}
    n_slices = slices or len(found)
    shape = tuple(sizes.values())
    if n_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = next((axis for axis in ("data", "pipeline") if sizes[axis] % n_slices == 0), None)
    if outer is None or len(devices) % n_slices or len(found) not in (1, n_slices):
        raise ConfigError(
            f"mesh: {len(devices)} device(s) in {len(found)} slice(s) do not make slices={n_slices} that lie along data="
            f"{sizes['data']} or pipeline={sizes['pipeline']}; make one of these a multiple of the number of slices"
        )
    across = tuple(n_slices if axis == outer else 1 for axis in sizes)
    within = tuple(size // n for size, n in zip(shape, across, strict=True))
    if len(found) == n_slices:
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    parts = np.split(np.array(devices), n_slices)  # devices that know no slices: the first ones are the first slice
    return np.concatenate([part.reshape(within) for part in parts], axis=list(sizes).index(outer))


def make_rules(changes: Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The default rules with `changes` applied; ConfigError for an unknown logical or mesh axis."""
    rules = dict(RULES)
    for axis, value in changes.items():
        mesh_axes = tuple(value.split()) if isinstance(value, str) else tuple(value)
        if axis not in RULES:
            raise ConfigError(f"mesh.rules.{axis}: no such logical axis; there are {', '.join(RULES)}")
        if unknown := [a for a in mesh_axes if a not in MESH_AXES]:
            raise ConfigError(f"mesh.rules.{axis}: no such mesh axis {unknown[0]!r}; there are {', '.join(MESH_AXES)}")
        rules[axis] = mesh_axes
    return rules


_layout: ContextVar[MeshLayout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: MeshLayout | None) -> Iterator[None]:
    """Make `constrain` follow `layout` while a program is traced."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current_layout() -> MeshLayout | None:
    """The layout of the program being traced, where it has more than one device."""
    layout = _layout.get()
    return None if layout is None or layout.mesh.size == 1 else layout


def target_platform() -> str:
    """What the program being traced will run on ("cpu", "gpu", "tpu"): its layout's devices, or JAX's default ones."""
    layout = _layout.get()
    return jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform


def target_chip() -> str:
    """The kind of device, as its maker names it ("TPU v5p", "NVIDIA H100 80GB HBM3", "cpu"), of the program being traced."""
    layout = _layout.get()
    return (jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]).device_kind


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """`x`, kept partitioned by the rules for these logical axes (unchanged outside `use_layout`)."""
    layout = current_layout()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape, f"activation [{', '.join(axes)}]"))


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one dimension of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else part


def psum_or_scatter(tree: Any, axes: tuple[str, ...], *, scatter_axes: tuple[str, ...] = (), dim: int = 0) -> Any:
    """Sums over mesh axes, inside shard_map; over those of `scattered` each device keeps its own piece of dimension `dim`."""
    for axis in scatter_axes:
        tree = jax.tree.map(lambda x, a=axis: jax.lax.psum_scatter(x, a, scatter_dimension=dim, tiled=True), tree)
    rest = tuple(axis for axis in axes if axis not in scatter_axes)
    return jax.lax.psum(tree, rest) if rest else tree


def format_sharding_table(rows: Mapping[str, tuple[Sequence[int], Sequence[str], int]], layout: MeshLayout) -> str:
    """One line per array of `rows` (name -> shape, logical axes, bytes per element): what lies where, and how much of it."""
    lines = [("parameter", "shape", "axes", "spec", "bytes/device")]
    total = 0
    for name, (shape, axes, itemsize) in rows.items():
        sharding = layout.sharding(axes, shape, name)
        size = math.prod(sharding.shard_shape(tuple(shape))) * itemsize
        total += size
        spec = " ".join("." if part is None else str(part) for part in sharding.spec) or "replicated"
        lines.append((name, " x ".join(map(str, shape)), " ".join(axes), spec, f"{size:,}"))
    lines.append(
        ("total", f"{sum(math.prod(shape) for shape, _, _ in rows.values()):,} parameters", "", "", f"{total:,}")
    )
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i == 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
