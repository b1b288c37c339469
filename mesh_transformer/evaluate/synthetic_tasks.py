# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Held-out documents -> items that a model can be asked, with no data set at hand: which end follows, which word, which line.

The same documents give the same items, whatever their order. Words are what stands between white space, which is kept,
so that the items of source code are source code. No item crosses the border of a document.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from mesh_transformer.data.errors import DataError, Document

DEFAULT_EXAMPLES = 200  # of a task, where nobody limits them
CONTEXT, END = 40, 8  # words that are shown, and words of an end to choose
EVERY = 5 * (CONTEXT + END)  # words from one item of a document to the next
N_CHOICES = 4
_WORD = re.compile(r"\s*\S+")


def make_choices(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """Which of four ends follows? One is the text's own, the others follow somewhere else in the documents."""
    spans = _pick(documents, limit + N_CHOICES)
    if len(spans) < N_CHOICES:
        raise DataError(f"only {len(spans)} stretches of {CONTEXT + END} words in the held-out text; name more of it")
    items = []
    for number, (key, words) in enumerate(spans[:limit]):
        others = ["".join(spans[(number + i) % len(spans)][1][CONTEXT:]) for i in range(1, N_CHOICES)]
        gold = xxhash.xxh3_64_intdigest(key.encode()) % N_CHOICES
        choices = [*others[:gold], "".join(words[CONTEXT:]), *others[gold:]]
        items.append({"query": "".join(words[:CONTEXT]), "choices": choices, "gold": gold})
    return items


def make_clozes(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """Which word comes? One of at least three letters that the text shown has had before, as in LAMBADA most have."""
    items = []
    for _, words in _pick(documents):
        for place in range(CONTEXT, CONTEXT + END):
            space, word = words[place][:1], words[place][1:]
            if space == " " and len(word) >= 3 and word.isalpha() and any(word == w.strip() for w in words[:place]):
                items.append({"query": "".join(words[:place]), "target": words[place]})
                break
        if len(items) == limit:
            break
    if not items:
        raise DataError("no word of the held-out text's stretches comes again; name more text")
    return items


def make_lines(documents: Iterable[Document], limit: int) -> list[dict[str, Any]]:
    """What is the rest of this line? Its second half, up to the line's end."""
    items = []
    for _, words in _pick(documents):
        *before, line = "".join(words[:CONTEXT]).rpartition("\n")
        parts = _WORD.findall(line + "".join(words[CONTEXT:]).partition("\n")[0])
        if len(parts) >= 4 and before[0] and "\n" in "".join(words[CONTEXT:]):
            half = len(parts) // 2
            query = "".join(before) + "".join(parts[:half])
            items.append({"query": query, "target": "".join(parts[half:])})
        if len(items) == limit:
            break
    if not items:
        raise DataError("no line of the held-out text's stretches is whole; name text that has lines")
    return items


def _pick(documents: Iterable[Document], count: int | None = None) -> list[tuple[str, list[str]]]:
    """Stretches of words (`count` or all) in the order of a hash of their places, with these places."""
    found = sorted((xxhash.xxh3_64_intdigest(key.encode()), key, words) for key, words in _cut(documents))
    return [(key, words) for _, key, words in found[:count]]


def _cut(documents: Iterable[Document]) -> Iterator[tuple[str, list[str]]]:
    for document in documents:
        words = _WORD.findall(document.text)
        for first in range(0, len(words) - CONTEXT - END + 1, EVERY):
            stretch = words[first : first + CONTEXT + END]
            yield f"{document.name}:{first}", [stretch[0].lstrip(), *stretch[1:]]
