# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Decontamination: overlap of documents with evaluation sets by word n-grams, as in appendix C of GPT-3.

Words are lowercase without punctuation. An n-gram in many documents of the evaluation sets is ignored as a common
phrase. Unlike in GPT-3, the fragments of a cut document remain one document, separated by empty lines.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator

import xxhash
from datatrove.data import Document

from mesh_transformer.corpus.recipe import DecontaminateFilter, EvaluationConfig
from mesh_transformer.data.errors import DataError
from mesh_transformer.data.readers import find_files, find_root, read_file

_WORD = re.compile(r"\w+")


class ContaminationIndex:
    """Index of the n-grams of evaluation sets."""

    def __init__(self, config: DecontaminateFilter, sets: dict[str, EvaluationConfig]):
        self.config = config
        self.set_names: dict[int, str] = {}  # hash of an n-gram -> an evaluation set that contains it
        for name, evaluation in sets.items():
            counts: Counter[int] = Counter()
            for text in _read_texts(name, evaluation):
                counts.update({gram for gram, _, _ in self._grams(text)})
            self.set_names.update({gram: name for gram, count in counts.items() if count <= config.max_ngram_documents})

    def _grams(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield hash, start and end offset of every n-gram; a text of 8 to n words is one n-gram, a shorter text has none."""
        words = [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text)]
        n = min(self.config.n_gram, len(words))
        if n < 8:  # the smallest n of GPT-3: shorter n-grams occur in unrelated texts
            return
        for i in range(len(words) - n + 1):
            gram = " ".join(word for word, _, _ in words[i : i + n])
            yield xxhash.xxh3_64_intdigest(gram.encode()), words[i][1], words[i + n - 1][2]

    def decontaminate(self, document: Document) -> str:
        """Cut overlaps out of a document; return the reason to drop it, or ""."""
        hits = [
            (start, end, self.set_names[gram])
            for gram, start, end in self._grams(document.text)
            if gram in self.set_names
        ]
        if not hits:
            return ""
        reason = f"overlaps {hits[0][2]}"
        if self.config.action == "drop":
            return reason
        cuts: list[list[int]] = []
        for start, end, _ in hits:
            start, end = max(start - self.config.margin, 0), end + self.config.margin
            if cuts and start <= cuts[-1][1]:
                cuts[-1][1] = max(end, cuts[-1][1])
            else:
                cuts.append([start, end])
        if len(cuts) > self.config.max_cuts:
            return f"{reason} in more than {self.config.max_cuts} places"
        bounds = [0, *(bound for cut in cuts for bound in cut), len(document.text)]
        fragments = [document.text[a:b].strip() for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        fragments = [fragment for fragment in fragments if len(fragment) >= self.config.min_fragment]
        document.text = "\n\n".join(fragments)
        document.metadata["cut"] = f"{reason} in {len(cuts)} place{'s' * (len(cuts) > 1)}"
        return "" if fragments else f"{reason}, nothing left"


def _read_texts(name: str, config: EvaluationConfig) -> Iterator[str]:
    """Yield every example of an evaluation set as one text: the joined fields of a line of JSON, or a paragraph of text."""
    count = 0
    for file in find_files(config.path):
        if file.suffix in (".jsonl", ".json"):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    count += 1
                    yield _join_fields(f"{file}:{number}", line, name, config.text_keys)
        else:
            for document in read_file(file, find_root(config.path)):
                for paragraph in re.split(r"\n\s*\n", document.text):
                    count += 1
                    yield paragraph
    if not count:
        raise DataError(
            f"evaluation.{name}.path = {config.path!r} contains no text; correct the path, or remove the section"
        )


def _join_fields(where: str, line: str, name: str, keys: tuple[str, ...]) -> str:
    try:
        record = json.loads(line)
        values = [record[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: expected a JSON object with {', '.join(keys)} ({type(error).__name__}: {error}); correct the line, or "
            f"set evaluation.{name}.text_keys"
        ) from None
    return " ".join(part for value in values for part in (value if isinstance(value, list) else [str(value)]))
