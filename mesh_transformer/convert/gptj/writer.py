# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Write native weights as a checkpoint of mesh-transformer-jax with any number of shards; reader.py describes the format."""

import contextlib
import functools
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoint.bounded_pool import run_bounded
from mesh_transformer.checkpoint.local_backend import write_synced
from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig, format_value
from mesh_transformer.convert.gptj.reader import (
    DTYPES,
    NORMS,
    NPZ_FILES,
    POSITIONS,
    Leaf,
    indivisible_dims,
    list_leaves,
    read_model,
)
from mesh_transformer.convert.import_plan import (
    ImportPlan,
    WeightSpec,
    describe_weights,
    list_weights,
    make_model_config,
    raise_problems,
)
from mesh_transformer.convert.layout_views import Packed
from mesh_transformer.convert.lazy_arrays import InMemory, LazyArray, cast_values, to_c_order, to_dtype
from mesh_transformer.convert.progress import ByteCounter, Progress, no_progress
from mesh_transformer.convert.slicing import SLICE_BYTES
from mesh_transformer.storage.direct_io import DirectFile


def make_external_config(config: ModelConfig, shards: int) -> dict[str, Any]:
    """Return the JSON configuration of a model for mesh-transformer-jax, without keys for training and storage.

    The configuration is read back and compared with the model. Raises CheckpointError with the fields that differ, so a
    field that the format cannot represent is never dropped silently.
    """
    problems: list[str] = []
    incomparable: set[str] = set()
    pe = {native: external for external, native in POSITIONS.items()}.get(config.positions)
    if pe is None:
        problems.append(
            f"positions = {format_value(config.positions)}, but must be one of {format_value(list(POSITIONS.values()))}"
        )
        incomparable |= {"positions", "rope_dims", "rope_theta", "rope_scaling"}
    norm = {native: external for external, native in NORMS.items()}.get((config.norm, config.norm_bias))
    if norm is None:
        problems.append(
            f"norm = {format_value(config.norm)}, but must be one of "
            + format_value(sorted({native for native, _ in NORMS.values()}))
        )
        incomparable |= {"norm", "norm_bias"}
    external: dict[str, Any] = dict(
        layers=config.n_layers,
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_vocab=config.n_vocab,
        norm=norm or "layernorm",
        pe=pe or "fixed",
    )
    external |= dict(pe_rotary_dims=config.rope_dim) if pe == "rotary" else {}
    external |= dict(seq=config.seq_len, cores_per_replica=shards, per_replica_batch=1)
    problems += _find_differences(config, external, incomparable)
    raise_problems("mesh-transformer-jax v1 cannot represent this model; choose another --format", problems)
    raise_problems("the model cannot be divided into shards; choose another --shards", indivisible_dims(config, shards))
    return external


def _find_differences(config: ModelConfig, external: Mapping[str, Any], incomparable: set[str]) -> list[str]:
    """Return the fields in which the function of a model differs from that of a JSON configuration."""
    wanted = config.effective_fields()
    if "local" not in config.attention_pattern:
        wanted["attention_pattern"] = ("global",)  # the pattern may have any length
    try:
        exported = make_model_config(read_model(external), "the exported configuration").effective_fields()
    except CheckpointError as error:  # the exported configuration is invalid, for example because of its sizes
        return [str(error)]
    return [
        f"{key} = {format_value(value)}, but must be {format_value(exported.get(key))}"
        for key, value in wanted.items()
        if key not in incomparable and (key not in exported or exported[key] != value)
    ]


def write_gptj(
    folder: Path,
    plan: ImportPlan,
    *,
    shards: int,
    dtype: str = "bfloat16",
    slice_bytes: int = SLICE_BYTES,
    progress: Progress = no_progress,
) -> None:
    """Write a checkpoint without optimizer state to folder/step_<step>, with config.json and meta.json.

    Leaves that are summed, or used from shard 0 only, are written to shard 0. In the other shards they are zeros, or ones
    for scales of norms, so that reading them gives the same bits. A few slices of `slice_bytes` are in memory at once. An
    .npz file is renamed to its final name when it is complete, and existing files are not written again, so the same call
    resumes after an interruption. Raises CheckpointError if the model, the number of shards or the dtype is not supported.
    """
    external_config = make_external_config(plan.config, shards)
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    target = to_dtype(dtype)
    weights = _find_weights(plan)
    leaves = [_make_leaf(leaf, weights, plan.config.d_model) for leaf in list_leaves(plan.config)]
    leaves.append(ShardedLeaf("step", InMemory(np.array(plan.step, np.int32)), "replicated"))
    counter = ByteCounter("writing", sum(leaf.nbytes(target) for leaf in leaves), progress)
    folders = [folder / f"step_{plan.step}" / f"shard_{s}" for s in range(shards)]
    for shard in folders:
        shard.mkdir(parents=True, exist_ok=True)

    def write(paths: Sequence[Path], leaves: Sequence[ShardedLeaf]) -> None:
        if all(path.exists() for path in paths):
            for leaf in leaves:
                counter.add(leaf.nbytes(target))
            return
        for nbytes in _write_npz(paths, leaves, target, slice_bytes):
            counter.add(nbytes)

    per_file, rest = divmod(len(leaves), NPZ_FILES)
    remaining = iter(leaves)
    file_groups = [  # the same file of all shards, and its leaves
        ([shard / f"{i}.npz" for shard in folders], list(itertools.islice(remaining, per_file + (i < rest))))
        for i in range(NPZ_FILES)
    ]
    file_groups.sort(key=lambda group: -sum(leaf.nbytes(target) for leaf in group[1]))  # the smallest files end last
    for _ in run_bounded(functools.partial(write, *group) for group in file_groups):
        pass
    meta = {"step": plan.step, "checkpoints": [plan.step], "aux": {str(plan.step): {}}}
    for name, table in (("config.json", external_config), ("meta.json", meta)):
        write_synced(folder / name, json.dumps(table, indent=1).encode())


Weights = dict[tuple[str | None, int | None], tuple[LazyArray, WeightSpec]]  # by name and layer


def _find_weights(plan: ImportPlan) -> Weights:
    """Return the weights of a plan. Raise CheckpointError if one is missing or has a wrong shape."""
    arrays = plan.values
    missing = [f"{name} is missing" for name in describe_weights(plan.config) if name not in arrays]
    raise_problems("the source lacks weights of the model; nothing was written", missing)
    weights: Weights = {}
    for spec, array in list_weights(plan.config, arrays):
        wrong = [f"{spec} has shape {array.shape}, expected {spec.shape}"] if array.shape != spec.shape else []
        raise_problems("a weight of the source has a wrong shape; nothing was written", wrong)
        weights[spec.name, spec.layer] = array, spec
    return weights


class ShardedLeaf(NamedTuple):
    """An external leaf before it is divided into shards, and its division."""

    name: str
    values: Packed | InMemory
    # Dimension that is split over shards; or "replicated"; or "sum" or "first": shard 0 has all values, the others have `fill`
    split: int | str
    fill: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape before the division into shards."""
        return self.values.shape

    def nbytes(self, dtype: np.dtype) -> int:
        """Return the number of bytes to read for the leaf; 0 if it is in memory."""
        return 0 if isinstance(self.values, InMemory) else math.prod(self.shape) * dtype.itemsize


def _make_leaf(leaf: Leaf, weights: Weights, d_model: int) -> ShardedLeaf:
    """Return a leaf with its values. A leaf without a native weight has zeros, or ones if it is the scale of a norm."""
    mapping = leaf.mapping
    fill = 1 if mapping.external.endswith("/scale") else 0
    if (mapping.native, leaf.layer) not in weights:
        unused = Packed([InMemory(np.full(d_model, fill, np.float32))], "embed", [("embed",)])
        return ShardedLeaf(leaf.name, unused, "replicated")
    array, spec = weights[mapping.native, leaf.layer]
    split = "replicated" if mapping.merge == "mean" else mapping.merge
    return ShardedLeaf(leaf.name, Packed([array], mapping.pattern, [spec.axes]), split, fill)


def _write_npz(
    paths: Sequence[Path], leaves: Sequence[ShardedLeaf], dtype: np.dtype, slice_bytes: int
) -> Iterator[int]:
    """Write the same .npz file of every shard durably, then rename them; yield the number of bytes read for each block.

    All shards are written together, so that a matrix that is split by columns is read only once.
    """
    temporary = [path.with_suffix(".tmp") for path in paths]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(DirectFile(path)) for path in temporary]
        archives = [stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)) for file in files]
        for i, leaf in enumerate(leaves):
            with contextlib.ExitStack() as inner:
                members = [
                    inner.enter_context(archive.open(zipfile.ZipInfo(f"arr_{i}.npy"), "w", force_zip64=True))
                    for archive in archives
                ]
                yield from _write_leaf(members, leaf, dtype, slice_bytes)
        for archive in archives:
            archive.close()
        for file in files:
            file.sync()
    for path, written in zip(paths, temporary, strict=True):
        os.replace(written, path)


def _write_leaf(members: Sequence[IO[bytes]], leaf: ShardedLeaf, dtype: np.dtype, slice_bytes: int) -> Iterator[int]:
    is_in_memory = isinstance(leaf.values, InMemory)
    dims = list(leaf.shape)
    if isinstance(leaf.split, int):
        dims[leaf.split] //= len(members)
    for member in members:
        descr = (leaf.values.dtype if is_in_memory else dtype).str
        header = {"descr": descr, "fortran_order": False, "shape": tuple(dims)}
        np.lib.format.write_array_header_1_0(member, header)
    for first, values in _read_blocks(leaf, dtype, slice_bytes):
        for member, part in _split(leaf, first, values, members):
            member.write(to_c_order(part).reshape(-1).view(np.uint8).data)
        yield 0 if is_in_memory else values.nbytes


def _split(
    leaf: ShardedLeaf, first: int, values: np.ndarray, members: Sequence[IO[bytes]]
) -> Iterator[tuple[IO[bytes], np.ndarray]]:
    """Yield (member, values) for each shard that gets some of these rows, in the order of the member's bytes."""
    match leaf.split:
        case 0:
            rows = leaf.shape[0] // len(members)
            for s in range(first // rows, -(-(first + len(values)) // rows)):
                yield members[s], values[max(s * rows - first, 0) : (s + 1) * rows - first]
        case int(dim):
            yield from zip(members, np.split(values, len(members), dim), strict=True)
        case "replicated":
            yield from ((member, values) for member in members)
        case _:
            filled = np.full_like(values, leaf.fill)
            yield from zip(members, [values, *[filled] * (len(members) - 1)], strict=True)


def _read_blocks(leaf: ShardedLeaf, dtype: np.dtype, slice_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the first row, rows) of a leaf, block by block. Raise CheckpointError if a value overflows float16."""
    if isinstance(leaf.values, InMemory):
        yield 0, leaf.values.values
        return
    if not leaf.shape:  # a scalar norm
        yield 0, cast_values(leaf.values.arrays[0].read(()), dtype, leaf.name)
        return
    if leaf.values.chunking.dim:
        raise ValueError(f"{leaf.name}: the layout {leaf.values.pattern} does not start with the first native axis")
    for first, last in leaf.values.slice_bounds(slice_bytes):
        yield first, cast_values(leaf.values.read_slice(0, first, last), dtype, leaf.name)
