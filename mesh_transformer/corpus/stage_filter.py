# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""First stage: read the documents of a part, assign each to a split, and run the filters of its component in order."""

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import xxhash
from datatrove.data import Document

from mesh_transformer.corpus.filters import FilterFn, make_filters
from mesh_transformer.corpus.parts import PartWriter
from mesh_transformer.corpus.quality import sample_texts, train_classifier
from mesh_transformer.corpus.recipe import QualityFilter, Recipe
from mesh_transformer.corpus.sources import Part, ReadStats, read_part
from mesh_transformer.data.errors import DataError

SAMPLE_CHARACTERS = 2000  # characters of a dropped document that are retained for inspection
SPLITS = ("heldout", "train")
SPLIT_KEY = "side"  # metadata key of the split in filtered documents


def split_of(name: str, recipe: Recipe) -> str:
    """Return the split of a document. The split depends on only the name and `one_in`, not on the text or other documents."""
    one_in = recipe.heldout.one_in
    return "heldout" if one_in and xxhash.xxh3_64_intdigest(f"heldout:{name}".encode()) % one_in == 0 else "train"


class FilterCounts:
    """Numbers of documents and bytes before and after a filter."""

    def __init__(self, name: str):
        self.name = name
        self.seconds = 0.0
        self.documents_in = 0
        self.bytes_in = 0
        self.documents_out = 0
        self.bytes_out = 0
        self.dropped: Counter[str] = Counter()

    def run(self, function: FilterFn, document: Document, n_bytes: int) -> tuple[str, int]:
        """Run the filter on a document of `n_bytes` bytes; return the reason to drop it, or "", and its new size in bytes."""
        before = document.text
        start = time.perf_counter()
        reason = function(document)
        self.seconds += time.perf_counter() - start
        self.documents_in += 1
        self.bytes_in += n_bytes
        if not reason and not document.text.strip():
            reason = "nothing left"
        if reason:
            self.dropped[reason] += 1
            return reason, n_bytes
        n_bytes = n_bytes if document.text is before else len(document.text.encode())
        self.documents_out += 1
        self.bytes_out += n_bytes
        return "", n_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the counts; raise DataError if they do not add up."""
        if self.documents_in != self.documents_out + self.dropped.total():
            raise DataError(
                f"filter {self.name}: {self.documents_in} documents in, but {self.documents_out} out and "
                f"{self.dropped.total()} dropped; a filter must keep or drop every document: correct its function in filters.py"
            )
        return vars(self) | {"dropped": dict(self.dropped)}


@dataclasses.dataclass(frozen=True)
class FilterStage:
    """Task: one part of the sources -> documents/RANK, dropped/RANK."""

    recipe: Recipe
    parts: tuple[Part, ...]
    classifiers: dict[int, Path]  # number of a quality filter -> its model
    inputs: tuple[str, ...]  # digest of the inputs of each part
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Make part `rank` and return its record."""
        part = self.parts[rank]
        stats = ReadStats()
        filters = make_filters(self.recipe, part.component, self.classifiers)
        counts = [FilterCounts(name) for name, _ in filters]
        languages: Counter[str] = Counter()
        raw = {"documents": 0, "bytes": 0}
        kept_path = f"documents/{rank:05d}.jsonl.zst"
        dropped_path = f"dropped/{rank:05d}.jsonl.zst"
        with PartWriter(self.folder / kept_path) as kept, PartWriter(self.folder / dropped_path) as dropped:
            for source in read_part(part, self.recipe, stats):
                document = Document(source.text, source.name)
                document.metadata[SPLIT_KEY] = split_of(source.name, self.recipe)
                n_bytes = len(source.text.encode())
                raw["documents"] += 1
                raw["bytes"] += n_bytes
                for count, (name, function) in zip(counts, filters, strict=True):
                    before = document.text
                    reason, n_bytes = count.run(function, document, n_bytes)
                    if reason:
                        meta = {"component": part.component, "filter": name, "reason": reason, "bytes": n_bytes}
                        dropped.add(before[:SAMPLE_CHARACTERS], document.id, meta)
                        break
                else:
                    if "language" in document.metadata:
                        languages[document.metadata["language"]] += n_bytes
                    kept.add(document.text, document.id, {"pile_set_name": part.component, **document.metadata})
        return {
            "component": part.component,
            "inputs": self.inputs[rank],
            "source_bytes": sum(file.size for file in part.files),
            "source_digests": stats.digests,
            "bad": stats.bad.counts,
            "bad_examples": stats.bad.examples,
            "decoded": stats.decoded,
            "raw": raw,
            "filters": [count.to_json() for count in counts],
            "languages": languages,
            "outputs": {kept_path: kept.describe(), dropped_path: dropped.describe()},
        }


@dataclasses.dataclass(frozen=True)
class ClassifierStage:
    """Task: train the model of one quality filter on unfiltered documents -> quality-NUMBER.bin."""

    recipe: Recipe
    parts: tuple[Part, ...]
    numbers: tuple[int, ...]  # indices of the quality filters in recipe.filters
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Train the classifier of the `rank`-th quality filter and return its record."""
        number = self.numbers[rank]
        config = self.recipe.filters[number]
        assert isinstance(config, QualityFilter)
        positives = self._sample(config.positives, config.documents)
        negatives = self._sample(config.negatives, config.documents)
        path = self.folder / f"quality-{number}.bin"
        train_classifier(positives, negatives, path, self.recipe.corpus.seed)
        return {"outputs": {path.name: {"size": path.stat().st_size}}}

    def _sample(self, names: tuple[str, ...], count: int) -> list[str]:
        """Sample training documents only, so that the classifier is not trained on held-out text."""
        parts = [part for part in self.parts if part.component in names]
        texts = (
            document.text
            for part in parts
            for document in read_part(part, self.recipe, ReadStats())
            if split_of(document.name, self.recipe) == "train"
        )
        return sample_texts(texts, count, self.recipe.corpus.seed)
