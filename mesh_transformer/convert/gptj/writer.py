# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of ours as a checkpoint of mesh-transformer-jax, for any number of shards; gptj.py says how one lies on disk."""

import contextlib
import functools
import itertools
import json
import math
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoint.bounded_pool import run_side_by_side
from mesh_transformer.checkpoint.local_backend import write_synced
from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.gptj.reader import (
    FIXED,
    KINDS,
    NORMS,
    PIECES,
    POSITIONS,
    Slot,
    check_problems,
    find_uneven,
    list_slots,
)
from mesh_transformer.convert.import_plan import Leaf, describe_leaves
from mesh_transformer.convert.lazy_arrays import Composed, Held, Lazy, Row, pack, to_dtype
from mesh_transformer.convert.slicing import PART_BYTES
from mesh_transformer.storage.direct_io import DirectFile


def old_config(config: ModelConfig, shards: int) -> dict[str, Any]:
    """The program's JSON for a model of ours; what its training and its bucket need is for a person to add.

    CheckpointError lists the fields that v1 cannot express.
    """
    problems = [f"{key} = {getattr(config, key)!r}, not {v!r}" for key, v in FIXED.items() if getattr(config, key) != v]
    derived = dict(head_dim=config.d_model // config.n_heads, kv_heads=config.n_heads, ff_dim=4 * config.d_model)
    problems += [f"{key} = {getattr(config, key)}, not {v}" for key, v in derived.items() if getattr(config, key) != v]
    pe = {ours: theirs for theirs, ours in POSITIONS.items()}.get(config.positions)
    if pe is None:
        problems.append(f"positions = {config.positions!r}, not one of {list(POSITIONS.values())}")
    if pe == "rotary" and config.rope_theta != 10_000:
        problems.append(f"rope_theta = {config.rope_theta}, not 10000")
    if config.rope_scaling is not None:
        problems.append(f"rope_scaling = {config.rope_scaling}")
    norms = {ours: theirs for theirs, ours in NORMS.items()}
    if (config.norm, config.norm_bias) not in norms:
        problems.append(f"norm = {config.norm!r}, not one of {sorted({norm for norm, _ in norms})}")
    if "local" in config.attention_pattern:
        problems.append("attention_pattern has local layers")
    if config.experts is not None:
        problems.append("it has experts")
    if config.n_encoder_layers is not None or not config.causal:
        problems.append("it has an encoder")
    if config.logit_scale != "none":
        problems.append(f"logit_scale = {config.logit_scale!r}, not 'none'")
    check_problems("the v1 format of mesh-transformer-jax cannot express this model", problems)
    check_problems("the model cannot be cut", find_uneven(config, shards))
    norm = norms[config.norm, config.norm_bias]
    old = dict(layers=config.n_layers, d_model=config.d_model, n_heads=config.n_heads, n_vocab=config.n_vocab)
    old |= dict(norm=norm, pe=pe) | (dict(pe_rotary_dims=config.rope_dim) if pe == "rotary" else {})
    return old | dict(seq=config.seq_len, cores_per_replica=shards, per_replica_batch=1)


def write_gptj(
    folder: Path,
    config: ModelConfig,
    arrays: Mapping[str, Lazy],
    step: int,
    *,
    shards: int,
    dtype: str = "bfloat16",
    part_bytes: int = PART_BYTES,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Weights as a slim checkpoint folder/step_<step>, with the config.json and meta.json that their programs read.

    What is added up, or used of shard 0 alone, goes to shard 0; the others get zeros, and ones as norms' scales, so that
    merging gives back the same bits. About `part_bytes` of an array are in memory at once, a few times. A piece has its
    name once it is complete: those that are there stay, so that the same call goes on where it was killed.
    `report(bytes written, bytes in all)`. CheckpointError if the model, the number of shards or the type cannot be.
    """
    old = old_config(config, shards)
    if dtype not in KINDS:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(KINDS)}")
    kind = to_dtype(dtype)
    found = _find_rows(config, arrays)
    leaves = [_find_leaf(slot, found, config.d_model) for slot in list_slots(config)]
    leaves.append(Placed("step", Held(np.array(step, np.int32)), "same"))
    total, done = sum(leaf.count(kind) for leaf in leaves), 0
    folders = [folder / f"step_{step}" / f"shard_{s}" for s in range(shards)]
    for shard in folders:
        shard.mkdir(parents=True, exist_ok=True)
    size, more = divmod(len(leaves), PIECES)
    rest, counting = iter(leaves), threading.Lock()

    def write(paths: Sequence[Path], leaves: Sequence[Placed]) -> None:
        nonlocal done
        there = [leaf.count(kind) for leaf in leaves]
        for nbytes in there if all(path.exists() for path in paths) else _write_piece(paths, leaves, kind, part_bytes):
            with counting:
                done += nbytes
                report(done, total)

    sizes = [size + (piece < more) for piece in range(PIECES)]
    pieces = [([shard / f"{i}.npz" for shard in folders], list(itertools.islice(rest, n))) for i, n in enumerate(sizes)]
    pieces.sort(key=lambda piece: -sum(leaf.count(kind) for leaf in piece[1]))  # the last to end should be small
    for _ in run_side_by_side(functools.partial(write, *piece) for piece in pieces):
        pass
    meta = {"step": step, "checkpoints": [step], "aux": {str(step): {}}}
    for name, table in (("config.json", old), ("meta.json", meta)):
        write_synced(folder / name, json.dumps(table, indent=1).encode())


def _find_rows(config: ModelConfig, arrays: Mapping[str, Lazy]) -> dict[tuple[str, int | None], tuple[Lazy, Leaf]]:
    """Our arrays by leaf; CheckpointError if one is missing or of another shape."""
    described = describe_leaves(config)
    check_problems("nothing was written", [f"{name} is missing" for name in described if name not in arrays])
    found = {}
    for name, leaves in described.items():
        for place, leaf in enumerate(leaves):
            array = arrays[name] if leaf.layer is None else Row(arrays[name], place)
            found[leaf.name, leaf.layer] = array, leaf
            wrong = f"{name} has shape {array.shape}, not {leaf.shape}"
            check_problems("nothing was written", [] if array.shape == leaf.shape else [wrong])
    return found


class Placed(NamedTuple):
    """An array of theirs, of all shards together, and how it is spread over them."""

    name: str
    values: Composed | Held
    spread: int | str  # the dim that is cut; "same" in each; else all of it in shard 0, with `fill` in the others
    fill: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all shards together."""
        return self.values.shape

    def count(self, kind: np.dtype) -> int:
        """Bytes that are read for it; none of what is in memory."""
        return 0 if isinstance(self.values, Held) else math.prod(self.shape) * kind.itemsize


def _find_leaf(slot: Slot, found: Mapping[Any, tuple[Lazy, Leaf]], d_model: int) -> Placed:
    """What the shards hold there; what we have not are zeros, or the ones of a norm that does nothing."""
    entry, fill = slot.entry, 1 if slot.entry.theirs.endswith("/scale") else 0
    if (entry.ours, slot.layer) not in found:
        nothing = Composed([Held(np.full(d_model, fill, np.float32))], "embed", [("embed",)])
        return Placed(slot.name, nothing, "same")
    array, leaf = found[entry.ours, slot.layer]
    spread = "same" if entry.merge == "mean" else entry.merge
    return Placed(slot.name, Composed([array], entry.pattern, [leaf.axes]), spread, fill)


def _write_piece(paths: Sequence[Path], leaves: Sequence[Placed], kind: np.dtype, part_bytes: int) -> Iterator[int]:
    """Write the same .npz of every shard, durably, then give them their names; yields numbers of bytes read for it.

    All at once, for a matrix that is cut by columns would else be read as often as there are shards.
    """
    temporary = [path.with_suffix(".tmp") for path in paths]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(DirectFile(path)) for path in temporary]
        archives = [stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)) for file in files]
        for i, leaf in enumerate(leaves):
            with contextlib.ExitStack() as inside:
                info = f"arr_{i}.npy"
                members = [
                    inside.enter_context(archive.open(zipfile.ZipInfo(info), "w", force_zip64=True))
                    for archive in archives
                ]
                yield from _write_leaf(members, leaf, kind, part_bytes)
        for archive in archives:
            archive.close()
        for file in files:
            file.sync()
    for path, written in zip(paths, temporary, strict=True):
        os.replace(written, path)


def _write_leaf(members: Sequence[IO[bytes]], leaf: Placed, kind: np.dtype, part_bytes: int) -> Iterator[int]:
    kind = leaf.values.dtype if isinstance(leaf.values, Held) else kind
    shape = list(leaf.shape)
    if isinstance(leaf.spread, int):
        shape[leaf.spread] //= len(members)
    for member in members:
        header = {"descr": kind.str, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(member, header)
    for first, values in _read_blocks(leaf, kind, part_bytes):
        for member, part in _spread(leaf, first, values, members):
            member.write(pack(part).reshape(-1).view(np.uint8).data)
        yield 0 if isinstance(leaf.values, Held) else values.nbytes


def _spread(
    leaf: Placed, first: int, values: np.ndarray, members: Sequence[IO[bytes]]
) -> Iterator[tuple[IO[bytes], np.ndarray]]:
    """Which of some rows each shard gets, in the order of its bytes."""
    match leaf.spread:
        case 0:
            size = leaf.shape[0] // len(members)
            for s in range(first // size, -(-(first + len(values)) // size)):
                yield members[s], values[max(s * size - first, 0) : (s + 1) * size - first]
        case int(axis):
            yield from zip(members, np.split(values, len(members), axis), strict=True)
        case "same":
            yield from ((member, values) for member in members)
        case _:
            rest = np.full_like(values, leaf.fill)
            yield from zip(members, [values, *[rest] * (len(members) - 1)], strict=True)


def _read_blocks(leaf: Placed, kind: np.dtype, part_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of a leaf with the place of the first, some at a time; CheckpointError if float16 is too small for one."""
    if isinstance(leaf.values, Held):
        yield 0, leaf.values.values
        return
    if not leaf.shape:  # a norm with one length
        yield 0, leaf.values.parts[0].read(()).astype(kind)
        return
    dim, _ = leaf.values.cut
    if dim:
        raise ValueError(f"{leaf.name}: {leaf.values.pattern} does not begin as our own arrays do")
    for first, last in leaf.values.list_parts(part_bytes):
        values = leaf.values.read_part(0, first, last)
        if values.dtype == kind:
            yield first, values
            continue
        with np.errstate(over="ignore"):
            narrow = values.astype(kind)
        if np.isfinite(values).sum() != np.isfinite(narrow).sum():
            raise CheckpointError(f"{leaf.name}: a value is too large for {kind}; write float32 or bfloat16")
        yield first, narrow
