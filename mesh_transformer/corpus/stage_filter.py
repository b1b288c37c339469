# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""First stage: the documents of a part are read, given a side, and go through the steps of their component one by one."""

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import xxhash
from datatrove.data import Document

from mesh_transformer.corpus.filters import make_filters
from mesh_transformer.corpus.parts import PartWriter
from mesh_transformer.corpus.quality import sample_texts, train_classifier
from mesh_transformer.corpus.recipe import Quality, Recipe
from mesh_transformer.corpus.sources import Part, Reading, read_part
from mesh_transformer.data.errors import DataError

SAMPLE_CHARACTERS = 2000  # characters of a dropped document that are kept for a look
SPLITS = ("heldout", "train")


def split_of(name: str, recipe: Recipe) -> str:
    """Held out or for training, by the document's name alone: no later choice moves it, nor do further documents."""
    one_in = recipe.heldout.one_in
    return "heldout" if one_in and xxhash.xxh3_64_intdigest(f"heldout:{name}".encode()) % one_in == 0 else "train"


class FilterCounts:
    """What went into a step and came out of it."""

    def __init__(self, name: str):
        self.name, self.seconds = name, 0.0
        self.documents_in = self.bytes_in = self.documents_out = self.bytes_out = 0
        self.dropped: Counter[str] = Counter()

    def to_json(self) -> dict[str, Any]:
        """Counts; raises DataError if a document is neither out nor dropped."""
        if self.documents_in != self.documents_out + self.dropped.total():
            raise DataError(
                f"step {self.name}: {self.documents_in} in, but {self.documents_out} out and {self.dropped}"
            )
        return vars(self) | {"dropped": dict(self.dropped)}


@dataclasses.dataclass(frozen=True)
class FilterStage:
    """Task: one part of the sources -> documents/RANK, dropped/RANK."""

    recipe: Recipe
    parts: tuple[Part, ...]
    classifiers: dict[int, Path]
    inputs: tuple[str, ...]  # of each part, a digest of what it depends on
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """The record of part `rank`."""
        part, reading = self.parts[rank], Reading()
        steps = make_filters(self.recipe, part.component, self.classifiers)
        counts = [FilterCounts(name) for name, _ in steps]
        languages: Counter[str] = Counter()
        raw = {"documents": 0, "bytes": 0}
        kept_path, dropped_path = f"documents/{rank:05d}.jsonl.zst", f"dropped/{rank:05d}.jsonl.zst"
        with PartWriter(self.folder / kept_path) as kept, PartWriter(self.folder / dropped_path) as dropped:
            for found in read_part(part, self.recipe, reading):
                document = Document(found.text, found.name)
                document.metadata["side"] = split_of(found.name, self.recipe)
                size = len(found.text.encode())
                raw["documents"] += 1
                raw["bytes"] += size
                for count, (name, step) in zip(counts, steps, strict=True):
                    before, start = document.text, time.perf_counter()
                    reason = step(document)
                    count.seconds += time.perf_counter() - start
                    count.documents_in += 1
                    count.bytes_in += size
                    if not reason and not document.text.strip():
                        reason = "nothing left"
                    if reason:
                        count.dropped[reason] += 1
                        why = {"component": part.component, "step": name, "reason": reason, "bytes": size}
                        dropped.add(before[:SAMPLE_CHARACTERS], document.id, why)
                        break
                    size = size if document.text is before else len(document.text.encode())
                    count.documents_out += 1
                    count.bytes_out += size
                else:
                    if "language" in document.metadata:
                        languages[document.metadata["language"]] += size
                    kept.add(document.text, document.id, {"pile_set_name": part.component, **document.metadata})
        return {
            "component": part.component,
            "inputs": self.inputs[rank],
            "source_bytes": sum(file.size for file in part.files),
            "source_digests": reading.digests,
            "bad": reading.bad.counts,
            "bad_examples": reading.bad.examples,
            "decoded": reading.decoded,
            "raw": raw,
            "steps": [count.to_json() for count in counts],
            "languages": languages,
            "outputs": {kept_path: kept.describe(), dropped_path: dropped.describe()},
        }


@dataclasses.dataclass(frozen=True)
class ClassifierStage:
    """Task: the model of the quality step with this number, from documents before any step -> quality-PLACE.bin."""

    recipe: Recipe
    parts: tuple[Part, ...]
    places: tuple[int, ...]
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Train the `rank`-th of the recipe's quality steps."""
        place = self.places[rank]
        step = self.recipe.steps[place]
        assert isinstance(step, Quality), "place is of one"
        positives, negatives = (self._sample(names, step.documents) for names in (step.positives, step.negatives))
        path = self.folder / f"quality-{place}.bin"
        train_classifier(positives, negatives, path, self.recipe.corpus.seed)
        return {"outputs": {path.name: {"size": path.stat().st_size}}}

    def _sample(self, names: tuple[str, ...], count: int) -> list[str]:
        """Of documents for training alone, so that held-out ones stay unseen by the classifier as well."""
        parts = [part for part in self.parts if part.component in names]
        texts = (
            (document.name, document.text)
            for part in parts
            for document in read_part(part, self.recipe, Reading())
            if split_of(document.name, self.recipe) == "train"
        )
        return sample_texts(texts, count, self.recipe.corpus.seed)
