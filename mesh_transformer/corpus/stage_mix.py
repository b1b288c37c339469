# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Last stages: documents are repeated as their epochs say, put in an order by a hash, and written as token shards.

The order of a copy of a document is a hash of seed, name and number of the copy, so it is the same for any number of
workers. Every part writes runs of tokens sorted by it; the shard takes one range of it after the other from all runs.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mesh_transformer.corpus.parts import read_documents
from mesh_transformer.corpus.recipe import Recipe
from mesh_transformer.corpus.stage_filter import SPLITS
from mesh_transformer.data.shards import ShardWriter, token_dtype
from mesh_transformer.data.tokenizers import load_tokenizer

TOKENS_PER_MB = (
    250_000  # of corpus.part_mb: tokens of one part, and of one range of the order, that are in memory at once
)
ENCODE_CHARACTERS = 250_000  # of text that the tokenizer gets at once: with one thread more of it is no faster
INDEX = np.dtype([("key", "<u8"), ("start", "<u8"), ("length", "<u4")])


@dataclasses.dataclass(frozen=True)
class TokenizationStage:
    """Task: the documents of one part -> runs/SIDE-RANK-RUN.bin and .npy."""

    recipe: Recipe
    components: tuple[str, ...]  # of each part
    epochs: dict[str, float]
    selected: Path
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """The record of part `rank`."""
        tokenizer = load_tokenizer(self.recipe.tokens.tokenizer)
        dtype = token_dtype(tokenizer.n_vocab)
        component = self.components[rank]
        epochs = self.epochs[component]
        record: dict[str, Any] = {"component": component, "outputs": {}}
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        for side in SPLITS:
            count = {"documents": 0, "tokens": 0, "bytes": 0, "copies": 0, "copied_tokens": 0, "copied_bytes": 0}
            run = _Run(self.folder, f"runs/{side}-{rank:05d}", dtype, self.recipe.corpus.part_mb * TOKENS_PER_MB)
            path = self.selected / f"{side}/{component}-{rank:05d}.jsonl.zst"
            for texts, names in _batches(path):
                for text, name, ids in zip(texts, names, tokenizer.encode_batch(texts), strict=True):
                    tokens = np.append(ids, tokenizer.end_of_text).astype(dtype)
                    keys = self._keys(name, epochs) if side == "train" else [count["documents"]]
                    for key in keys:
                        run.add(key, tokens)
                    size = len(text.encode())
                    for field, value in (("documents", 1), ("tokens", len(tokens)), ("bytes", size)):
                        count[field] += value
                    for field, value in (("copies", 1), ("copied_tokens", len(tokens)), ("copied_bytes", size)):
                        count[field] += value * len(keys)
            record["outputs"] |= run.finish()
            record[side] = count
            record[f"{side}_runs"] = run.names
        return record

    def _keys(self, name: str, epochs: float) -> list[int]:
        """Places of all copies of a document."""
        seed, whole = self.recipe.corpus.seed, math.floor(epochs)
        chance = xxhash.xxh3_64_intdigest(f"{seed}:epochs:{name}".encode()) / 2**64
        copies = range(whole + (chance < epochs - whole))
        return [xxhash.xxh3_64_intdigest(f"{seed}:order:{copy}:{name}".encode()) for copy in copies]


class _Run:
    """Collects documents and writes them sorted, whenever enough are there."""

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype, most: int):
        self.folder, self.prefix, self.dtype, self.most = folder, prefix, dtype, most
        self.names: list[str] = []
        self._outputs: dict[str, dict[str, int]] = {}
        self._keys: list[int] = []
        self._tokens: list[np.ndarray] = []
        self._length = 0

    def add(self, key: int, tokens: np.ndarray) -> None:
        """A copy of a document at its place in the order."""
        self._keys.append(key)
        self._tokens.append(tokens)
        self._length += len(tokens)
        if self._length >= self.most:
            self._write()

    def finish(self) -> dict[str, dict[str, int]]:
        """Sizes of all files written."""
        if self._keys:
            self._write()
        return self._outputs

    def _write(self) -> None:
        name = f"{self.prefix}-{len(self.names):04d}"
        order = np.argsort(np.array(self._keys, "<u8"), kind="stable")
        index = np.zeros(len(order), INDEX)
        index["key"] = np.array(self._keys, "<u8")[order]
        index["length"] = [len(self._tokens[i]) for i in order]
        index["start"] = np.cumsum(index["length"]) - index["length"]
        np.concatenate([self._tokens[i] for i in order]).tofile(self.folder / f"{name}.bin")
        np.save(self.folder / f"{name}.npy", index)
        for path in (f"{name}.bin", f"{name}.npy"):
            self._outputs[path] = {"size": (self.folder / path).stat().st_size}
        self.names.append(name)
        self._keys, self._tokens, self._length = [], [], 0


def _batches(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    texts, names, size = [], [], 0
    for record in read_documents(path):
        texts.append(record["text"])
        names.append(record["id"])
        size += len(record["text"])
        if size > ENCODE_CHARACTERS:
            yield texts, names
            texts, names, size = [], [], 0
    if texts:
        yield texts, names


@dataclasses.dataclass(frozen=True)
class ShardStage:
    """Task: train (the whole mixture, shuffled) or heldout-COMPONENT (in order) -> NAME.bin, NAME.idx."""

    recipe: Recipe
    shards: tuple[tuple[str, tuple[str, ...], int], ...]  # name, runs and tokens of each
    tokenised: Path
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """The record of shard `rank`."""
        name, runs, tokens = self.shards[rank]
        dtype = token_dtype(load_tokenizer(self.recipe.tokens.tokenizer).n_vocab)
        with ShardWriter(self.folder / name, dtype) as shard:
            for document in self._in_order(runs, tokens, dtype) if name == "train" else self._as_they_lie(runs, dtype):
                shard.add(document)
        paths = [self.folder / f"{name}{end}" for end in (".bin", ".idx")]
        return {"outputs": {path.name: {"size": path.stat().st_size} for path in paths}}

    def _in_order(self, runs: tuple[str, ...], tokens: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        ranges = max(1, math.ceil(tokens / (self.recipe.corpus.part_mb * TOKENS_PER_MB)))
        for number in range(ranges):
            low, high = (number << 64) // ranges, ((number + 1) << 64) // ranges - 1
            keys: list[np.ndarray] = []
            documents: list[np.ndarray] = []
            for run in runs:
                index = np.load(self.tokenised / f"{run}.npy", mmap_mode="r")
                first = int(np.searchsorted(index["key"], np.uint64(low), "left"))
                last = int(np.searchsorted(index["key"], np.uint64(high), "right"))
                keys.append(np.array(index["key"][first:last]))
                documents += self._documents(run, np.array(index[first:last]), dtype)
            for place in np.argsort(np.concatenate(keys), kind="stable") if keys else ():
                yield documents[place]

    def _as_they_lie(self, runs: tuple[str, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
        for run in runs:
            yield from self._documents(run, np.load(self.tokenised / f"{run}.npy"), dtype)

    def _documents(self, run: str, index: np.ndarray, dtype: np.dtype) -> list[np.ndarray]:
        if not len(index):
            return []
        start, end = int(index["start"][0]), int(index["start"][-1]) + int(index["length"][-1])
        offset, count = start * dtype.itemsize, end - start
        tokens = np.fromfile(self.tokenised / f"{run}.bin", dtype, count, offset=offset)
        return np.split(tokens, (index["start"][1:] - start).astype(np.int64))


def describe_tokenizer(recipe: Recipe) -> str:
    """Digest of the tokenizer, for what depends on it."""
    return json.dumps([recipe.tokens.tokenizer, load_tokenizer(recipe.tokens.tokenizer).fingerprint])
