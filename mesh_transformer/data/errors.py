# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a document is, what can be wrong with one, and the count of those left out."""

from collections import Counter
from typing import NamedTuple

_EXAMPLES = 3


class DataError(ValueError):
    """Documents or tokens that cannot be used; the message names the file and the line, and the remedy."""


class Document(NamedTuple):
    """One text and the stable name of its place below its source: "path", or "path:line" (lines and rows from 1)."""

    text: str
    name: str


class SkippedDocuments:
    """Counts what was left out, by kind of damage, with the first few messages of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    @property
    def total(self) -> int:
        """Places left out, of all kinds; a file that cannot be read further counts once."""
        return self.counts.total()

    def add(self, kind: str, message: str) -> None:
        """Count one place of damage; `message` begins with the file and line."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(message)

    def merge(self, other: "SkippedDocuments") -> None:
        """Add what another process counted."""
        self.counts.update(other.counts)
        for kind, messages in other.examples.items():
            examples = self.examples.setdefault(kind, [])
            examples.extend(messages[: _EXAMPLES - len(examples)])

    def summary_lines(self) -> list[str]:
        """One line for each kind, most frequent first: count, kind, first example; empty if nothing was left out."""
        counts = self.counts.most_common()
        return [f"left out {count:,} ({kind}), first {self.examples[kind][0]}" for kind, count in counts]


class DocumentError(Exception):
    """Damage at a line (None: the whole file); formats yield one for a line and raise one for the rest of a file."""

    def __init__(self, kind: str, detail: str, line: int | None = None) -> None:
        super().__init__(kind, detail, line)
        self.kind, self.detail, self.line = kind, detail, line
