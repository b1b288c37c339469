# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Published results of other models on the same tasks, from published.toml."""

import tomllib
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.toml")


@cache
def read_published() -> tuple[dict[str, Any], ...]:
    """Return all rows, each with the model, the source, and the scores by "TASK.METRIC"."""
    return tuple(tomllib.loads(FILE.read_text(encoding="utf-8"))["rows"])


@cache
def pile_components() -> frozenset[str]:
    """Return the names of the Pile's components, as in the field meta.pile_set_name of its files."""
    names = {name for row in read_published() for name in row["scores"] if name.startswith("text:")}
    return frozenset(name.removeprefix("text:").removesuffix(".bits_per_byte") for name in names)


def find_published(measured: Collection[str]) -> list[dict[str, Any]]:
    """Return the rows that have scores of the measured metrics ("TASK.METRIC"), with only these scores."""
    rows = []
    for row in read_published():
        scores = {name: value for name, value in row["scores"].items() if name in measured}
        if scores:
            rows.append({"model": row["model"], "source": row["source"], "scores": scores})
    return rows
