# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Second stage: find duplicate documents and recurring lines in the whole corpus, in bounded memory.

Near duplicates use DataTrove's MinHash blocks: signatures of each part, matches of each band in all parts, clusters. Exact
duplicates and recurring lines use 64-bit hashes: every part writes its hashes sorted, and each task reads one range of
hashes from all parts.
"""

import contextlib
import dataclasses
import io
import re
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.text import simplify_text

from mesh_transformer.corpus.parts import read_documents
from mesh_transformer.corpus.recipe import Recipe
from mesh_transformer.corpus.stage_filter import SPLIT_KEY
from mesh_transformer.corpus.word_tokenizer import WORDS
from mesh_transformer.data.errors import DataError

RANGE_ENTRIES = 4_000_000  # approximate number of hashes that one task sorts in memory
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
HASH_CHARACTERS = 1 << 20  # characters of a text that are hashed at once
_SPACE = re.compile(r"\s")
SHINGLE_CHUNK = 1 << 13  # shingles hashed at once
# Entries of stored arrays: a document with the hash of its text; a line with the number of documents that contain it; a
# document to remove with the duplicate that is retained.
EXACT = np.dtype([("hash", "<u8"), ("heldout", "u1"), ("document", "<u4")])
LINE = np.dtype([("hash", "<u8"), ("documents", "<u4")])
REMOVAL = np.dtype([("rank", "<u4"), ("document", "<u4"), ("kept_rank", "<u4"), ("kept_document", "<u4")])


def hash_text(text: str) -> int:
    """Return a hash that is equal for texts that differ only in case and spaces."""
    digest = xxhash.xxh3_64()
    start = 0
    between = b""
    while start < len(text):  # in chunks: the words of a long text need twelve times the memory of the text
        space = _SPACE.search(text, start + HASH_CHARACTERS)
        end = space.start() if space else len(text)
        words = " ".join(text[start:end].lower().split()).encode()
        if words:
            digest.update(between + words)
            between = b" "
        start = end
    return digest.intdigest()


def hash_line(line: str) -> int:
    """Return a hash that is equal for lines that differ only in case and in spaces at their ends."""
    return xxhash.xxh3_64_intdigest(line.strip().lower().encode())


class BoundedSignature(MinhashDedupSignature):
    """DataTrove's MinHash signatures, computed in chunks of shingles: hashing a shingle needs 1.8 kB of memory."""

    def get_shingles(self, text: str) -> np.ndarray:
        """Return the hash of every n-gram of words, [n-grams, 1]; each word is hashed once."""
        words = self.word_tokenizer.word_tokenize(simplify_text(text, self.config.norm_config))
        hashes = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64, len(words))
        n = self.config.n_grams
        if len(words) < n:
            return np.zeros((0, 1), np.uint64)
        grams = np.zeros(len(words) - n + 1, np.uint64)
        for i in range(n):  # a polynomial modulo 2^64 with an odd multiplier, so that the order of words matters
            grams = grams * _MULTIPLIER + hashes[i : len(words) - n + 1 + i]
        grams ^= grams >> np.uint64(32)
        return (grams * _MULTIPLIER).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Return the hashes of every band, each the minimum over all chunks."""
        sign = super().get_signature
        chunks = [sign(shingles[i : i + SHINGLE_CHUNK]) for i in range(0, len(shingles), SHINGLE_CHUNK)]
        return chunks[0] if len(chunks) == 1 else np.min(np.array(chunks, np.uint64), axis=0).tolist()


def minhash_config(recipe: Recipe) -> MinhashConfig:
    """Return DataTrove's MinHash configuration for a recipe."""
    bands, rows = recipe.duplicates.bands_and_rows
    return MinhashConfig(n_grams=recipe.duplicates.n_gram, num_buckets=bands, hashes_per_bucket=rows)


@dataclasses.dataclass(frozen=True)
class SignatureStage:
    """Task: one filtered part -> exact/RANK, lines/RANK, signatures/bucket_BAND/RANK."""

    recipe: Recipe
    filtered: Path
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Make part `rank` and return its record."""
        exact: list[tuple[int, int, int]] = []
        lines: list[np.ndarray] = []
        documents = self._documents(rank, exact, lines)
        outputs = {}
        if self.recipe.duplicates.near != "none":
            config = minhash_config(self.recipe)
            language: Any = WORDS
            block = BoundedSignature(str(self.folder / "signatures"), config, language=language)
            block.run(documents, rank)
            for band in range(config.num_buckets):
                name = f"signatures/bucket_{band:03d}/{rank:05d}.minhash.sig"
                outputs[name] = {"size": (self.folder / name).stat().st_size}
        else:
            for _ in documents:
                pass
        entries = np.sort(np.array(exact, EXACT), order=["hash", "document"])
        outputs |= _save(self.folder, f"exact/{rank:05d}.npy", entries)
        hashes, counts = np.unique(np.concatenate([np.zeros(0, "<u8"), *lines]), return_counts=True)
        table = np.zeros(len(hashes), LINE)
        table["hash"], table["documents"] = hashes, counts
        outputs |= _save(self.folder, f"lines/{rank:05d}.npy", table)
        return {"documents": len(exact), "lines": len(table), "outputs": outputs}

    def _documents(self, rank: int, exact: list[tuple[int, int, int]], lines: list[np.ndarray]) -> Iterator[Document]:
        """Yield the documents of a part; collect text hashes in `exact` and line hashes in `lines`."""
        config = self.recipe.lines
        for number, record in enumerate(read_documents(self.filtered / f"documents/{rank:05d}.jsonl.zst")):
            text = record["text"]
            heldout = record["meta"][SPLIT_KEY] == "heldout"
            exact.append((hash_text(text), heldout, number))
            if config.min_documents and not heldout:
                line_hashes = {
                    hash_line(line) for line in text.split("\n") if len(line.strip()) >= config.min_characters
                }
                lines.append(np.fromiter(line_hashes, "<u8", len(line_hashes)))
            yield Document(text, record["id"])


@dataclasses.dataclass(frozen=True)
class BandMatchStage:
    """Task: one band of all parts -> pairs/BAND_00.dups, the pairs of documents with equal hashes in the band."""

    recipe: Recipe
    signed: Path
    parts: int
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Match band `rank` and return its record."""
        _allow_open_files(self.parts + 64)
        config = minhash_config(self.recipe)
        MinhashDedupBuckets(str(self.signed / "signatures"), str(self.folder / "pairs"), config=config).run(
            None, rank, config.num_buckets
        )
        name = f"pairs/{rank:05d}_00.dups"
        return {"outputs": {name: {"size": (self.folder / name).stat().st_size}}}


def _allow_open_files(count: int) -> None:
    """Raise the limit on open files, because DataTrove opens the signatures of all parts at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and count > hard:
        raise DataError(
            f"{count} files must be open at once, but the limit of this process is {hard}; raise the limit by `ulimit -n {count}`, "
            "or make fewer parts by raising corpus.part_mb"
        )
    if count > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@dataclasses.dataclass(frozen=True)
class ExactMatchStage:
    """Task: one range of hashes of all parts -> equal/RANGE.npy (groups of documents), repeated/RANGE.npy (lines)."""

    recipe: Recipe
    signed: Path
    parts: int
    ranges: int
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Match range `rank` and return its record."""
        ranks, exact = self._slice("exact", EXACT, rank)
        _, group, count = np.unique(exact["hash"], return_inverse=True, return_counts=True)
        several = count[group] > 1 if len(group) else np.zeros(0, bool)
        groups = np.column_stack([group, ranks, exact["document"], exact["heldout"]])[several].astype("<i8")
        outputs = _save(self.folder, f"equal/{rank:05d}.npy", groups)
        _, lines = self._slice("lines", LINE, rank)
        hashes, inverse = np.unique(lines["hash"], return_inverse=True)
        totals = np.bincount(inverse, lines["documents"], len(hashes)) if len(hashes) else np.zeros(0)
        repeated = hashes[totals >= max(self.recipe.lines.min_documents, 1)].astype("<u8")
        return {"outputs": outputs | _save(self.folder, f"repeated/{rank:05d}.npy", repeated)}

    def _slice(self, kind: str, dtype: np.dtype, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the part numbers and the entries of hash range `rank`."""
        low = (rank << 64) // self.ranges
        high = ((rank + 1) << 64) // self.ranges - 1
        entries = [np.zeros(0, dtype)]
        part_numbers = [np.zeros(0, np.int64)]
        for part in range(self.parts):
            table = np.load(self.signed / f"{kind}/{part:05d}.npy", mmap_mode="r")
            first = np.searchsorted(table["hash"], np.uint64(low), "left")
            last = np.searchsorted(table["hash"], np.uint64(high), "right")
            entries.append(np.array(table[first:last]))
            part_numbers.append(np.full(last - first, part))
        return np.concatenate(part_numbers), np.concatenate(entries)


@dataclasses.dataclass(frozen=True)
class RemovalStage:
    """Single task: pairs and groups of all documents -> exact.npy and near.npy, sorted removals, and counts by component."""

    recipe: Recipe
    components: tuple[str, ...]  # component of each part
    signed: Path
    bands: Path
    equal: Path
    ranges: int
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Write the removals; return the record with their counts by (component of the removed, of the retained document)."""
        outputs = {}
        matrices = {}
        removed_before = np.zeros(0, np.uint64)
        for kind, groups in (("exact", self._equal_groups()), ("near", self._clusters())):
            removals = self._find_removals(groups)
            ids = removals["rank"].astype(np.uint64) << np.uint64(32) | removals["document"]
            removals = removals[~np.isin(ids, removed_before)]
            removed_before = ids
            outputs |= _save(self.folder, f"{kind}.npy", removals)
            pairs = Counter(zip(removals["rank"].tolist(), removals["kept_rank"].tolist(), strict=True))
            matrices[kind] = _sum_components(pairs, self.components)
        return {"matrix": matrices, "outputs": outputs}

    def _equal_groups(self) -> np.ndarray:
        """Return the exact duplicates, [documents, 4]: group, part, document, and 1 if held out."""
        if not self.recipe.duplicates.exact:
            return np.zeros((0, 4), np.int64)
        members = [np.zeros((0, 4), np.int64)]
        base = 0
        for number in range(self.ranges):
            groups = np.load(self.equal / f"equal/{number:05d}.npy")
            groups[:, 0] += base
            base = int(groups[:, 0].max()) + 1 if len(groups) else base
            members.append(groups)
        return np.concatenate(members)

    def _clusters(self) -> np.ndarray:
        """Return the near duplicates in DataTrove's clusters, [documents, 4]: group, part, document, and 1 if held out."""
        if self.recipe.duplicates.near == "none":
            return np.zeros((0, 4), np.int64)
        folder = self.folder / "clusters"
        block = MinhashDedupCluster(
            str(self.bands / "pairs"), str(folder), config=minhash_config(self.recipe), save_cluster_id=True
        )
        with contextlib.redirect_stderr(io.StringIO()):  # DataTrove's progress bar
            block.run(None, 0, 1)
        members = [np.zeros((0, 4), np.int64)]
        for part in range(len(self.components)):
            path = folder / f"{part:06d}.clusters"
            if path.is_file():
                part_members = np.fromfile(path, "<u4").reshape(-1, 2).astype(np.int64)
                exact = np.load(self.signed / f"exact/{part:05d}.npy")
                heldout = np.zeros(len(exact), np.int64)
                heldout[exact["document"]] = exact["heldout"]
                documents = part_members[:, 0]
                members.append(
                    np.column_stack(
                        [part_members[:, 1], np.full(len(part_members), part), documents, heldout[documents]]
                    )
                )
        return np.concatenate(members)

    def _find_removals(self, groups: np.ndarray) -> np.ndarray:
        """Return the documents to remove, each with the duplicate that is retained.

        Of a group, a held-out document is retained, or else the first document by part and number.
        """
        if not len(groups):
            return np.zeros(0, REMOVAL)
        names = sorted(set(self.components))
        component = np.array([names.index(name) for name in self.components])[groups[:, 1]]
        only = self.recipe.duplicates.components or names
        exempt = ~np.isin(component, [names.index(name) for name in only if name in names])
        if self.recipe.duplicates.across_components:
            component = np.zeros_like(component)
        kept = np.where(exempt, np.arange(len(groups)), _first_of(groups, component))
        # Training text must not contain held-out text of any component.
        anywhere = _first_of(groups, np.zeros_like(component))
        leaks = (groups[:, 3] == 0) & (groups[anywhere, 3] == 1)
        kept = np.where(leaks, anywhere, kept)
        removed = np.flatnonzero(kept != np.arange(len(groups)))
        removals = np.zeros(len(removed), REMOVAL)
        removals["rank"] = groups[removed, 1]
        removals["document"] = groups[removed, 2]
        removals["kept_rank"] = groups[kept[removed], 1]
        removals["kept_document"] = groups[kept[removed], 2]
        return np.sort(removals, order=["rank", "document"])


def _sum_components(pairs: Counter[tuple[int, int]], components: tuple[str, ...]) -> list[list[Any]]:
    """Return the counts of part pairs summed by component: (removed from, retained in, count)."""
    sums: Counter[tuple[str, str]] = Counter()
    for (rank, kept), count in pairs.items():
        sums[components[rank], components[kept]] += count
    return [[a, b, count] for (a, b), count in sorted(sums.items())]


def _first_of(groups: np.ndarray, component: np.ndarray) -> np.ndarray:
    """Return for every entry the index of the entry to retain among the entries of the same group and component."""
    order = np.lexsort((groups[:, 2], groups[:, 1], -groups[:, 3], component, groups[:, 0]))
    keys = np.column_stack([groups[order, 0], component[order]])
    starts = np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)]
    first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    result = np.empty(len(order), np.int64)
    result[order] = first
    return result


def _save(folder: Path, name: str, array: np.ndarray) -> dict[str, dict[str, int]]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    temporary.replace(path)
    return {name: {"size": path.stat().st_size}}
