# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Shards -> batches. A batch is a pure function of the data, the seed and the indices of the batch's sequences.

Sequence j of a dataset has the dataset's tokens j T to (j + 1) T, and as targets the tokens shifted by one (T = seq_len;
only the last partial sequence is dropped). Sequences are reshuffled in every epoch by Grain. Datasets are mixed in a
fixed pattern that repeats every MIXTURE_PERIOD sequences and has each dataset's weight to within 1 / MIXTURE_PERIOD. Any
process can build any part of any batch, so resuming requires only the step.
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

MIXTURE_PERIOD = 4096  # sequences


class Batch(NamedTuple):
    """The sequences of one step: NumPy arrays from the loader, JAX arrays inside the step."""

    tokens: Any  # int32 [B, T]
    targets: Any  # int32 [B, T], tokens shifted by one
    segment_ids: Any  # int32 [B, T], 1, 2, ... per document if documents are isolated, else 1
    positions: Any  # int32 [B, T], from 0 in every sequence, and in every document if isolated
    mask: Any  # float32 [B, T], weight in the loss
    encoder_tokens: Any = None  # int32 [B, S], the encoder's input


class Dataset(NamedTuple):
    """A token shard and its weight in the mixture."""

    name: str
    shard: TokenShard
    weight: float


class Loader:
    """Endless batches of a mixture of datasets. Raises DataError if a dataset is shorter than one sequence."""

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
        self.datasets = list(datasets)
        self.seq_len = seq_len
        self.n_vocab = n_vocab
        self.end_of_text = end_of_text
        self.isolate_documents = isolate_documents
        self.lengths = [(dataset.shard.n_tokens - 1) // seq_len for dataset in datasets]
        for dataset, length in zip(datasets, self.lengths, strict=True):
            if length < 1:
                raise DataError(
                    f"{dataset.name}: {dataset.shard.n_tokens:,} tokens are fewer than one sequence of {seq_len} and its last "
                    "target; add text, or lower model.seq_len"
                )
        self._orders = [_make_order(length, seed + i, shuffle) for i, length in enumerate(self.lengths)]
        self._mixture_dataset, self._mixture_rank, self._mixture_count = _make_mixture(self.datasets)
        # Identity of the data and their order. Runs store a digest of it, so the structure of `identity` must not change.
        identity = [
            [
                (
                    dataset.name,
                    dataset.shard.n_tokens,
                    dataset.shard.n_documents,
                    _digest(dataset.shard),
                    dataset.weight,
                )
                for dataset in datasets
            ],
            [seq_len, seed, shuffle, isolate_documents],
        ]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def batch(self, first: int, size: int, rows: Iterable[int] | None = None) -> Batch:
        """Return sequences `first` to `first + size` of the run, or only the sequences `first + row` for `rows`."""
        wanted = range(size) if rows is None else rows
        return self.read_sequences([self.locate(first + row) for row in wanted])

    def read_sequences(self, sequences: Iterable[tuple[int, int]]) -> Batch:
        """Return a batch of sequences, each given as (dataset, sequence of the dataset)."""
        return make_batch([self._read(*sequence) for sequence in sequences])

    def locate(self, index: int) -> tuple[int, int]:
        """Return (dataset, sequence of the dataset) of sequence `index` of the run."""
        period, i = divmod(index, MIXTURE_PERIOD)
        dataset = int(self._mixture_dataset[i])
        n = period * self._mixture_count[dataset] + int(self._mixture_rank[i])
        return dataset, self._sequence_at(dataset, n)

    def epochs(self, n_sequences: int) -> float:
        """Return the number of epochs over the most repeated dataset after `n_sequences` sequences of the run."""
        counts = zip(self._mixture_count, self.lengths, strict=True)
        return max(n_sequences * count / MIXTURE_PERIOD / length for count, length in counts)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all datasets."""
        return sum(dataset.shard.n_tokens for dataset in self.datasets)

    def _sequence_at(self, dataset: int, n: int) -> int:
        """Return the n-th sequence in the endless order of a dataset."""
        sequence = self._orders[dataset][n]
        assert sequence is not None, "the order is endless"
        return int(sequence)

    def _read(self, dataset: int, sequence: int) -> "PackedSequence":
        shard, start = self.datasets[dataset].shard, sequence * self.seq_len
        tokens = np.asarray(shard.tokens[start : start + self.seq_len + 1], np.int32)
        if tokens.max() >= self.n_vocab or tokens.min() < 0:
            position = start + int(np.argmax((tokens >= self.n_vocab) | (tokens < 0)))
            document = int(shard.documents_at(np.asarray(position)))
            raise DataError(
                f"{shard.prefix}: document {document} contains token id {shard.tokens[position]}, but model.n_vocab="
                f"{self.n_vocab}; set data.tokenizer to the tokenizer of the shard, or raise model.n_vocab"
            )
        return pack_sequence(tokens, shard, start, isolate_documents=self.isolate_documents)


class PackedSequence(NamedTuple):
    """One sequence: seq_len + 1 tokens, and the segments and positions of the first seq_len tokens."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def pack_sequence(tokens: np.ndarray, shard: TokenShard, start: int, *, isolate_documents: bool) -> PackedSequence:
    """Return the packed sequence of tokens [T + 1] that begin at token `start` of a shard."""
    indices = np.arange(len(tokens) - 1, dtype=np.int32)
    if not isolate_documents:
        return PackedSequence(tokens, np.ones(len(indices), np.int32), indices)
    documents = shard.documents_at(np.arange(start, start + len(indices)))
    begins = np.concatenate([[True], documents[1:] != documents[:-1]])
    first = np.maximum.accumulate(np.where(begins, indices, 0))
    return PackedSequence(tokens, np.cumsum(begins).astype(np.int32), (indices - first).astype(np.int32))


def make_batch(sequences: Sequence[PackedSequence]) -> Batch:
    """Return a batch of complete sequences."""
    tokens = np.stack([sequence.tokens for sequence in sequences])
    segment_ids = np.stack([sequence.segment_ids for sequence in sequences])
    positions = np.stack([sequence.positions for sequence in sequences])
    return Batch(tokens[:, :-1], tokens[:, 1:], segment_ids, positions, np.ones(positions.shape, np.float32))


def evaluation_batches(
    shard: TokenShard,
    *,
    seq_len: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    isolate_documents: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of a shard in order; every token but the first is a target once, and padding has mask 0.

    With `rows`, yield only these rows of each batch.
    """
    wanted = range(batch_size) if rows is None else rows
    for first in range(0, shard.n_tokens - 1, batch_size * seq_len):
        sequences, masks = [], []
        for start in (first + row * seq_len for row in wanted):
            tokens = np.zeros(seq_len + 1, np.int32)
            part = shard.tokens[start : start + seq_len + 1]
            tokens[: len(part)] = part
            sequences.append(pack_sequence(tokens, shard, start, isolate_documents=isolate_documents))
            masks.append(np.arange(seq_len) < len(part) - 1)
        yield make_batch(sequences)._replace(mask=np.stack(masks).astype(np.float32))


def count_evaluation_batches(shard: TokenShard, *, seq_len: int, batch_size: int) -> int:
    """Return the number of batches that `evaluation_batches` yields."""
    return math.ceil((shard.n_tokens - 1) / (seq_len * batch_size))


class Prefetcher:
    """Builds batches in a background thread: `with Prefetcher(loader, calls) as batches: for batch in batches: ...`."""

    def __init__(self, loader: Loader, calls: Iterable[tuple[Any, ...]], *, depth: int = 2):
        """`calls` has the arguments of `loader.batch` for each batch; at most `depth` batches are ready at a time."""
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(loader, calls), daemon=True)

    def __enter__(self) -> Iterator[Batch]:
        self._thread.start()
        return self._drain()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _fill(self, loader: Loader, calls: Iterable[tuple[Any, ...]]) -> None:
        try:
            for arguments in calls:
                self._put(loader.batch(*arguments))
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as error:  # raised again in the thread that takes the batches
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
    sequences = grain.MapDataset.range(length)
    return (sequences.shuffle(seed=seed % 2**32) if shuffle else sequences).repeat()


def _make_mixture(mixture: Sequence[Dataset]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return datasets [MIXTURE_PERIOD] and ranks [MIXTURE_PERIOD] of a period's sequences, and the number of sequences per dataset.

    The rank of a sequence is its index among the period's sequences of the same dataset. Each sequence is assigned to the dataset
    that is furthest below its weight, so that any range of sequences is close to the mixture.
    """
    weights = np.asarray([dataset.weight for dataset in mixture], np.float64)
    shares = weights / sum(weights)
    datasets = np.zeros(MIXTURE_PERIOD, np.int64)
    ranks = np.zeros(MIXTURE_PERIOD, np.int64)
    counts = np.zeros(len(shares), np.int64)
    for i in range(MIXTURE_PERIOD):
        dataset = int(np.argmax(shares * (i + 1) - counts))
        datasets[i] = dataset
        ranks[i] = counts[dataset]
        counts[dataset] += 1
    if (counts == 0).any():
        rarest = mixture[int(np.argmin(counts))]
        raise DataError(
            f"dataset {rarest.name!r}: weight={rarest.weight} is less than 1/{MIXTURE_PERIOD} of the total weight; raise its "
            "weight"
        )
    return datasets, ranks, counts.tolist()


def _digest(shard: TokenShard) -> str:
    """Return a digest of the ends of documents and of a thousand tokens spread over the shard."""
    positions = np.linspace(0, max(shard.n_tokens - 1, 0), num=min(1000, shard.n_tokens), dtype=np.int64)
    sample = np.asarray(shard.tokens[positions], np.int64)
    return hashlib.sha256(sample.tobytes() + np.asarray(shard.ends, np.int64).tobytes()).hexdigest()[:16]
