# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of ours as a checkpoint of mesh-transformer-jax, for any number of shards; gptj.py says how one lies on disk."""

import functools
import itertools
import json
import math
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.folders import write_synced
from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.checkpoint.side_by_side import run_side_by_side
from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.foreign import Leaf, describe_leaves
from mesh_transformer.convert.gptj import (
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
from mesh_transformer.convert.lazy import Composed, Held, Lazy, Part, Row, parse_pattern, to_dtype
from mesh_transformer.convert.slices import CUT_BYTES


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
    if pe == "rotary" and config.rotary_base != 10_000:
        problems.append(f"rotary_base = {config.rotary_base}, not 10000")
    if config.rotary_scaling is not None:
        problems.append(f"rotary_scaling = {config.rotary_scaling}")
    norms = {ours: theirs for theirs, ours in NORMS.items()}
    if (config.norm, config.norm_bias) not in norms:
        problems.append(f"norm = {config.norm!r}, not one of {sorted({norm for norm, _ in norms})}")
    if "local" in config.attention_pattern:
        problems.append("attention_pattern has local layers")
    check_problems("the v1 format of mesh-transformer-jax cannot express this model", problems)
    check_problems("the model cannot be cut", find_uneven(config, shards))
    norm = norms[config.norm, config.norm_bias]
    old = dict(layers=config.n_layers, d_model=config.d_model, n_heads=config.n_heads, n_vocab=config.n_vocab)
    old |= dict(norm=norm, pe=pe) | (dict(pe_rotary_dims=config.rotary_channels) if pe == "rotary" else {})
    return old | dict(seq=config.seq_len, cores_per_replica=shards, per_replica_batch=1)


def write_gptj(
    folder: Path,
    config: ModelConfig,
    arrays: Mapping[str, Lazy],
    step: int,
    *,
    shards: int,
    dtype: str = "bfloat16",
    report: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Weights as a slim checkpoint folder/step_<step>, with the config.json and meta.json that their programs read.

    What is added up, or used of shard 0 alone, goes to shard 0; the others get zeros, and ones as norms' scales, so that
    merging gives back the same bits. A piece has its name once it is complete: those that are there stay, so that the
    same call goes on where it was killed. `report(bytes written, bytes in all)`. CheckpointError if the model, the number
    of shards or the type cannot be.
    """
    old = old_config(config, shards)
    if dtype not in KINDS:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(KINDS)}")
    slots, kind = list_slots(config), to_dtype(dtype)
    found = _find_rows(config, arrays)
    plan = [[(slot.name, _cut(slot, found, s, shards, config.d_model)) for slot in slots] for s in range(shards)]
    total, done = sum(math.prod(leaf.shape) * kind.itemsize for leaves in plan for _, leaf in leaves), 0
    pieces: list[tuple[Path, Sequence[tuple[str, Composed | Held]]]] = []
    for s, leaves in enumerate(plan):
        shard = folder / f"step_{step}" / f"shard_{s}"
        shard.mkdir(parents=True, exist_ok=True)
        size, more = divmod(len(leaves) + 1, PIECES)
        rest = iter([*leaves, ("step", Held(np.array(step, np.int32)))])
        for piece in range(PIECES):
            own, path = list(itertools.islice(rest, size + (piece < more))), shard / f"{piece}.npz"
            pieces.append((path, own))
    counting = threading.Lock()

    def write(path: Path, leaves: Sequence[tuple[str, Composed | Held]]) -> None:
        nonlocal done
        there = sum(math.prod(leaf.shape) * kind.itemsize for _, leaf in leaves if not isinstance(leaf, Held))
        for nbytes in [there] if path.exists() else _write_piece(path, leaves, kind):
            with counting:
                done += nbytes
                report(done, total)

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


def _cut(slot: Slot, found: Mapping[Any, tuple[Lazy, Leaf]], s: int, shards: int, d_model: int) -> Composed:
    """What shard `s` holds there."""
    entry = slot.entry
    if (entry.ours, slot.layer) not in found or (s > 0 and entry.merge in ("sum", "first")):
        fill = 1 if entry.theirs.endswith("/scale") else 0
        return Composed([Held(np.full(d_model, fill, np.float32))], "embed", [("embed",)])
    array, leaf = found[entry.ours, slot.layer]
    if isinstance(entry.merge, int):
        axis = leaf.axes.index(parse_pattern(entry.pattern)[entry.merge][0])
        size = leaf.shape[axis] // shards
        array = Part(array, axis, s * size, (s + 1) * size)
    return Composed([array], entry.pattern, [leaf.axes])


def _write_piece(path: Path, leaves: Sequence[tuple[str, Composed | Held]], kind: np.dtype) -> Iterator[int]:
    """Write one .npz, durably, then give it its name; yields the number of bytes as they are written."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for i, (name, leaf) in enumerate(leaves):
                with archive.open(zipfile.ZipInfo(f"arr_{i}.npy"), "w", force_zip64=True) as member:
                    blocks = [leaf.values] if isinstance(leaf, Held) else _read_blocks(name, leaf, kind)
                    descr = leaf.dtype.str if isinstance(leaf, Held) else kind.str
                    header = {"descr": descr, "fortran_order": False, "shape": leaf.shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for rows in blocks:
                        member.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
                        yield 0 if isinstance(leaf, Held) else rows.nbytes
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_blocks(name: str, leaf: Composed, kind: np.dtype) -> Iterator[np.ndarray]:
    """The rows of a leaf, some at a time; CheckpointError if float16 is too small for one."""
    if not leaf.shape:  # a norm with one length
        yield leaf.parts[0].read(()).astype(kind)
        return
    row = math.prod(leaf.shape[1:]) * 4
    step = max(CUT_BYTES // row // leaf.unit, 1) * leaf.unit
    for first in range(0, leaf.shape[0], step):
        values = leaf.read_rows(first, min(first + step, leaf.shape[0]))
        if values.dtype == kind:
            yield values
            continue
        with np.errstate(over="ignore"):
            narrow = values.astype(kind)
        if np.isfinite(values).sum() != np.isfinite(narrow).sum():
            raise CheckpointError(f"{name}: a value is too large for {kind}; write float32 or bfloat16")
        yield narrow
