# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The device mesh, the rules from logical axes to mesh axes, and sharding constraints for activations.

Model code gives every dimension of an array a logical axis ("embed", "heads", ...). A table of rules maps logical axes to
mesh axes:

    weights      embed -> fsdp    heads, kv_heads, ff -> tensor    vocab -> tensor and pipeline    layers -> pipeline
                 expert -> expert
    activations  batch -> data, fsdp and expert    sequence -> context
                 activation_seq -> context (and tensor, with mesh.sequence_parallel)

XLA's partitioner inserts the communication, except inside `shard_map` (embedding, loss, experts, attention kernels), where
it is explicit. The table is strict: a logical axis without a rule, a mesh axis used twice for
one array, or a size that is not divisible is an error that names the array.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mesh_transformer.config import ConfigError, MeshConfig
from mesh_transformer.host_memory import keep_freed_memory

# Ordered from the slowest interconnect to the fastest: neighbors along the last axis are neighbors in the machine.
MESH_AXES = ("data", "pipeline", "fsdp", "expert", "context", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": ("pipeline",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "latent": (),  # channels of the latent vectors of latent attention
    "ff": ("tensor",),
    "expert": ("expert",),  # tokens are sent to the experts
    "router": (),  # outputs of a router, one per expert, replicated
    "vocab": ("tensor", "pipeline"),  # every pipeline stage computes a shard of the logits
    "position": (),
    "token_type": (),
    "embedding": (),  # channels of embeddings that are projected to embed, and of a masked language-model head
    "pooled": (),
    "labels": (),
    "buckets": (),
    # statistics
    "replicated": (),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "microbatch": (),
    "stage": ("pipeline",),
    "sequence": ("context",),  # positions of activations inside a layer
    "activation_seq": ("context",),  # positions of the residual stream, between layers
    "activation_embed": (),
}


class MeshLayout(NamedTuple):
    """A mesh, and the rules that shard arrays over it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]

    def spec(self, axes: Sequence[str], shape: Sequence[int], name: str) -> PartitionSpec:
        """Return the partition spec of the array `name` with these logical axes; ConfigError if there is none."""
        parts: list[str | tuple[str, ...] | None] = []
        used: dict[str, str] = {}
        for axis, size in zip(axes, shape, strict=True):
            if axis not in self.rules:
                raise ConfigError(f"{name}: no rule for the logical axis {axis!r}; add mesh.rules.{axis}")
            mesh_axes = tuple(a for a in self.rules[axis] if self.mesh.shape[a] > 1)
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise ConfigError(
                        f"{name}: the logical axes {used[mesh_axis]!r} and {axis!r} are both sharded over the mesh axis "
                        f'{mesh_axis!r}; replicate one with mesh.rules.{axis} = ""'
                    )
                used[mesh_axis] = axis
            n_shards = math.prod(self.mesh.shape[a] for a in mesh_axes)
            if size % n_shards:
                raise ConfigError(
                    f"{name}: {axis} = {size} is not divisible by {' x '.join(mesh_axes)} = {n_shards}; "
                    f'change the size or the mesh, or replicate it with mesh.rules.{axis} = ""'
                )
            parts.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
        while parts and parts[-1] is None:
            parts.pop()
        return PartitionSpec(*parts)

    def sharding(self, axes: Sequence[str], shape: Sequence[int], name: str) -> NamedSharding:
        """Return the sharding of the array `name` on this mesh; arguments as in `spec`."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    @property
    def batch_shards(self) -> int:
        """Number of shards of a batch. Batch and microbatch sizes are multiples of it."""
        return self.num_shards("batch")

    def num_shards(self, axis: str) -> int:
        """Return the number of shards of a dimension with this logical axis."""
        return math.prod(self.mesh.shape[a] for a in self.rules[axis])


def init_devices(config: MeshConfig) -> MeshLayout:
    """Return the layout over all devices of the run's processes, or over `config.cpu_devices` virtual CPU devices.

    Must be called before any other use of JAX.
    """
    if config.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    keep_freed_memory(True)
    if jax.default_backend() != "cpu":
        keep_freed_memory(False)
    return make_layout(config)


def make_layout(config: MeshConfig, devices: Sequence[Any] | None = None) -> MeshLayout:
    """Return the layout of `config` over `devices` (default: all); ConfigError if the sizes do not fit."""
    devices = list(jax.devices() if devices is None else devices)
    inner = config.fsdp * config.expert * config.tensor * config.context * config.pipeline
    data = config.data if config.data > 0 else len(devices) // inner
    n_devices = data * inner
    sizes = {axis: data if axis == "data" else getattr(config, axis) for axis in MESH_AXES}
    if n_devices == 0 or n_devices > len(devices) or (config.data == -1 and n_devices != len(devices)):
        given = " ".join(f"{axis}={size}" for axis, size in {**sizes, "data": config.data}.items())
        raise ConfigError(
            f"mesh: {given} does not fit {len(devices)} device(s); the product must not exceed their number, "
            "and with data=-1 the product of the other axes must divide it (mesh.cpu_devices=8 makes 8 virtual CPU devices)"
        )
    # Auto axes: the partitioner propagates shardings from parameters, batch and `constrain`. JAX's default is Explicit.
    grid = _device_grid(sizes, devices[:n_devices], config.slices)
    mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    rules = make_rules(config.rules)
    if len(ring := [axis for axis in rules["sequence"] if sizes[axis] > 1]) > 1:
        raise ConfigError(
            f"mesh.rules.sequence: ring attention needs exactly one mesh axis, got {' and '.join(ring)}; name only one"
        )
    if config.sequence_parallel and "activation_seq" not in config.rules:
        rules["activation_seq"] = (*rules["sequence"], "tensor")
    return MeshLayout(mesh, rules)


def _device_grid(sizes: Mapping[str, int], devices: list[Any], slices: int | None) -> np.ndarray:
    """Return the devices as an array with the mesh's axes, so that interconnect neighbors are adjacent.

    Between slices (of TPU pods, or machines) the network is slow. Only one axis spans several slices: `data`, whose gradients
    are reduced once per step, or `pipeline`, which sends one activation from stage to stage. All axes with communication in
    every layer stay within a slice.
    """
    # JAX reports every GPU machine as a slice, although its network may be fast enough for every axis. Slices of GPUs are
    # therefore used only if mesh.slices requests them.
    slice_ids = {getattr(device, "slice_index", None) or 0 if device.platform == "tpu" else 0 for device in devices}
    n_slices = slices or len(slice_ids)
    shape = tuple(sizes.values())
    if n_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = next((axis for axis in ("data", "pipeline") if sizes[axis] % n_slices == 0), None)
    if outer is None or len(devices) % n_slices or len(slice_ids) not in (1, n_slices):
        raise ConfigError(
            f"mesh: {len(devices)} device(s) in {len(slice_ids)} slice(s) cannot be split into slices={n_slices} along data="
            f"{sizes['data']} or pipeline={sizes['pipeline']}; make one of these a multiple of the number of slices"
        )
    across = tuple(n_slices if axis == outer else 1 for axis in sizes)
    within = tuple(size // n for size, n in zip(shape, across, strict=True))
    if len(slice_ids) == n_slices:
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    parts = np.split(np.array(devices), n_slices)  # the devices have no slice numbers, so they are split in order
    return np.concatenate([part.reshape(within) for part in parts], axis=list(sizes).index(outer))


def make_rules(changes: Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return the default rules with `changes` applied; ConfigError for an unknown logical or mesh axis."""
    rules = dict(RULES)
    for axis, value in changes.items():
        mesh_axes = tuple(value.split()) if isinstance(value, str) else tuple(value)
        if axis not in RULES:
            raise ConfigError(f"mesh.rules.{axis}: unknown logical axis; use one of {', '.join(RULES)}")
        if unknown := [a for a in mesh_axes if a not in MESH_AXES]:
            raise ConfigError(f"mesh.rules.{axis}: unknown mesh axis {unknown[0]!r}; use one of {', '.join(MESH_AXES)}")
        rules[axis] = mesh_axes
    return rules


_layout: ContextVar[MeshLayout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: MeshLayout | None) -> Iterator[None]:
    """Set the layout that `constrain` follows while a program is traced."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current_layout() -> MeshLayout | None:
    """Return the layout of the program being traced, or None outside `use_layout` and for a single device."""
    layout = _layout.get()
    return None if layout is None or layout.mesh.size == 1 else layout


def target_platform() -> str:
    """Return the platform ("cpu", "gpu", "tpu") that the program being traced will run on.

    This is the platform of the devices of the current layout; outside `use_layout`, JAX's default platform.
    """
    layout = _layout.get()
    return jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform


def target_chip() -> str:
    """Return the device kind ("TPU v5p", "NVIDIA H100 80GB HBM3", "cpu") that the program being traced will run on."""
    layout = _layout.get()
    return (jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]).device_kind


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Return `x` with the sharding of these logical axes; unchanged outside `use_layout`."""
    layout = current_layout()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape, f"activation [{', '.join(axes)}]"))


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes of one dimension of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else part


def psum_or_scatter(tree: Any, axes: tuple[str, ...], *, scatter_axes: tuple[str, ...] = (), dim: int = 0) -> Any:
    """Return the sums of a tree's arrays over mesh axes, inside shard_map.

    Over `scatter_axes`, each device keeps only its own shard of dimension `dim`.
    """
    for axis in scatter_axes:
        tree = jax.tree.map(lambda x, a=axis: jax.lax.psum_scatter(x, a, scatter_dimension=dim, tiled=True), tree)
    rest = tuple(axis for axis in axes if axis not in scatter_axes)
    return jax.lax.psum(tree, rest) if rest else tree


def format_sharding_table(rows: Mapping[str, tuple[Sequence[int], Sequence[str], int]], layout: MeshLayout) -> str:
    """Return a table of shape, logical axes, partition spec and bytes per device, one line per array.

    `rows` maps the name of an array to its shape, logical axes and bytes per element.
    """
    lines = [("parameter", "shape", "axes", "spec", "bytes/device")]
    total_nbytes = 0
    for name, (shape, axes, itemsize) in rows.items():
        sharding = layout.sharding(axes, shape, name)
        nbytes = math.prod(sharding.shard_shape(tuple(shape))) * itemsize
        total_nbytes += nbytes
        spec = " ".join("." if part is None else str(part) for part in sharding.spec) or "replicated"
        lines.append((name, " x ".join(map(str, shape)), " ".join(axes), spec, f"{nbytes:,}"))
    lines.append(
        ("total", f"{sum(math.prod(shape) for shape, _, _ in rows.values()):,} parameters", "", "", f"{total_nbytes:,}")
    )
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i == 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
