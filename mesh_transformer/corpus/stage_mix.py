# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Last stages: repeat documents by the epochs of their component, shuffle them by a hash, and write token shards.

The sort key of a copy of a document is a hash of the seed, the number of the copy and the name of the document, so the
order is the same for any number of workers. This is an external merge sort: every part writes runs of tokens sorted by
key, and the stage of the shards merges one range of keys after the other from all runs.
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

TOKENS_PER_MB = 250_000  # maximum tokens of a run or of a key range, both held in memory, per MB of corpus.part_mb
ENCODE_CHARACTERS = (
    250_000  # characters of text in one call of the tokenizer: with one thread, longer calls are not faster
)
# Entry of a run's index: a document's sort key, first token and number of tokens.
INDEX = np.dtype([("key", "<u8"), ("start", "<u8"), ("length", "<u4")])


@dataclasses.dataclass(frozen=True)
class TokenizationStage:
    """Task: the documents of one part -> runs/SPLIT-RANK-RUN.bin and .npy."""

    recipe: Recipe
    components: tuple[str, ...]  # component of each part
    epochs: dict[str, float]
    selected: Path
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Make part `rank` and return its record."""
        tokenizer = load_tokenizer(self.recipe.tokens.tokenizer)
        dtype = token_dtype(tokenizer.n_vocab)
        component = self.components[rank]
        epochs = self.epochs[component]
        record: dict[str, Any] = {"component": component, "outputs": {}}
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            count = {"documents": 0, "tokens": 0, "bytes": 0, "copies": 0, "copied_tokens": 0, "copied_bytes": 0}
            run = _RunWriter(self.folder, f"runs/{split}-{rank:05d}", dtype, self.recipe.corpus.part_mb * TOKENS_PER_MB)
            path = self.selected / f"{split}/{component}-{rank:05d}.jsonl.zst"
            for texts, names in _batches(path):
                for text, name, ids in zip(texts, names, tokenizer.encode_batch(texts), strict=True):
                    tokens = np.append(ids, tokenizer.end_of_text).astype(dtype)
                    keys = self._sort_keys(name, epochs) if split == "train" else [count["documents"]]
                    for key in keys:
                        run.add(key, tokens)
                    n_bytes = len(text.encode())
                    for field, value in (("documents", 1), ("tokens", len(tokens)), ("bytes", n_bytes)):
                        count[field] += value
                    for field, value in (("copies", 1), ("copied_tokens", len(tokens)), ("copied_bytes", n_bytes)):
                        count[field] += value * len(keys)
            record["outputs"] |= run.finish()
            record[split] = count
            record[f"{split}_runs"] = run.names
        return record

    def _sort_keys(self, name: str, epochs: float) -> list[int]:
        """Return the sort keys of all copies of a document."""
        seed = self.recipe.corpus.seed
        whole = math.floor(epochs)
        chance = xxhash.xxh3_64_intdigest(f"{seed}:epochs:{name}".encode()) / 2**64
        copies = range(whole + (chance < epochs - whole))
        return [xxhash.xxh3_64_intdigest(f"{seed}:order:{copy}:{name}".encode()) for copy in copies]


class _RunWriter:
    """Buffers documents and writes a sorted run whenever the buffer is full."""

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype, max_tokens: int):
        self.folder = folder
        self.prefix = prefix
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.names: list[str] = []
        self._outputs: dict[str, dict[str, int]] = {}
        self._keys: list[int] = []
        self._tokens: list[np.ndarray] = []
        self._n_tokens = 0

    def add(self, key: int, tokens: np.ndarray) -> None:
        self._keys.append(key)
        self._tokens.append(tokens)
        self._n_tokens += len(tokens)
        if self._n_tokens >= self.max_tokens:
            self._write()

    def finish(self) -> dict[str, dict[str, int]]:
        """Write the last run and return the sizes of all files."""
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
        self._keys = []
        self._tokens = []
        self._n_tokens = 0


def _batches(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield texts and names of the documents of a file in batches for the tokenizer."""
    texts: list[str] = []
    names: list[str] = []
    characters = 0
    for record in read_documents(path):
        texts.append(record["text"])
        names.append(record["id"])
        characters += len(record["text"])
        if characters > ENCODE_CHARACTERS:
            yield texts, names
            texts, names, characters = [], [], 0
    if texts:
        yield texts, names


@dataclasses.dataclass(frozen=True)
class ShardStage:
    """Task: train (the shuffled mixture) or heldout-COMPONENT (in order) -> NAME.bin, NAME.idx."""

    recipe: Recipe
    shards: tuple[tuple[str, tuple[str, ...], int], ...]  # name, runs and number of tokens of each shard
    tokenized: Path
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Write shard `rank` and return its record."""
        name, runs, tokens = self.shards[rank]
        dtype = token_dtype(load_tokenizer(self.recipe.tokens.tokenizer).n_vocab)
        with ShardWriter(self.folder / name, dtype) as shard:
            documents = self._merge(runs, tokens, dtype) if name == "train" else self._concatenate(runs, dtype)
            for document in documents:
                shard.add(document)
        paths = [self.folder / f"{name}{end}" for end in (".bin", ".idx")]
        return {"outputs": {path.name: {"size": path.stat().st_size} for path in paths}}

    def _merge(self, runs: tuple[str, ...], tokens: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield the documents of all runs in the order of their keys, with one range of keys in memory at a time."""
        ranges = max(1, math.ceil(tokens / (self.recipe.corpus.part_mb * TOKENS_PER_MB)))
        for number in range(ranges):
            low = (number << 64) // ranges
            high = ((number + 1) << 64) // ranges - 1
            keys: list[np.ndarray] = []
            documents: list[np.ndarray] = []
            for run in runs:
                index = np.load(self.tokenized / f"{run}.npy", mmap_mode="r")
                first = int(np.searchsorted(index["key"], np.uint64(low), "left"))
                last = int(np.searchsorted(index["key"], np.uint64(high), "right"))
                keys.append(np.array(index["key"][first:last]))
                documents += self._documents(run, np.array(index[first:last]), dtype)
            for position in np.argsort(np.concatenate(keys), kind="stable") if keys else ():
                yield documents[position]

    def _concatenate(self, runs: tuple[str, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
        for run in runs:
            yield from self._documents(run, np.load(self.tokenized / f"{run}.npy"), dtype)

    def _documents(self, run: str, index: np.ndarray, dtype: np.dtype) -> list[np.ndarray]:
        """Return the tokens of consecutive documents of a run."""
        if not len(index):
            return []
        start = int(index["start"][0])
        count = int(index["start"][-1]) + int(index["length"][-1]) - start
        tokens = np.fromfile(self.tokenized / f"{run}.bin", dtype, count, offset=start * dtype.itemsize)
        return np.split(tokens, (index["start"][1:] - start).astype(np.int64))


def describe_tokenizer(recipe: Recipe) -> str:
    """Return the name and digest of the tokenizer, to identify the stages that depend on the tokenizer."""
    return json.dumps([recipe.tokens.tokenizer, load_tokenizer(recipe.tokens.tokenizer).fingerprint])
