# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Third stage: write the documents, minus duplicates and recurring lines, and check that the splits are disjoint."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.corpus.parts import PartWriter, read_documents
from mesh_transformer.corpus.recipe import Recipe
from mesh_transformer.corpus.stage_dedup import REMOVAL, hash_line, hash_text
from mesh_transformer.corpus.stage_filter import SAMPLE_CHARACTERS, SPLIT_KEY, SPLITS
from mesh_transformer.corpus.stages import CorpusError


@dataclasses.dataclass(frozen=True)
class SelectionStage:
    """Task: one filtered part -> train/COMPONENT-RANK, heldout/COMPONENT-RANK, dropped/RANK, hashes/SPLIT-RANK.npy."""

    recipe: Recipe
    components: tuple[str, ...]  # component of each part
    filtered: Path
    matched: Path  # folder of ExactMatchStage, which has the recurring lines
    removals: Path
    ranges: int
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Make part `rank` and return its record."""
        component = self.components[rank]
        removals = self._removals(rank)
        recurring = self._recurring_lines()
        fields = ("documents_in", "bytes_in", "exact", "near", "duplicate_bytes", "emptied", "lines", "line_bytes")
        counts: dict[str, int] = dict.fromkeys(fields, 0)
        lengths: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        hashes: dict[str, list[int]] = {split: [] for split in SPLITS}
        names = {split: f"{split}/{component}-{rank:05d}.jsonl.zst" for split in SPLITS}
        dropped_name = f"dropped/{rank:05d}.jsonl.zst"
        dropped = PartWriter(self.folder / dropped_name)
        writers = {split: PartWriter(self.folder / name) for split, name in names.items()}
        with dropped, writers["train"], writers["heldout"]:
            for number, record in enumerate(read_documents(self.filtered / f"documents/{rank:05d}.jsonl.zst")):
                text = record["text"]
                n_bytes = len(text.encode())
                counts["documents_in"] += 1
                counts["bytes_in"] += n_bytes
                dropped_meta: dict[str, Any] = {"component": component, "bytes": n_bytes}
                if number in removals:
                    kind, retained = removals[number]
                    counts[kind] += 1
                    counts["duplicate_bytes"] += n_bytes
                    dropped_meta |= {"filter": "duplicates", "reason": f"{kind} duplicate", "of": retained}
                    dropped.add(text[:SAMPLE_CHARACTERS], record["id"], dropped_meta)
                    continue
                if len(recurring):
                    text, cut = self._cut_lines(text, recurring)
                    counts["lines"] += cut
                    counts["line_bytes"] += n_bytes - len(text.encode()) if cut else 0
                    if not text.strip():
                        counts["emptied"] += 1
                        dropped_meta |= {"filter": "lines", "reason": "nothing left"}
                        dropped.add(record["text"][:SAMPLE_CHARACTERS], record["id"], dropped_meta)
                        continue
                meta = record["meta"]
                split = meta.pop(SPLIT_KEY)
                writers[split].add(text, record["id"], meta)
                lengths[split][len(text.encode()).bit_length()] += 1
                hashes[split].append(hash_text(text))
        outputs = {name: writers[split].describe() for split, name in names.items()}
        outputs |= {dropped_name: dropped.describe()}
        for split, split_hashes in hashes.items():
            path = self.folder / f"hashes/{split}-{rank:05d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.unique(np.array(split_hashes, "<u8")))
        out = sum(writer.documents for writer in writers.values()) + dropped.documents
        if out != counts["documents_in"]:
            raise CorpusError(
                f"part {rank} of component {component}: {counts['documents_in']} documents in, but {out} retained or dropped; "
                f"remove {self.folder} and build again"
            )
        splits = {split: {"documents": writers[split].documents, "bytes": writers[split].bytes} for split in SPLITS}
        return {"component": component, "counts": counts, "splits": splits, "lengths": lengths, "outputs": outputs}

    def _removals(self, rank: int) -> dict[int, tuple[str, list[int]]]:
        """Return {number of a document to remove: (kind of duplicate, [part, number] of the retained document)}."""
        removals: dict[int, tuple[str, list[int]]] = {}
        for kind in ("exact", "near"):
            table = np.load(self.removals / f"{kind}.npy", mmap_mode="r")
            assert table.dtype == REMOVAL
            first, last = np.searchsorted(table["rank"], [rank, rank + 1])
            for entry in table[first:last]:
                removals[int(entry["document"])] = (kind, [int(entry["kept_rank"]), int(entry["kept_document"])])
        return removals

    def _recurring_lines(self) -> np.ndarray:
        """Return the sorted hashes of the lines to remove. The files are in ascending order of hash ranges."""
        if not self.recipe.lines.min_documents:
            return np.zeros(0, "<u8")
        return np.concatenate([np.load(self.matched / f"repeated/{k:05d}.npy") for k in range(self.ranges)])

    def _cut_lines(self, text: str, recurring: np.ndarray) -> tuple[str, int]:
        """Return the text without recurring lines, and the number of lines removed."""
        lines = text.split("\n")
        candidates = [i for i, line in enumerate(lines) if len(line.strip()) >= self.recipe.lines.min_characters]
        hashes = np.array([hash_line(lines[i]) for i in candidates], "<u8")
        indices = np.minimum(np.searchsorted(recurring, hashes), len(recurring) - 1)
        removed = {i for i, hit in zip(candidates, recurring[indices] == hashes, strict=True) if hit}
        return (
            ("\n".join(line for i, line in enumerate(lines) if i not in removed), len(removed))
            if removed
            else (text, 0)
        )


def check_disjoint(folder: Path, parts: int) -> dict[str, int]:
    """Return the number of distinct texts in each split; raise CorpusError if the splits share a text."""
    heldout = np.unique(np.concatenate([np.load(folder / f"hashes/heldout-{rank:05d}.npy") for rank in range(parts)]))
    trained = 0
    for rank in range(parts):
        train = np.load(folder / f"hashes/train-{rank:05d}.npy")
        trained += len(train)
        common = np.isin(train, heldout, assume_unique=True).sum()
        if common:
            raise CorpusError(
                f"part {rank}: {common} training documents equal held-out documents except for case and spaces; "
                "set duplicates.exact = true, or lines.min_documents = 0 if removing lines made them equal"
            )
    return {"heldout_texts": len(heldout), "train_texts_by_part": trained, "in_both": 0}
