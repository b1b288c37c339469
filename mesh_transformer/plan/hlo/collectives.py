# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Bytes that each device sends over each mesh axis in one step, from the text of the compiled program.

In an operation on groups of g devices with operands of O bytes each, every device sends at least the following number of
bytes, which rings and tori achieve:

    all-gather          O (g - 1)        its operand to all other devices
    reduce-scatter      O (g - 1) / g    its contributions to the results of all other devices
    all-reduce          2 O (g - 1) / g  a reduce-scatter followed by an all-gather
    all-to-all          O (g - 1) / g
    collective-permute  O                the same for a broadcast, and for a send to another slice

Operations in loops are multiplied by the trip count. An asynchronous operation appears several times (as a start, as a
done, and on TPUs as the steps between them) and is counted once.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mesh_transformer.plan.hlo.parser import HloModule, Instruction

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
_KIND = re.compile(rf"(?:ragged-)?({'|'.join(KINDS)})(?:-start)?$")


class Collective(NamedTuple):
    """Collective operations of one kind over one set of mesh axes, in one step."""

    axes: tuple[str, ...]  # mesh axes along which members of a group differ; empty for sends to other slices
    kind: str
    group: int  # members per group
    count: int  # operations per step
    sent: float  # bytes per step and device


def read_collectives(module: HloModule, sizes: Sequence[int], axes: Sequence[str]) -> list[Collective]:
    """Return all collectives of a program over a mesh with the given axis `sizes` and names, by decreasing traffic.

    The program numbers its devices in row-major order of the mesh.
    """
    found: dict[tuple[tuple[str, ...], str, int], tuple[int, float]] = {}
    visited: set[str] = set()
    for computation, instructions in module.computations.items():
        times = module.run_counts.get(computation, 0)
        for instruction in instructions if times else ():
            kind = _kind(instruction, computation)
            if kind is None or _repeated(instruction, visited):
                continue
            over, group = (), 2  # sends between slices name no devices
            if kind != "send":
                over, group = _axes_of(_members(instruction, math.prod(sizes)), sizes, axes, kind)
            if group < 2:
                continue
            operand_bytes = sum(array.nbytes for arrays in module.operand_arrays(instruction) for array in arrays)
            count, sent = found.get((over, kind, group), (0, 0.0))
            found[over, kind, group] = (count + times, sent + times * sent_bytes(kind, operand_bytes, group))
    rows = [Collective(over, kind, group, *rest) for (over, kind, group), rest in found.items()]
    return sorted(rows, key=lambda row: -row.sent)


def sent_bytes(kind: str, operand_bytes: float, group: int) -> float:
    """Return the bytes that one device sends for one operation; see the table at the top of this module."""
    match kind:
        case "all-gather":
            return operand_bytes * (group - 1)
        case "all-reduce":
            return 2 * operand_bytes * (group - 1) / group
        case "reduce-scatter" | "all-to-all":
            return operand_bytes * (group - 1) / group
        case _:
            return operand_bytes


def _kind(instruction: Instruction, computation: str) -> str | None:
    if instruction.opcode == "send" and "megascale" in instruction.attributes:
        return "send"
    match = _KIND.match(instruction.opcode)
    if match is None:
        return None
    # On TPUs a reduce-scatter is an all-reduce fused with the slice of its result.
    return "reduce-scatter" if computation.startswith("all-reduce-scatter") else match[1]


def _repeated(instruction: Instruction, visited: set[str]) -> bool:
    """Return whether another stage of the same asynchronous operation was counted already."""
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    if chain is None:
        return False
    if chain[1] in visited:
        return True
    visited.add(chain[1])
    return False


def _members(instruction: Instruction, devices: int) -> np.ndarray:
    """Return device numbers [groups, members], or [pairs, 2] for a permutation. Raises ValueError for unknown notation."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return np.array([[int(n) for n in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]).reshape(-1, 2)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = (tuple(int(n) for n in part.split(",")) if part else None for part in iota.groups())
        return np.arange(devices).reshape(source).transpose(order).reshape(shape)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", text):
        return _mesh_members(named[1], named[2], named[3], devices)
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array(groups) if groups else np.arange(devices)[None]
    raise ValueError(
        f"{instruction.name}: unknown notation of replica groups: {text[:200]}; add the notation of this version of "
        f"XLA to _members() in {__name__}"
    )


def _mesh_members(mesh: str, order: str | None, axes: str, devices: int) -> np.ndarray:
    """Return the groups along `axes` of a named mesh, such as 'a'=2,'b'=4 with the axes 'b' or 'b':(2)2.

    'b':(2)2 is the sub-axis of size 2 of b, after a sub-axis of size 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers = np.arange(devices)
    if order:
        iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
        if iota is None:
            numbers = np.array([int(n) for n in order.split(",")])
        else:
            source, permutation = (tuple(int(n) for n in part.split(",")) if part else None for part in iota.groups())
            numbers = numbers.reshape(source).transpose(permutation)
    chosen = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    shape, along = [], []
    for name, size in sizes.items():
        before, part = chosen.get(name, (1, 1))
        part = part or size
        if name in chosen:
            along.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    split = np.moveaxis(numbers.reshape(shape), along, range(-len(along), 0))
    return split.reshape(-1, math.prod(split.shape[-len(along) :]))


def _axes_of(members: np.ndarray, sizes: Sequence[int], axes: Sequence[str], kind: str) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes along which the members of a group differ, and the number of members."""
    if not members.size:
        return (), 0
    coordinates = np.stack(np.unravel_index(members, sizes), axis=-1)  # [groups, members, axes]
    differ = np.any(coordinates != coordinates[:, :1], axis=(0, 1))
    over = tuple(axis for axis, differs in zip(axes, differ, strict=True) if differs)
    if kind == "collective-permute":
        return over, 2 if over else 0
    return over, members.shape[1]
