# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Span corruption (Raffel et al. 2019, section 3.1.4): the encoder's input lacks some spans, and the decoder generates them.

From a chunk of text, the encoder's input (S = model.seq_len tokens) and the decoder's targets:

    text            Thank you for inviting me to your party last week
    encoder_tokens  Thank you <X> me to your party <Y> <end>
    targets         <X> for inviting <Y> last week <end>

The number of spans and all lengths follow from S, so no padding is needed: with S = 512, a chunk of 568 tokens gives 512
encoder tokens and 114 targets. Sentinels <X>, <Y>, ... are the last rows of the vocabulary in descending order, or a T5
tokenizer's <extra_id_0>, ... The spans depend on the seed, the sequence's index in its dataset and the epoch, so they
are the same on every mesh and after a resume, and differ between epochs.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.config import Config, ConfigError
from mesh_transformer.data.loader import Batch, Dataset, Loader
from mesh_transformer.data.shards import TokenShard
from mesh_transformer.data.stream_decoder import decode_all
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.data.vocabularies import TokenizerError


class SpanCorruption(NamedTuple):
    """Sizes and special tokens of span corruption."""

    text_len: int  # tokens of a chunk of text
    n_noise_tokens: int  # tokens of a chunk that sentinels replace
    n_spans: int  # number of spans that the noise tokens form
    first_sentinel: int  # token id; the other sentinels have lower ids in descending order
    decoder_start: int  # the decoder's first input: the padding token if the tokenizer has one, else the end of text
    end_of_text: int  # ends the encoder's input and the targets
    seed: int

    @property
    def target_len(self) -> int:
        """Number of target tokens."""
        return self.n_noise_tokens + self.n_spans + 1


class SentinelTokenizer:
    """A tokenizer with sentinels <extra_id_0>, <extra_id_1>, ...: named in its vocabulary, or the model's last rows."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int):
        """Wrap `tokenizer` for a model with `n_vocab` embedding rows."""
        self._inner = tokenizer
        added = tokenizer.to_json().get("tokenizer", {}).get("added_tokens", [])
        named = {token["content"]: token["id"] for token in added}
        self.is_named = "<extra_id_0>" in named
        self.first_sentinel = named.get("<extra_id_0>", n_vocab - 1)
        consecutive = itertools.takewhile(
            lambda i: named.get(f"<extra_id_{i}>") == self.first_sentinel - i, itertools.count()
        )
        self.n_sentinels = sum(1 for _ in consecutive) if self.is_named else max(n_vocab - tokenizer.n_vocab, 0)
        self.decoder_start = named.get("<pad>", tokenizer.end_of_text)
        self.n_vocab = max(tokenizer.n_vocab, n_vocab if self.n_sentinels else 0)
        self.n_base_vocab = tokenizer.n_base_vocab
        self.begin_of_text = tokenizer.begin_of_text
        self.end_of_text = tokenizer.end_of_text
        self.lossy = tokenizer.lossy
        self.loss = tokenizer.loss
        self.utf8_errors = tokenizer.utf8_errors
        self.clean_up_spaces = tokenizer.clean_up_spaces
        self.fingerprint = tokenizer.fingerprint

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Return the ids of a text; sentinels in it always become their ids."""
        ids: list[int] = []
        for i, part in enumerate(re.split(r"<extra_id_(\d+)>", text)):  # text and sentinel numbers alternate
            if i % 2 == 0:
                ids += self._inner.encode(part, parse_special=parse_special)
            elif int(part) < self.n_sentinels:
                ids.append(self.first_sentinel - int(part))
            else:
                raise TokenizerError(
                    f"<extra_id_{part}> is not a sentinel: the vocabulary has {self.n_sentinels} sentinels, numbered from 0; use "
                    "one of them"
                )
        if add_special_tokens:
            added = self._inner.encode("", add_special_tokens=True)
            n_before = 0 if self.begin_of_text is None else 1
            ids = [*added[:n_before], *ids, *added[n_before:]]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return decode_all(self, ids, skip_special_tokens=skip_special_tokens)

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        parts = (
            self._name(i)
            if self._is_sentinel(i)
            else self._inner.decode_bytes([i], skip_special_tokens=skip_special_tokens)
            for i in ids
        )
        return b"".join(parts)

    def decode_first(self, token: int, *, skip_special_tokens: bool = True) -> bytes | None:
        if self._is_sentinel(token):
            return self._name(token)
        return self._inner.decode_first(token, skip_special_tokens=skip_special_tokens)

    def count_lost(self, text: str, ids: np.ndarray) -> int:
        return self._inner.count_lost(text, ids)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON of the wrapped tokenizer; the sentinels are determined by the model."""
        return self._inner.to_json()

    def _is_sentinel(self, token: int) -> bool:
        return 0 <= self.first_sentinel - token < self.n_sentinels

    def _name(self, token: int) -> bytes:
        return f"<extra_id_{self.first_sentinel - token}>".encode()


def make_span_corruption(config: Config, tokenizer: SentinelTokenizer) -> SpanCorruption:
    """Return the span corruption of a run. Raises ConfigError if the vocabulary has too few sentinels."""
    text_len, n_noise_tokens, n_spans = config.data.measure_spans(config.model.seq_len)
    if n_spans > tokenizer.n_sentinels:
        fix = "lower model.seq_len, or raise data.mean_noise_span_length"
        if not tokenizer.is_named:
            n_without_sentinels = config.model.n_vocab - tokenizer.n_sentinels
            fix = f"set model.n_vocab={math.ceil((n_without_sentinels + n_spans) / 64) * 64}, whose last rows are the sentinels"
        raise ConfigError(
            f"sequences of model.seq_len={config.model.seq_len} have {n_spans} noise spans, but the vocabulary has "
            f"{tokenizer.n_sentinels} sentinels; {fix}"
        )
    return SpanCorruption(
        text_len=text_len,
        n_noise_tokens=n_noise_tokens,
        n_spans=n_spans,
        first_sentinel=tokenizer.first_sentinel,
        decoder_start=tokenizer.decoder_start,
        end_of_text=tokenizer.end_of_text,
        seed=config.run.seed,
    )


def corrupt_spans(
    tokens: np.ndarray, corruption: SpanCorruption, dataset: int, sequence: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (encoder tokens [S], targets [U]) of `text_len` tokens of text.

    `sequence` is the sequence's index in dataset number `dataset`, plus the dataset's length for each earlier epoch. Every
    division of the noise tokens into spans, and of the other tokens into the text before each span, is equally likely. A sequence
    begins with text and ends with a noise span.
    """
    rng = np.random.default_rng([corruption.seed, dataset, sequence])
    text_lengths = _divide(rng, corruption.text_len - corruption.n_noise_tokens, corruption.n_spans)
    noise_lengths = _divide(rng, corruption.n_noise_tokens, corruption.n_spans)
    ends = np.cumsum(np.stack([text_lengths, noise_lengths], axis=1).reshape(-1))
    spans = np.split(tokens.astype(np.int32), ends[:-1])  # text and noise alternate
    sentinels = [np.array([corruption.first_sentinel - i], np.int32) for i in range(corruption.n_spans)]
    end = np.array([corruption.end_of_text], np.int32)
    encoder_tokens = [part for pair in zip(spans[::2], sentinels, strict=True) for part in pair]
    targets = [part for pair in zip(sentinels, spans[1::2], strict=True) for part in pair]
    return np.concatenate([*encoder_tokens, end]), np.concatenate([*targets, end])


def _divide(rng: np.random.Generator, items: int, parts: int) -> np.ndarray:
    """Return the random lengths of `parts` non-empty runs into which `items` items are divided."""
    cuts = np.sort(rng.choice(items - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))


def make_span_batch(pairs: Sequence[tuple[np.ndarray, np.ndarray]], corruption: SpanCorruption) -> Batch:
    """Return a batch from pairs (encoder tokens, targets); decoder inputs are the targets shifted right by one."""
    encoder_tokens, targets = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    tokens = np.concatenate([np.full_like(targets[:, :1], corruption.decoder_start), targets[:, :-1]], axis=1)
    positions = np.broadcast_to(np.arange(targets.shape[1], dtype=np.int32), targets.shape)
    ones = np.ones_like(targets)
    return Batch(tokens, targets, ones, positions, ones.astype(np.float32), encoder_tokens)


class SpanCorruptionLoader(Loader):
    """Loader of text with span corruption. The sequences, their order and their spans are the same on any mesh."""

    def __init__(self, corruption: SpanCorruption, datasets: Sequence[Dataset], **options: Any):
        """`options` are the arguments of Loader; `seq_len` is `corruption.text_len`."""
        super().__init__(datasets, **options)
        self.corruption = corruption
        identity = [self.fingerprint, corruption, "anew in every pass"]  # stored in runs: the text must not change
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def _sequence_at(self, dataset: int, n: int) -> int:
        """Return the n-th sequence as Loader does, plus the dataset's length for each earlier epoch."""
        length = self.lengths[dataset]
        return n // length * length + super()._sequence_at(dataset, n)

    def read_sequences(self, sequences: Iterable[tuple[int, int]]) -> Batch:
        pairs = []
        for dataset, sequence in sequences:
            tokens = self._read(dataset, sequence % self.lengths[dataset]).tokens[:-1]
            pairs.append(corrupt_spans(tokens, self.corruption, dataset, sequence))
        return make_span_batch(pairs, self.corruption)


def span_evaluation_batches(
    shard: TokenShard, corruption: SpanCorruption, *, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield the batches of a shard in order, without its last partial sequence; padding has mask 0.

    With `rows`, yield only these rows of each batch.
    """
    wanted = range(batch_size) if rows is None else rows
    total = shard.n_tokens // corruption.text_len
    for first in range(0, total, batch_size):
        sequences = [first + row for row in wanted]
        starts = [min(sequence, total - 1) * corruption.text_len for sequence in sequences]
        texts = [np.asarray(shard.tokens[start : start + corruption.text_len]) for start in starts]
        pairs = [corrupt_spans(text, corruption, 0, n) for text, n in zip(texts, sequences, strict=True)]
        batch = make_span_batch(pairs, corruption)
        yield batch._replace(mask=batch.mask * (np.array(sequences) < total)[:, None].astype(np.float32))
