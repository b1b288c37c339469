# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Kinds of layers, and the division of a model's layers into scans over a repeated pattern."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

Kind = TypeVar("Kind")


class LayerKind(NamedTuple):
    """Properties in which the layers of one model may differ."""

    local: bool  # attention is limited to attention_window
    has_experts: bool
    rotates: bool  # queries and keys are rotated; without effect unless `positions` is a rotary embedding


class LayerStack(NamedTuple):
    """Consecutive layers that repeat a pattern of layer kinds and run as one scan."""

    name: str  # of the Haiku module
    first: int  # index of the first layer
    pattern: tuple[LayerKind, ...]
    n_repeats: int


def shortest_pattern(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Return the shortest pattern whose repetition begins with `kinds`, one element per layer."""
    lengths = range(1, len(kinds) + 1)
    return next(tuple(kinds[:n]) for n in lengths if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def dividing_period(kinds: Sequence[Any]) -> int:
    """Return the length of the shortest pattern that repeats a whole number of times in `kinds`; 0 for empty `kinds`."""
    items = list(kinds)
    lengths = (n for n in range(1, len(items) + 1) if len(items) % n == 0)
    return next((n for n in lengths if items[:n] * (len(items) // n) == items), 0)


@functools.cache
def split_into_stacks(kinds: tuple[LayerKind, ...]) -> tuple[LayerStack, ...]:
    """Divide layers into one or two stacks so that the fewest layers are compiled: one period of each stack."""

    def n_compiled(n_first: int) -> int:
        return dividing_period(kinds[:n_first]) + dividing_period(kinds[n_first:])

    n_first = min(range(len(kinds)), key=n_compiled)
    parts = (("first_layers", 0, kinds[:n_first]), ("layers", n_first, kinds[n_first:]))
    return tuple(
        LayerStack(name, first, part[: dividing_period(part)], len(part) // dividing_period(part))
        for name, first, part in parts
        if part
    )
