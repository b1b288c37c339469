# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a compiled program moves and keeps: bytes read from and written to HBM in a step, and arrays stacked by loops.

XLA's own figures count the body of a loop once. Here every instruction outside of fusions counts as often as it runs:
what it reads and what it writes. Of an array that is only sliced, the slices count; of one that is updated in place,
the update. Arrays in the chip's own memory count for nothing. It is an upper bound in that caches are not modelled.
"""

from typing import NamedTuple

from mesh_transformer.plan.hlo.parser import HloArray, HloModule, Instruction

# Names for something that exists already, or is counted where it is called.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "optimization-barrier", "async-start", "async-update",
    "async-done", "copy-done", "domain", "send-done", "recv", "recv-done",
}  # fmt: skip


def hbm_bytes(module: HloModule) -> float:
    """Bytes that one device reads from and writes to its memory in one call of the program."""
    fused = {
        callee
        for instructions in module.computations.values()
        for i in instructions
        for role, callee in i.called()
        if i.opcode == "fusion" or role == "to_apply"
    }
    total = 0.0
    for name, instructions in module.computations.items():
        if name not in fused and (times := module.run_counts.get(name, 0)):
            total += times * sum(_moved(module, instruction) for instruction in instructions)
    return total


def _moved(module: HloModule, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0.0
    operands = module.operand_arrays(instruction)
    if opcode == "fusion":
        callee = next(name for _, name in instruction.called())
        reads = sum(min(_read_of(module, callee, place), _size(arrays)) for place, arrays in enumerate(operands))
        return reads + _written(module, callee, instruction)
    match opcode:
        case "dynamic-slice" | "slice" | "gather":
            return 2.0 * _size(instruction.arrays)
        case "dynamic-update-slice":
            return 2.0 * _size(operands[1])
        case "scatter":
            return 3.0 * _size(operands[-1])
        case "copy-start":
            return _size(operands[0]) + _size(instruction.arrays[:1])
        case "broadcast":
            return _size(instruction.arrays)
    return _size(instruction.arrays) + sum(map(_size, operands))


def _read_of(module: HloModule, computation: str, place: int) -> float:
    """Bytes that a fused computation reads of its parameter number `place`."""
    instructions = module.computations.get(computation, [])
    name = next((i.name for i in instructions if i.opcode == "parameter" and i.inside.strip() == str(place)), None)
    if name is None:
        return float("inf")
    return _read_by_users(module, instructions, name)


def _read_by_users(module: HloModule, instructions: list[Instruction], name: str) -> float:
    total = 0.0
    for user in instructions:
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += _size(user.arrays)
        elif user.opcode == "bitcast":
            total += _read_by_users(module, instructions, user.name)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif user.opcode == "fusion":
            callee = next(called for _, called in user.called())
            total += sum(
                _read_of(module, callee, place) for place, operand in enumerate(user.operands) if operand == name
            )
        else:
            return float("inf")
    return total


def _written(module: HloModule, computation: str, fusion: Instruction) -> float:
    """Bytes that a fusion writes: whole results, or the updates of those updated in place."""
    by_name = {i.name: i for i in module.computations.get(computation, [])}
    root = next((i for i in by_name.values() if i.is_root), None)
    if root is None:
        return _size(fusion.arrays)
    ends = [by_name.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for end in ends:
        while end is not None and end.opcode == "bitcast" and end.operands:
            end = by_name.get(end.operands[0])
        if end is None:
            continue
        if end.opcode == "dynamic-update-slice" and len(end.operands) > 1 and end.operands[1] in by_name:
            total += _size(by_name[end.operands[1]].arrays)
        elif end.opcode == "fusion":
            total += _written(module, next(called for _, called in end.called()), end)
        elif end.opcode != "parameter":
            total += _size(end.arrays)
    return total


def _size(arrays: list[HloArray]) -> float:
    return float(sum(array.size for array in arrays if not array.on_chip))


class StackedBytes(NamedTuple):
    """Bytes of arrays that loops fill, one piece in each iteration."""

    activations: int  # by the forward pass: what the backward pass will read
    gradients: int  # by the backward pass


def stacked_bytes(module: HloModule) -> StackedBytes:
    """What the loops over layers leave behind, from the arrays that each carries and fills."""
    kept = gradients = 0
    for instructions in module.computations.values():
        for loop in instructions:
            if loop.opcode != "while" or (count := module.trip_count(loop)) < 2:
                continue
            body = next(name for role, name in loop.called() if role == "body")
            root = next((i for i in module.computations[body] if i.is_root), None)
            if root is None or root.opcode != "tuple":
                continue
            filled = sum(
                array.size
                for array, name in zip(loop.arrays, root.operands, strict=False)
                if array.shape[:1] == (count,) and len(array.shape) > 1 and _is_new(module, name)
            )
            if "transpose(" in loop.attributes:
                gradients = max(gradients, filled)
            else:
                kept = max(kept, filled)
    return StackedBytes(kept, gradients)


def _is_new(module: HloModule, name: str) -> bool:
    """Whether a loop's result is made in its body, not handed on."""
    made = module.by_name.get(name)
    while made is not None and made.opcode in ("copy", "bitcast") and made.operands:
        made = module.by_name.get(made.operands[0])
    if made is not None and made.opcode == "get-tuple-element":  # of what goes into the body, or of a fusion's results
        made = module.by_name.get(made.operands[0])
        return made is not None and made.opcode != "parameter"
    return made is not None
