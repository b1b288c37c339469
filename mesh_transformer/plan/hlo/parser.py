# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Parser of HLO text: computations, their instructions, and the number of runs of each computation in one step."""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation|called_computations|branch_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
_CONSTANT = re.compile(r"^-?\d+$")


class HloArray(NamedTuple):
    """An array in the result of an instruction."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def nbytes(self) -> int:
        """Size in bytes, without tile padding."""
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return math.prod(self.shape) * bits // 8

    @property
    def on_chip(self) -> bool:
        """Return whether the array is in on-chip memory instead of HBM."""
        return re.search(r"S\([1-9]\d*\)", self.layout) is not None


class Instruction(NamedTuple):
    """An instruction: `%name = result opcode(operands), attributes`."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> list[HloArray]:
        """Return the arrays of the result, in order if it is a tuple."""
        return [
            HloArray(dtype, tuple(int(dim) for dim in dims.split(",") if dim), layout or "")
            for dtype, dims, layout in _ARRAY.findall(self.result)
        ]

    def called(self) -> Iterator[tuple[str, str]]:
        """Yield (role, computation) for every called computation; a role is, for example, body, condition or calls."""
        for match in _CALLED.finditer(self.attributes):
            role = match[0].split("=")[0]
            for name in _NAME.findall(match[1]):
                yield role, name


class HloModule:
    """The computations of a compiled program."""

    def __init__(self, text: str):
        """Parse the result of `compiled.as_text()`."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        for line in _join_lines(text):
            if line.startswith(("ENTRY ", "%")) and line.rstrip().endswith("{"):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                self.entry = name if line.startswith("ENTRY ") else self.entry
                current = self.computations.setdefault(name, [])
            elif line.rstrip() == "}":
                current = None
            elif current is not None and (instruction := parse_instruction(line)):
                current.append(instruction)
        self.by_name = {i.name: i for instructions in self.computations.values() for i in instructions}

    @cached_property
    def run_counts(self) -> dict[str, int]:
        """Number of runs of each computation per call of the program; each branch of a conditional counts once."""
        counts = {self.entry: 1}
        for name in self._callers_first():
            for instruction in self.computations[name]:
                for role, callee in instruction.called():
                    loops = role in ("body", "condition")
                    runs = counts.get(name, 0) * (self.trip_count(instruction) if loops else 1)
                    counts[callee] = counts.get(callee, 0) + runs
        return counts

    def _callers_first(self) -> list[str]:
        order: list[str] = []
        visited: set[str] = set()
        stack: list[tuple[str, bool]] = [(self.entry, False)]
        while stack:
            name, done = stack.pop()
            if done:
                order.append(name)
            elif name not in visited and name in self.computations:
                visited.add(name)
                stack.append((name, True))
                stack += [(callee, False) for i in self.computations[name] for _, callee in i.called()]
        return order[::-1]

    def trip_count(self, loop: Instruction) -> int:
        """Return the number of iterations of a `while`: XLA's known trip count, or the bound minus the initial count.

        Scans count up by one from a constant. A loop without a constant bound, such as the decoding loop, counts once.
        """
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known[1])
        condition = next((self.computations[c] for role, c in loop.called() if role == "condition"), [])
        bounds = [value for i in condition if (value := _constant(i)) is not None]
        if len(bounds) != 1:
            return 1
        return max(bounds[0] - self._first_count(loop, condition), 1)

    def _first_count(self, loop: Instruction, condition: list[Instruction]) -> int:
        """Return the initial value of the loop's counter, or 0 if it is not a constant in the same computation."""
        indices = [re.search(r"index=(\d+)", i.attributes) for i in condition if i.opcode == "get-tuple-element"]
        start = self.by_name.get(loop.operands[0]) if loop.operands else None
        if len(indices) != 1 or indices[0] is None or start is None or start.opcode != "tuple":
            return 0
        index = int(indices[0][1])
        first = self.by_name.get(start.operands[index]) if index < len(start.operands) else None
        while first is not None and first.opcode in ("copy", "bitcast") and first.operands:
            first = self.by_name.get(first.operands[0])
        value = None if first is None else _constant(first)
        return value or 0

    def operand_arrays(self, instruction: Instruction) -> list[list[HloArray]]:
        """Return the arrays of each operand."""
        return [self.by_name[name].arrays if name in self.by_name else [] for name in instruction.operands]


def _join_lines(text: str) -> Iterator[str]:
    """Yield the lines of the text, with the lines of an instruction joined."""
    joined = ""
    for line in text.splitlines():
        if line.startswith((" ", "%", "ENTRY ", "HloModule")) or line.rstrip() in ("}", ""):
            yield joined
            joined = line
        else:
            joined += line
    yield joined


def _constant(instruction: Instruction) -> int | None:
    if instruction.opcode != "constant" or not instruction.result.startswith(("s32", "u32", "s64")):
        return None
    return int(instruction.inside) if _CONSTANT.match(instruction.inside) else None


def parse_instruction(line: str) -> Instruction | None:
    """Parse a line of a computation; return None if it is not an instruction."""
    text = line.strip()
    is_root = text.startswith("ROOT ")
    name, equals, rest = text.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opening = rest.find("(", end)
    if end <= 0 or opening < 0:
        return None
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=name.lstrip("%"),
        result=rest[:end],
        opcode=rest[end:opening].strip(),
        operands=tuple(_NAME.findall(inside)),
        inside=inside,
        attributes=rest[closing + 1 :],
        is_root=is_root,
    )


def _closing(text: str, opening: int) -> int:
    """Return the index of the parenthesis that closes the parenthesis at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)
