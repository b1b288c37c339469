# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Documents, errors in documents, and counts of skipped documents."""

from collections import Counter
from typing import NamedTuple

_MAX_EXAMPLES = 3  # messages of each kind of error


class DataError(ValueError):
    """Unusable documents or tokens. The message has the file, the line and a fix."""


class Document(NamedTuple):
    """A text and its stable name within its dataset: "path", or "path:line" (lines and rows are counted from 1)."""

    text: str
    name: str


class SkippedDocuments:
    """Counts of skipped documents by kind of error, with the first few messages of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    @property
    def total(self) -> int:
        """Number of errors of all kinds; damage that ends the reading of a file counts once."""
        return self.counts.total()

    def add(self, kind: str, message: str) -> None:
        """Count one error; `message` begins with the file and line."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(message)

    def merge(self, other: "SkippedDocuments") -> None:
        """Add the counts of another process."""
        self.counts.update(other.counts)
        for kind, messages in other.examples.items():
            examples = self.examples.setdefault(kind, [])
            examples.extend(messages[: _MAX_EXAMPLES - len(examples)])

    def summary_lines(self) -> list[str]:
        """Return one line per kind, most frequent first: count, kind, first example. Empty if nothing was skipped."""
        counts = self.counts.most_common()
        return [f"skipped {count:,} documents ({kind}); first: {self.examples[kind][0]}" for kind, count in counts]


class DocumentError(Exception):
    """An error in one line of a file, or in the whole file (`line` is None).

    Readers yield an error of a single line, and raise an error that prevents reading the rest of the file.
    """

    def __init__(self, kind: str, detail: str, line: int | None = None) -> None:
        super().__init__(kind, detail, line)
        self.kind = kind
        self.detail = detail
        self.line = line
