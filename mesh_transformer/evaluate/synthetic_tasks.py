# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Synthetic tasks made from held-out documents, for use without a data set: choose an ending, a word or a line.

The same documents give the same examples in any order. Words are separated by white space, which is retained, so that
examples of source code are source code. No example spans two documents.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from mesh_transformer.data.errors import DataError, Document

DEFAULT_EXAMPLES = 200  # of a task without evaluate.limit
CONTEXT = 40  # words of a question
END = 8  # words of an ending
SPACING = 5 * (CONTEXT + END)  # words between the starts of two examples of a document
N_CHOICES = 4
_WORD = re.compile(r"\s*\S+")


def make_choices(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """Return examples with four endings: one is the text's own, the others come from elsewhere in the documents."""
    spans = _pick(documents, limit + N_CHOICES)
    if len(spans) < N_CHOICES:
        raise DataError(
            f"the held-out text has {len(spans)} spans of {CONTEXT + END} words, {N_CHOICES} are needed; add text: --data NAME=PATH"
        )
    examples = []
    for number, (key, words) in enumerate(spans[:limit]):
        others = ["".join(spans[(number + i) % len(spans)][1][CONTEXT:]) for i in range(1, N_CHOICES)]
        gold = xxhash.xxh3_64_intdigest(key.encode()) % N_CHOICES
        choices = [*others[:gold], "".join(words[CONTEXT:]), *others[gold:]]
        examples.append({"query": "".join(words[:CONTEXT]), "choices": choices, "gold": gold})
    return examples


def make_clozes(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """Return examples that ask for the next word, of at least three letters and used earlier, as most in LAMBADA."""
    examples = []
    for _, words in _pick(documents):
        for position in range(CONTEXT, CONTEXT + END):
            space, word = words[position][:1], words[position][1:]
            if space == " " and len(word) >= 3 and word.isalpha() and any(word == w.strip() for w in words[:position]):
                examples.append({"query": "".join(words[:position]), "target": words[position]})
                break
        if len(examples) == limit:
            break
    if not examples:
        raise DataError("no word is used twice in a span of the held-out text; add text: --data NAME=PATH")
    return examples


def make_lines(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """Return examples that ask for the second half of a line."""
    examples = []
    for _, words in _pick(documents):
        *before, line = "".join(words[:CONTEXT]).rpartition("\n")
        parts = _WORD.findall(line + "".join(words[CONTEXT:]).partition("\n")[0])
        if len(parts) >= 4 and before[0] and "\n" in "".join(words[CONTEXT:]):
            half = len(parts) // 2
            query = "".join(before) + "".join(parts[:half])
            examples.append({"query": query, "target": "".join(parts[half:])})
        if len(examples) == limit:
            break
    if not examples:
        raise DataError("no span of the held-out text has a complete line; add text with line breaks: --data NAME=PATH")
    return examples


def _pick(documents: Iterable[Document], count: int | None = None) -> list[tuple[str, list[str]]]:
    """Return `count` spans of words (default: all) with their locations, sorted by a hash of the location."""
    found = sorted((xxhash.xxh3_64_intdigest(key.encode()), key, words) for key, words in _cut(documents))
    return [(key, words) for _, key, words in found[:count]]


def _cut(documents: Iterable[Document]) -> Iterator[tuple[str, list[str]]]:
    for document in documents:
        words = _WORD.findall(document.text)
        for first in range(0, len(words) - CONTEXT - END + 1, SPACING):
            span = words[first : first + CONTEXT + END]
            yield f"{document.name}:{first}", [span[0].lstrip(), *span[1:]]
