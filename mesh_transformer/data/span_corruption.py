# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Span corruption (Raffel et al. 2019, section 3.1.4): some runs of tokens are hidden, and the decoder writes them out.

Of a stretch of text, what the encoder reads (S = model.seq_len tokens) and what the decoder writes:

    text      Thank you for inviting me to your party last week .
    sources   Thank you <X> me to your party <Y> week . <end>
    targets   <X> for inviting <Y> last <end>

Number and lengths of all of them follow from S, so that nothing is padded: with 512, 568 tokens of text make 512 and
114. Sentinels <X>, <Y>, ... are the vocabulary's topmost rows, downwards, or a T5 tokenizer's <extra_id_0>, ... Which
tokens are hidden follows from the seed, the sequence's place in its source and the pass over it, so that it is the same on
every mesh and after a resumption, and another one when a text comes again.
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
from mesh_transformer.data.loader import Batch, Loader, Dataset
from mesh_transformer.data.shards import TokenShard
from mesh_transformer.data.tokenizers import Tokenizer, TokenizerError


class SpanCorruption(NamedTuple):
    """How stretches of text are made into what is read and what is written."""

    text_len: int  # tokens of a stretch
    n_noise_tokens: int  # of them
    n_spans: int  # of runs that they make
    first_sentinel: int  # id of the first; the others go downwards
    decoder_start: int  # what the decoder is given first: padding, where the tokenizer has it, or else the end of text
    end_of_text: int  # behind both sides
    seed: int

    @property
    def target_len(self) -> int:
        """Tokens that the decoder writes."""
        return self.n_noise_tokens + self.n_spans + 1


class SentinelTokenizer:
    """A tokenizer in whose texts <extra_id_0>, <extra_id_1>, ... are sentinels: its own, or the vocabulary's topmost rows."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int):
        """`n_vocab` is the model's."""
        self._inner = tokenizer
        added = tokenizer.to_json().get("tokenizer", {}).get("added_tokens", [])
        named = {token["content"]: token["id"] for token in added}
        self.is_named = "<extra_id_0>" in named
        self.first_sentinel = named.get("<extra_id_0>", n_vocab - 1)
        following = itertools.takewhile(lambda i: named.get(f"<extra_id_{i}>") == self.first_sentinel - i, itertools.count())
        self.n_sentinels = sum(1 for _ in following) if self.is_named else max(n_vocab - tokenizer.n_vocab, 0)
        self.decoder_start = named.get("<pad>", tokenizer.end_of_text)
        self.n_vocab = max(tokenizer.n_vocab, n_vocab if self.n_sentinels else 0)
        self.end_of_text, self.leading_space = tokenizer.end_of_text, tokenizer.leading_space
        self.fingerprint = tokenizer.fingerprint

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        ids: list[int] = []
        for place, part in enumerate(re.split(r"<extra_id_(\d+)>", text)):
            if place % 2 == 0:
                ids += self._inner.encode(part)
            elif int(part) < self.n_sentinels:
                ids.append(self.first_sentinel - int(part))
            else:
                raise TokenizerError(f"<extra_id_{part}>: there are {self.n_sentinels} sentinels, and the first is 0")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        shown, run = "", list[int]()
        for token in [*ids, None]:
            if token is not None and not self._is_sentinel(token):
                run.append(int(token))
                continue
            shown += self._inner.decode(run) if run else ""
            shown, run = shown + ("" if token is None else self._name(token)), []
        return shown

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See Tokenizer."""
        names = (self._name(i).encode() if self._is_sentinel(i) else self._inner.decode_bytes([i]) for i in ids)
        return b"".join(names)

    def to_json(self) -> dict[str, Any]:
        """Of the tokenizer alone: its sentinels follow from the model."""
        return self._inner.to_json()

    def _is_sentinel(self, token: int) -> bool:
        return 0 <= self.first_sentinel - token < self.n_sentinels

    def _name(self, token: int) -> str:
        return f"<extra_id_{self.first_sentinel - token}>"


def make_span_corruption(config: Config, tokenizer: SentinelTokenizer) -> SpanCorruption:
    """The run's; ConfigError where the vocabulary has no room for sentinels."""
    length, hidden, count = config.data.measure_spans(config.model.seq_len)
    if count > tokenizer.n_sentinels:
        remedy = "lower model.seq_len, or raise data.mean_noise_span_length"
        if not tokenizer.is_named:
            plain = config.model.n_vocab - tokenizer.n_sentinels
            remedy = f"set model.n_vocab={math.ceil((plain + count) / 64) * 64}, whose topmost rows they are"
        raise ConfigError(
            f"sequences of model.seq_len={config.model.seq_len} hide {count} spans, for which there are "
            f"{tokenizer.n_sentinels} sentinels; {remedy}"
        )
    return SpanCorruption(length, hidden, count, tokenizer.first_sentinel, tokenizer.decoder_start, tokenizer.end_of_text, config.run.seed)


def corrupt_spans(tokens: np.ndarray, spans: SpanCorruption, source: int, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """(sources [S], targets [U]) of `spans.length` tokens: sequence number `sequence` of source number `source`, counted
    on from pass to pass.

    Every division of the hidden tokens into runs, and of the others into what lies before each, is equally likely; a
    sequence begins with what is seen and ends with what is hidden.
    """
    rng = np.random.default_rng([spans.seed, source, sequence])
    seen = _divide(rng, spans.text_len - spans.n_noise_tokens, spans.n_spans)
    ends = np.cumsum(np.stack([seen, _divide(rng, spans.n_noise_tokens, spans.n_spans)], axis=1).reshape(-1))
    pieces = np.split(tokens.astype(np.int32), ends[:-1])
    sentinels = [np.array([spans.first_sentinel - i], np.int32) for i in range(spans.n_spans)]
    end = np.array([spans.end_of_text], np.int32)
    sources = [part for pair in zip(pieces[::2], sentinels, strict=True) for part in pair]
    targets = [part for pair in zip(sentinels, pieces[1::2], strict=True) for part in pair]
    return np.concatenate([*sources, end]), np.concatenate([*targets, end])


def _divide(rng: np.random.Generator, items: int, parts: int) -> np.ndarray:
    """Lengths of `parts` runs, none of them empty."""
    cuts = np.sort(rng.choice(items - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))


def make_span_batch(pairs: Sequence[tuple[np.ndarray, np.ndarray]], spans: SpanCorruption) -> Batch:
    """A batch of what `corrupt_spans` gives: the decoder is given each target but the last one, behind `spans.start`."""
    sources, targets = (np.stack(side) for side in zip(*pairs, strict=True))
    tokens = np.concatenate([np.full_like(targets[:, :1], spans.decoder_start), targets[:, :-1]], axis=1)
    positions = np.broadcast_to(np.arange(targets.shape[1], dtype=np.int32), targets.shape)
    ones = np.ones_like(targets)
    return Batch(tokens, targets, ones, positions, ones.astype(np.float32), sources)


class SpanCorruptionLoader(Loader):
    """Batches of text in which spans are hidden; the sequences, their order and what is hidden are the same on any mesh."""

    def __init__(self, corruption: SpanCorruption, sources: Sequence[Dataset], **options: Any):
        """`options` as Loader's, with the length of a stretch of text for seq_len."""
        super().__init__(sources, **options)
        self.spans = corruption
        identity = [self.fingerprint, corruption, "anew in every pass"]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def _number_at(self, source: int, place: int) -> int:
        """As Loader's, but a sequence's number grows by the source's length with every pass."""
        length = self.lengths[source]
        return place // length * length + super()._number_at(source, place)

    def read_sequences(self, sequences: Iterable[tuple[int, int]]) -> Batch:
        """The batch of these: (source, its sequence) of each."""
        rows = [(self._read(source, n % self.lengths[source]).tokens[:-1], (source, n)) for source, n in sequences]
        return make_span_batch([corrupt_spans(tokens, self.spans, *row) for tokens, row in rows], self.spans)


def span_evaluation_batches(
    shard: TokenShard, spans: SpanCorruption, *, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """A shard once, in order, but for the last partial sequence; what fills the last batch has mask 0.

    With `rows` only those of every batch.
    """
    wanted = range(batch_size) if rows is None else rows
    total = shard.n_tokens // spans.text_len
    for first in range(0, total, batch_size):
        numbers = [first + row for row in wanted]
        starts = [min(number, total - 1) * spans.text_len for number in numbers]
        texts = [np.asarray(shard.tokens[start : start + spans.text_len]) for start in starts]
        batch = make_span_batch([corrupt_spans(t, spans, 0, n) for t, n in zip(texts, numbers, strict=True)], spans)
        yield batch._replace(mask=batch.mask * (np.array(numbers) < total)[:, None].astype(np.float32))
