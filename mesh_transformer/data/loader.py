# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Shards -> batches: a batch is a pure function of the data, the seed and the numbers of its sequences.

A source's sequence j is its tokens j T to (j + 1) T, and the same shifted by one as targets (T = seq_len; only the last
partial sequence is dropped). Sequences are shuffled anew in each pass by Grain; sources are mixed in a fixed pattern
that repeats every MIXTURE_PERIOD sequences and has every source's share exactly (to 1 / MIXTURE_PERIOD). Any process can make
any part of any batch, so resuming needs the step alone.
"""

import hashlib
import json
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import grain
import numpy as np

from mesh_transformer.data.errors import DataError
from mesh_transformer.data.shards import TokenShard

MIXTURE_PERIOD = 4096


class Batch(NamedTuple):
    """Sequences of one step; numpy on the way, jax arrays inside the step."""

    tokens: Any  # int32 [B, T]
    targets: Any  # int32 [B, T], tokens shifted by one
    segment_ids: Any  # int32 [B, T], 1, 2, ... per document if documents are isolated, else 1
    positions: Any  # int32 [B, T], from 0 in every sequence, and in every document if isolated
    mask: Any  # float32 [B, T], weight in the loss
    encoder_tokens: Any = None  # int32 [B, S], what an encoder reads


class Dataset(NamedTuple):
    """A shard and its share of the mixture."""

    name: str
    shard: TokenShard
    weight: float


class Loader:
    """Batches of a mixture of shards, without end. Raises DataError if a source is shorter than one sequence."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        seq_len: int,
        n_vocab: int,
        seed: int,
        end_of_text: int,
        shuffle: bool = True,
        isolate_documents: bool = False,
    ):
        self.sources, self.seq_len, self.n_vocab, self.end_of_text = list(datasets), seq_len, n_vocab, end_of_text
        self.isolate_documents = isolate_documents
        self.lengths = [(source.shard.n_tokens - 1) // seq_len for source in datasets]
        for source, length in zip(datasets, self.lengths, strict=True):
            if length < 1:
                raise DataError(
                    f"{source.name}: {source.shard.n_tokens:,} tokens are less than one sequence of {seq_len} and its target; "
                    "add text, or lower model.seq_len"
                )
        self._orders = [_make_order(length, seed + i, shuffle) for i, length in enumerate(self.lengths)]
        self._slots, self._ranks, self._shares = _make_pattern([source.weight for source in datasets])
        identity = [
            [
                (source.name, source.shard.n_tokens, source.shard.n_documents, _digest(source.shard), source.weight)
                for source in datasets
            ],
            [seq_len, seed, shuffle, isolate_documents],
        ]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[
            :16
        ]  # of the order and its content

    def batch(self, first: int, size: int, rows: Iterable[int] | None = None) -> Batch:
        """Sequences `first` to `first + size` of the run, or those `rows` of them that a process feeds."""
        wanted = range(size) if rows is None else rows
        return self.read_sequences([self.locate(first + row) for row in wanted])

    def read_sequences(self, sequences: Iterable[tuple[int, int]]) -> Batch:
        """The batch of these: (source, its sequence) of each."""
        return make_batch([self._read(*row) for row in sequences])

    def locate(self, index: int) -> tuple[int, int]:
        """(source, its sequence) of sequence `index` of the run."""
        block, slot = divmod(index, MIXTURE_PERIOD)
        source = int(self._slots[slot])
        return source, self._number_at(source, block * self._shares[source] + int(self._ranks[slot]))

    def epochs(self, n_sequences: int) -> float:
        """Passes over the source that has been seen most often, after so many sequences of the run."""
        shares = [
            n_sequences * share / MIXTURE_PERIOD / length for share, length in zip(self._shares, self.lengths, strict=True)
        ]
        return max(shares)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sources together."""
        return sum(source.shard.n_tokens for source in self.sources)

    def _number_at(self, source: int, place: int) -> int:
        """The source's sequence at a place of its endless order."""
        return _at(self._orders[source], place)

    def _read(self, source: int, sequence: int) -> "PackedSequence":
        shard, start = self.sources[source].shard, sequence * self.seq_len
        tokens = np.asarray(shard.tokens[start : start + self.seq_len + 1], np.int32)
        if tokens.max() >= self.n_vocab or tokens.min() < 0:
            place = start + int(np.argmax((tokens >= self.n_vocab) | (tokens < 0)))
            raise DataError(
                f"{shard.prefix}: document {int(shard.documents_at(np.asarray(place)))} holds token {shard.tokens[place]}, but "
                f"model.n_vocab is {self.n_vocab}; the shard was made with another tokenizer, or n_vocab is too small"
            )
        return pack_sequence(tokens, shard, start, isolate_documents=self.isolate_documents)


class PackedSequence(NamedTuple):
    """One sequence: seq_len + 1 tokens, and for the first seq_len of them document and position."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


def pack_sequence(tokens: np.ndarray, shard: TokenShard, start: int, *, isolate_documents: bool) -> PackedSequence:
    """The row of tokens [T + 1] that begins at place `start` of a shard."""
    places = np.arange(start, start + len(tokens) - 1)
    if not isolate_documents:
        return PackedSequence(tokens, np.ones(len(places), np.int32), np.arange(len(places), dtype=np.int32))
    documents = shard.documents_at(places)
    begins = np.concatenate([[True], documents[1:] != documents[:-1]])
    first = np.maximum.accumulate(np.where(begins, np.arange(len(places)), 0))
    return PackedSequence(tokens, np.cumsum(begins).astype(np.int32), (np.arange(len(places)) - first).astype(np.int32))


def make_batch(rows: Sequence[PackedSequence]) -> Batch:
    """A batch of whole rows."""
    tokens = np.stack([row.tokens for row in rows])
    segments = np.stack([row.segments for row in rows])
    positions = np.stack([row.positions for row in rows])
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, np.ones(positions.shape, np.float32))


def evaluation_batches(
    shard: TokenShard,
    *,
    seq_len: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    isolate_documents: bool = False,
) -> Iterator[Batch]:
    """A shard once, in order, every token but the first a target exactly once; what pads the end has mask 0.

    With `rows` only those of every batch.
    """
    wanted = range(batch_size) if rows is None else rows
    for first in range(0, shard.n_tokens - 1, batch_size * seq_len):
        made, masks = [], []
        for start in (first + row * seq_len for row in wanted):
            tokens = np.zeros(seq_len + 1, np.int32)
            part = shard.tokens[start : start + seq_len + 1]
            tokens[: len(part)] = part
            made.append(pack_sequence(tokens, shard, start, isolate_documents=isolate_documents))
            masks.append(np.arange(seq_len) < len(part) - 1)
        yield make_batch(made)._replace(mask=np.stack(masks).astype(np.float32))


def count_evaluation_batches(shard: TokenShard, *, seq_len: int, batch_size: int) -> int:
    """Batches that `evaluation_batches` yields."""
    return math.ceil((shard.n_tokens - 1) / (seq_len * batch_size))


class Prefetcher:
    """Batches made ahead by a thread: `with Prefetcher(loader, places) as batches: for batch in batches: ...`."""

    def __init__(self, loader: Loader, places: Iterable[tuple[Any, ...]], *, depth: int = 2):
        """`places` are arguments of `loader.batch`."""
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(loader, places), daemon=True)

    def __enter__(self) -> Iterator[Batch]:
        self._thread.start()
        return self._drain()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _fill(self, loader: Loader, places: Iterable[tuple[Any, ...]]) -> None:
        try:
            for place in places:
                self._put(loader.batch(*place))
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as error:  # raised again where the batch is wanted
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _drain(self) -> Iterator[Batch]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def _make_order(length: int, seed: int, shuffle: bool) -> grain.MapDataset:
    numbers = grain.MapDataset.range(length)
    return (numbers.shuffle(seed=seed % 2**32) if shuffle else numbers).repeat()


def _at(order: grain.MapDataset, place: int) -> int:
    number = order[place]
    assert number is not None, "an endless order has every place"
    return int(number)


def _make_pattern(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Which source fills each of MIXTURE_PERIOD slots, the how-manieth of its source each slot is, and slots per source.

    Each slot goes to the source furthest behind its share, so that any stretch is close to the mixture.
    """
    shares = np.asarray(weights, np.float64) / sum(weights)
    slots, ranks, counts = np.zeros(MIXTURE_PERIOD, np.int64), np.zeros(MIXTURE_PERIOD, np.int64), np.zeros(len(shares), np.int64)
    for slot in range(MIXTURE_PERIOD):
        source = int(np.argmax(shares * (slot + 1) - counts))
        slots[slot], ranks[slot] = source, counts[source]
        counts[source] += 1
    if (counts == 0).any():
        raise DataError(
            f"source {int(np.argmin(counts))} of the mixture has less than 1 in {MIXTURE_PERIOD} of the weight; raise it"
        )
    return slots, ranks, counts.tolist()


def _digest(shard: TokenShard) -> str:
    """Of the tokens' type, ends of documents, and a thousand tokens spread over the shard."""
    places = np.linspace(0, max(shard.n_tokens - 1, 0), num=min(1000, shard.n_tokens), dtype=np.int64)
    sample = np.asarray(shard.tokens[places], np.int64)
    return hashlib.sha256(sample.tobytes() + np.asarray(shard.ends, np.int64).tobytes()).hexdigest()[:16]
