# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""HBM traffic of a compiled program, and the arrays that its loops stack.

XLA's cost analysis counts the body of a loop once. Here the operands and results of every instruction outside of fusions
count once per run. If an array is only sliced, its slices count instead; if it is updated in place, the updates count.
Arrays in on-chip memory do not count. The result is an upper bound, because caches are not modeled.
"""

from typing import NamedTuple

from mesh_transformer.plan.hlo.parser import HloArray, HloModule, Instruction

# Instructions without HBM traffic, or whose computations are counted separately.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "optimization-barrier", "async-start", "async-update",
    "async-done", "copy-done", "domain", "send-done", "recv", "recv-done",
}  # fmt: skip


def hbm_bytes(module: HloModule) -> float:
    """Return the bytes that one device reads from and writes to HBM in one call of the program."""
    fused = {
        callee
        for instructions in module.computations.values()
        for i in instructions
        for role, callee in i.called()
        if i.opcode == "fusion" or role == "to_apply"
    }
    total = 0.0
    for name, instructions in module.computations.items():
        if name not in fused and (count := module.run_counts.get(name, 0)):
            total += count * sum(_moved(module, instruction) for instruction in instructions)
    return total


def _moved(module: HloModule, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0.0
    operands = module.operand_arrays(instruction)
    if opcode == "fusion":
        callee = next(name for _, name in instruction.called())
        reads = sum(min(_read_of(module, callee, number), _hbm_bytes(arrays)) for number, arrays in enumerate(operands))
        return reads + _written(module, callee, instruction)
    match opcode:
        case "dynamic-slice" | "slice" | "gather":
            return 2.0 * _hbm_bytes(instruction.arrays)
        case "dynamic-update-slice":
            return 2.0 * _hbm_bytes(operands[1])
        case "scatter":
            return 3.0 * _hbm_bytes(operands[-1])
        case "copy-start":
            return _hbm_bytes(operands[0]) + _hbm_bytes(instruction.arrays[:1])
        case "broadcast":
            return _hbm_bytes(instruction.arrays)
    return _hbm_bytes(instruction.arrays) + sum(map(_hbm_bytes, operands))


def _read_of(module: HloModule, computation: str, number: int) -> float:
    """Return the bytes that a fused computation reads from its parameter `number`."""
    instructions = module.computations.get(computation, [])
    name = next((i.name for i in instructions if i.opcode == "parameter" and i.inside.strip() == str(number)), None)
    if name is None:
        return float("inf")
    return _read_by_users(module, instructions, name)


def _read_by_users(module: HloModule, instructions: list[Instruction], name: str) -> float:
    total = 0.0
    for user in instructions:
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += _hbm_bytes(user.arrays)
        elif user.opcode == "bitcast":
            total += _read_by_users(module, instructions, user.name)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif user.opcode == "fusion":
            callee = next(called for _, called in user.called())
            total += sum(
                _read_of(module, callee, number) for number, operand in enumerate(user.operands) if operand == name
            )
        else:
            return float("inf")
    return total


def _written(module: HloModule, computation: str, fusion: Instruction) -> float:
    """Return the bytes that a fusion writes: its results, or only the updates of arrays updated in place."""
    by_name = {i.name: i for i in module.computations.get(computation, [])}
    root = next((i for i in by_name.values() if i.is_root), None)
    if root is None:
        return _hbm_bytes(fusion.arrays)
    ends = [by_name.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for end in ends:
        while end is not None and end.opcode == "bitcast" and end.operands:
            end = by_name.get(end.operands[0])
        if end is None:
            continue
        if end.opcode == "dynamic-update-slice" and len(end.operands) > 1 and end.operands[1] in by_name:
            total += _hbm_bytes(by_name[end.operands[1]].arrays)
        elif end.opcode == "fusion":
            total += _written(module, next(called for _, called in end.called()), end)
        elif end.opcode != "parameter":
            total += _hbm_bytes(end.arrays)
    return total


def _hbm_bytes(arrays: list[HloArray]) -> float:
    """Return the bytes of the arrays that are in HBM."""
    return float(sum(array.nbytes for array in arrays if not array.on_chip))


class StackedBytes(NamedTuple):
    """Bytes of arrays that loops fill, one slice per iteration."""

    activations: int  # filled by the forward pass and read by the backward pass
    gradients: int  # filled by the backward pass


def stacked_bytes(module: HloModule) -> StackedBytes:
    """Return the bytes of the arrays that loops over layers stack, by the pass that fills them."""
    activations = gradients = 0
    for instructions in module.computations.values():
        for loop in instructions:
            if loop.opcode != "while" or (count := module.trip_count(loop)) < 2:
                continue
            body = next(name for role, name in loop.called() if role == "body")
            root = next((i for i in module.computations[body] if i.is_root), None)
            if root is None or root.opcode != "tuple":
                continue
            filled = sum(
                array.nbytes
                for array, name in zip(loop.arrays, root.operands, strict=False)
                if array.shape[:1] == (count,) and len(array.shape) > 1 and _is_new(module, name)
            )
            if "transpose(" in loop.attributes:
                gradients = max(gradients, filled)
            else:
                activations = max(activations, filled)
    return StackedBytes(activations, gradients)


def _is_new(module: HloModule, name: str) -> bool:
    """Return whether a result of a loop is computed in its body rather than passed through."""
    producer = module.by_name.get(name)
    while producer is not None and producer.opcode in ("copy", "bitcast") and producer.operands:
        producer = module.by_name.get(producer.operands[0])
    if producer is not None and producer.opcode == "get-tuple-element":  # of an argument of the body, or of a fusion
        producer = module.by_name.get(producer.operands[0])
        return producer is not None and producer.opcode != "parameter"
    return producer is not None
