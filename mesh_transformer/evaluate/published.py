# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What others have published of the same tasks, from published.toml."""

import tomllib
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.toml")


@cache
def read_published() -> tuple[dict[str, Any], ...]:
    """All rows: model, source, and scores by "TASK.METRIC"."""
    return tuple(tomllib.loads(FILE.read_text(encoding="utf-8"))["rows"])


@cache
def pile_components() -> frozenset[str]:
    """Names of the Pile's components, as its files have them in meta.pile_set_name."""
    names = {name for row in read_published() for name in row["scores"] if name.startswith("text:")}
    return frozenset(name.removeprefix("text:").removesuffix(".bits_per_byte") for name in names)


def find_published(measured: Collection[str]) -> list[dict[str, Any]]:
    """The rows that have something of what was `measured` ("TASK.METRIC"), with that alone."""
    rows = []
    for row in read_published():
        scores = {name: value for name, value in row["scores"].items() if name in measured}
        if scores:
            rows.append({"model": row["model"], "source": row["source"], "scores": scores})
    return rows
