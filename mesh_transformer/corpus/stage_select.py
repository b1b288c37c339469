# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Third stage: documents without duplicates and recurring lines, what they come to, and the proof of the split."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.corpus.parts import PartWriter, read_documents
from mesh_transformer.corpus.recipe import Recipe
from mesh_transformer.corpus.stage_dedup import REMOVAL, hash_line, hash_text
from mesh_transformer.corpus.stage_filter import SAMPLE_CHARACTERS, SPLITS
from mesh_transformer.corpus.stages import CorpusError


@dataclasses.dataclass(frozen=True)
class SelectionStage:
    """Task: one filtered part -> train/COMPONENT-RANK, heldout/COMPONENT-RANK, dropped/RANK, hashes/SIDE-RANK.npy."""

    recipe: Recipe
    components: tuple[str, ...]  # of each part
    filtered: Path
    matched: Path  # repeated lines
    decided: Path
    ranges: int
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """The record of part `rank`."""
        component = self.components[rank]
        removals = self._removals(rank)
        repeated = self._repeated()
        fields = ("documents_in", "bytes_in", "exact", "near", "duplicate_bytes", "emptied", "lines", "line_bytes")
        count: dict[str, int] = dict.fromkeys(fields, 0)
        lengths: dict[str, Counter[int]] = {side: Counter() for side in SPLITS}
        hashes: dict[str, list[int]] = {side: [] for side in SPLITS}
        names = {side: f"{side}/{component}-{rank:05d}.jsonl.zst" for side in SPLITS}
        dropped_name = f"dropped/{rank:05d}.jsonl.zst"
        dropped = PartWriter(self.folder / dropped_name)
        writers = {side: PartWriter(self.folder / name) for side, name in names.items()}
        with dropped, writers["train"], writers["heldout"]:
            for number, record in enumerate(read_documents(self.filtered / f"documents/{rank:05d}.jsonl.zst")):
                text, meta, size = record["text"], record["meta"], len(record["text"].encode())
                count["documents_in"] += 1
                count["bytes_in"] += size
                why: dict[str, Any] = {"component": component, "bytes": size}
                if number in removals:
                    kind, kept = removals[number]
                    count[kind] += 1
                    count["duplicate_bytes"] += size
                    why |= {"step": "duplicates", "reason": f"{kind} duplicate", "of": kept}
                    dropped.add(text[:SAMPLE_CHARACTERS], record["id"], why)
                    continue
                if len(repeated):
                    text, cut = self._cut_lines(text, repeated)
                    count["lines"] += cut
                    count["line_bytes"] += size - len(text.encode()) if cut else 0
                    if not text.strip():
                        count["emptied"] += 1
                        dropped.add(
                            record["text"][:SAMPLE_CHARACTERS], record["id"], why | {"step": "lines", "reason": "nothing left"}
                        )
                        continue
                side = meta.pop("side")
                writers[side].add(text, record["id"], meta)
                lengths[side][len(text.encode()).bit_length()] += 1
                hashes[side].append(hash_text(text))
        outputs = {name: writers[side].describe() for side, name in names.items()} | {dropped_name: dropped.describe()}
        for side, found in hashes.items():
            path = self.folder / f"hashes/{side}-{rank:05d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.unique(np.array(found, "<u8")))
        out = sum(writer.documents for writer in writers.values()) + dropped.documents
        if out != count["documents_in"]:
            raise CorpusError(f"part {rank}: {count['documents_in']} documents in, {out} out and dropped")
        sides = {side: {"documents": writers[side].documents, "bytes": writers[side].bytes} for side in SPLITS}
        return {"component": component, "count": count, "sides": sides, "lengths": lengths, "outputs": outputs}

    def _removals(self, rank: int) -> dict[int, tuple[str, list[int]]]:
        """Number in the part -> kind, and part and number of the one that stays."""
        found: dict[int, tuple[str, list[int]]] = {}
        for kind in ("exact", "near"):
            table = np.load(self.decided / f"{kind}.npy", mmap_mode="r")
            assert table.dtype == REMOVAL
            first, last = np.searchsorted(table["rank"], [rank, rank + 1])
            for row in table[first:last]:
                found[int(row["document"])] = (kind, [int(row["kept_rank"]), int(row["kept_document"])])
        return found

    def _repeated(self) -> np.ndarray:
        """Sorted hashes of the lines to cut; ranges follow one another."""
        if not self.recipe.lines.min_documents:
            return np.zeros(0, "<u8")
        return np.concatenate([np.load(self.matched / f"repeated/{k:05d}.npy") for k in range(self.ranges)])

    def _cut_lines(self, text: str, repeated: np.ndarray) -> tuple[str, int]:
        lines = text.split("\n")
        places = [i for i, line in enumerate(lines) if len(line.strip()) >= self.recipe.lines.min_characters]
        hashes = np.array([hash_line(lines[i]) for i in places], "<u8")
        at = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
        gone = {i for i, hit in zip(places, repeated[at] == hashes, strict=True) if hit}
        return ("\n".join(line for i, line in enumerate(lines) if i not in gone), len(gone)) if gone else (text, 0)


def check_disjoint(folder: Path, parts: int) -> dict[str, int]:
    """Counts of different texts on both sides; CorpusError if the final texts of both have one in common."""
    heldout = np.unique(np.concatenate([np.load(folder / f"hashes/heldout-{rank:05d}.npy") for rank in range(parts)]))
    trained = 0
    for rank in range(parts):
        train = np.load(folder / f"hashes/train-{rank:05d}.npy")
        trained += len(train)
        common = np.isin(train, heldout, assume_unique=True).sum()
        if common:
            raise CorpusError(
                f"part {rank}: {common} training documents equal held-out ones but for case and spaces; "
                "set duplicates.exact = true, or lines.min_documents = 0 if cutting lines made them equal"
            )
    return {"heldout_texts": len(heldout), "train_texts_by_part": trained, "in_both": 0}
