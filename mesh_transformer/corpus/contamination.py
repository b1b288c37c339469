# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Overlap of documents with evaluation sets, by n-grams of words, as GPT-3's appendix C has it.

Words are lower case without punctuation. An n-gram that recurs in many documents of the evaluation sets is a phrase of
the language and no sign of them. Unlike GPT-3, pieces of a document that was cut stay one document, an empty line
between them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import xxhash
from datatrove.data import Document

from mesh_transformer.corpus.recipe import Decontaminate, EvaluationConfig
from mesh_transformer.data.errors import DataError
from mesh_transformer.data.readers import find_files, find_root, read_file

_WORD = re.compile(r"\w+")


class ContaminationIndex:
    """The n-grams of evaluation sets, and what to do with a document that has one."""

    def __init__(self, step: Decontaminate, sets: dict[str, EvaluationConfig]):
        self.step = step
        self.owners: dict[int, str] = {}  # hash of an n-gram -> a set that has it
        for name, config in sets.items():
            counts: Counter[int] = Counter()
            for text in _read_texts(name, config):
                counts.update({gram for gram, _, _ in self._grams(text)})
            self.owners.update({gram: name for gram, count in counts.items() if count <= step.common})

    def _grams(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Hash, first character and the one behind the last of every n-gram; a text with fewer words is one itself."""
        words = [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text)]
        n = min(self.step.n_gram, len(words))
        if n < 8:  # so short a text is found everywhere: GPT-3's smallest n
            return
        for i in range(len(words) - n + 1):
            gram = " ".join(word for word, _, _ in words[i : i + n])
            yield xxhash.xxh3_64_intdigest(gram.encode()), words[i][1], words[i + n - 1][2]

    def clean(self, document: Document) -> str:
        """Cut what overlaps out of a document, or say why it goes as a whole."""
        hits = [
            (start, end, self.owners[gram]) for gram, start, end in self._grams(document.text) if gram in self.owners
        ]
        if not hits:
            return ""
        reason = f"overlaps {hits[0][2]}"
        if self.step.action == "drop":
            return reason
        cuts: list[list[int]] = []
        for start, end, _ in hits:
            start, end = max(start - self.step.margin, 0), end + self.step.margin
            if cuts and start <= cuts[-1][1]:
                cuts[-1][1] = max(end, cuts[-1][1])
            else:
                cuts.append([start, end])
        if len(cuts) > self.step.max_cuts:
            return f"{reason} in more than {self.step.max_cuts} places"
        bounds = [0, *(place for cut in cuts for place in cut), len(document.text)]
        pieces = [document.text[a:b].strip() for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        pieces = [piece for piece in pieces if len(piece) >= self.step.min_piece]
        document.text = "\n\n".join(pieces)
        document.metadata["cut"] = f"{reason} in {len(cuts)} place{'s' * (len(cuts) > 1)}"
        return "" if pieces else f"{reason}, nothing left"


def _read_texts(name: str, config: EvaluationConfig) -> Iterator[str]:
    """Every item of an evaluation set as one text: its fields joined, of a list those of its entries."""
    count = 0
    for file in find_files(config.path):
        if file.suffix in (".jsonl", ".json"):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    count += 1
                    yield _join_fields(file, number, line, config.text_keys)
        else:
            for document in read_file(file, find_root(config.path)):
                for paragraph in re.split(r"\n\s*\n", document.text):
                    count += 1
                    yield paragraph
    if not count:
        raise DataError(f"evaluation.{name}: {config.path} has no texts")


def _join_fields(file: Path, number: int, line: str, keys: tuple[str, ...]) -> str:
    try:
        record = json.loads(line)
        values = [record[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}:{number}: no JSON object with {', '.join(keys)}: {error!r}") from None
    return " ".join(part for value in values for part in (value if isinstance(value, list) else [str(value)]))
