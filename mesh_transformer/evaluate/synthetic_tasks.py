# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Synthetic tasks made from held-out documents, which need no data set: choose an ending, predict a word, complete a line.

The examples do not depend on the order of the documents. The white space between words is retained, so that examples from
source code are source code. No example spans two documents.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from mesh_transformer.data.errors import DataError, Document

DEFAULT_EXAMPLES = 200  # per task, if evaluate.limit is not set
CONTEXT = 40  # words per question
END = 8  # words per ending
SPACING = 5 * (CONTEXT + END)  # words from the start of a span to the start of the next span of a document
N_CHOICES = 4
_WORD = re.compile(r"\s*\S+")


def make_choices(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """Return examples with four endings: the original ending, and the endings of three other spans.

    Raises DataError if there is too little text.
    """
    spans = _select_spans(documents, limit + N_CHOICES)
    if len(spans) < N_CHOICES:
        raise DataError(
            f"the held-out text has {len(spans)} spans of {CONTEXT + END} words, and local_choice needs at least {N_CHOICES}; add "
            "text: --data NAME=PATH"
        )
    examples = []
    for number, (key, words) in enumerate(spans[:limit]):
        others = ["".join(spans[(number + i) % len(spans)][1][CONTEXT:]) for i in range(1, N_CHOICES)]
        gold = xxhash.xxh3_64_intdigest(key.encode()) % N_CHOICES
        choices = [*others[:gold], "".join(words[CONTEXT:]), *others[gold:]]
        examples.append({"query": "".join(words[:CONTEXT]), "choices": choices, "gold": gold})
    return examples


def make_clozes(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """Return examples that ask for the next word, which has at least three letters and occurs earlier in the span.

    Most words to predict in LAMBADA also occur in their context.

    Raises DataError if no span has such a word.
    """
    examples = []
    for _, words in _select_spans(documents):
        for position in range(CONTEXT, CONTEXT + END):
            space, word = words[position][:1], words[position][1:]
            if space == " " and len(word) >= 3 and word.isalpha() and any(word == w.strip() for w in words[:position]):
                examples.append({"query": "".join(words[:position]), "target": words[position]})
                break
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(
            "no span of the held-out text repeats a word of at least 3 letters, which local_cloze needs; add text: "
            "--data NAME=PATH"
        )
    return examples


def make_lines(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """Return examples that ask for the second half of a line. Raises DataError if no span has a line of four words."""
    examples = []
    for _, words in _select_spans(documents):
        *before, line = "".join(words[:CONTEXT]).rpartition("\n")
        parts = _WORD.findall(line + "".join(words[CONTEXT:]).partition("\n")[0])
        if len(parts) >= 4 and before[0] and "\n" in "".join(words[CONTEXT:]):
            half = len(parts) // 2
            query = "".join(before) + "".join(parts[:half])
            examples.append({"query": query, "target": "".join(parts[half:])})
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(
            "no span of the held-out text has a complete line of at least 4 words, which local_line needs; add text with line "
            "breaks: --data NAME=PATH"
        )
    return examples


def _select_spans(documents: Iterable[Document], count: int | None = None) -> list[tuple[str, list[str]]]:
    """Return `count` spans of words (default: all) with their locations, in the order of a hash of the location."""
    hashed = sorted((xxhash.xxh3_64_intdigest(key.encode()), key, words) for key, words in _find_spans(documents))
    return [(key, words) for _, key, words in hashed[:count]]


def _find_spans(documents: Iterable[Document]) -> Iterator[tuple[str, list[str]]]:
    """Yield the location and the words of spans of CONTEXT + END words."""
    for document in documents:
        words = _WORD.findall(document.text)
        for first in range(0, len(words) - CONTEXT - END + 1, SPACING):
            span = words[first : first + CONTEXT + END]
            yield f"{document.name}:{first}", [span[0].lstrip(), *span[1:]]
