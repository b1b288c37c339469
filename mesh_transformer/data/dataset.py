# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The data of a run, opened: tokenizer, training loader, validation sets; and a look at what the model will see."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mesh_transformer.config import Config, ConfigError, SourceConfig
from mesh_transformer.data import span_corruption
from mesh_transformer.data.errors import DataError
from mesh_transformer.data.loader import Batch, Loader, Dataset, count_evaluation_batches, evaluation_batches
from mesh_transformer.data.shard_builder import BuiltShards, build_shards
from mesh_transformer.data.shards import TokenShard
from mesh_transformer.data.tokenizers import Tokenizer, load_tokenizer


class ValidationSet(NamedTuple):
    """Held-out text: its batches in order, each token once, and its size."""

    batches: Callable[[Sequence[int] | None], Iterator[Batch]]  # given the rows wanted of each, None for all
    n_batches: int
    n_tokens: int
    n_bytes: int  # of text, without ends of text
    text: Callable[[], bytes]


class Data(NamedTuple):
    """What a run reads."""

    tokenizer: Tokenizer
    train: Loader
    validation: dict[str, ValidationSet]
    training_shards: dict[str, BuiltShards]  # the training side of every source
    notes: list[str]  # documents left out


def open_data(
    config: Config, *, on_progress: Callable[[str, int, int, float], None] = lambda name, done, total, seconds: None
) -> Data:
    """Shards made or found, and everything that reads them. `report` gets (source, bytes done, in all, seconds).

    Raises DataError for damaged or missing data, ConfigError where tokenizer and model contradict each other.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.n_vocab > config.model.n_vocab:
        raise ConfigError(
            f"model.n_vocab={config.model.n_vocab} is smaller than the tokenizer's {tokenizer.n_vocab} entries "
            f"({config.data.tokenizer}); set model.n_vocab={_round_up(tokenizer.n_vocab, 64)}"
        )
    training: dict[str, BuiltShards] = {}
    heldout: dict[str, BuiltShards] = {}
    for name, source in config.data.train.items():
        sides = _build(config, name, source, tokenizer, config.data.holdout_one_in, on_progress)
        training[name] = sides["train"]
        if "heldout" in sides:
            heldout[name] = sides["heldout"]
    for name, source in config.data.validation.items():
        heldout[name] = _build(config, name, source, tokenizer, 0, on_progress)["train"]
    sources = [
        Dataset(name, TokenShard(built.prefix), config.data.train[name].weight) for name, built in training.items()
    ]
    hiding = None
    if config.model.n_encoder_layers is not None:
        tokenizer = span_corruption.SentinelTokenizer(tokenizer, config.model.n_vocab)
        hiding = span_corruption.make_span_corruption(config, tokenizer)
    loader = (Loader if hiding is None else partial(span_corruption.SpanCorruptionLoader, hiding))(
        sources,
        seq_len=config.model.seq_len if hiding is None else hiding.text_len,
        n_vocab=config.model.n_vocab,
        seed=config.run.seed,
        end_of_text=tokenizer.end_of_text,
        shuffle=config.data.shuffle,
        isolate_documents=config.data.isolate_documents,
    )
    _check_epochs(config, loader)
    notes = [f"{name}: {note}" for name, built in (training | heldout).items() for note in built.notes]
    validation = {name: _open_validation(config, built, tokenizer, hiding) for name, built in heldout.items()}
    return Data(tokenizer, loader, validation, training, notes)


def preview_sequences(config: Config, data: Data, count: int) -> str:
    """The first `count` training sequences as text with their statistics, and the totals, for a person to read."""
    lines = []
    for index in range(count):
        source, sequence = data.train.locate(index)
        batch = data.train.batch(index, 1)
        tokens = batch.tokens[0]
        text = data.tokenizer.decode(tokens)
        if isinstance(data.train, span_corruption.SpanCorruptionLoader):
            tokens = batch.encoder_tokens[0]
            sides = (data.tokenizer.decode(side[0].tolist()) for side in (batch.encoder_tokens, batch.targets))
            text = "\n--- to write\n".join(sides)
        ends = int(np.sum(tokens == data.tokenizer.end_of_text))
        n_bytes = len(data.tokenizer.decode_bytes(token for token in tokens if token != data.tokenizer.end_of_text))
        lines.append(
            f"--- sequence {index}: {data.train.sources[source].name}, its number {sequence}; {len(tokens)} tokens, "
            f"{len(np.unique(tokens))} different, {ends} end(s) of text, {n_bytes / len(tokens):.2f} bytes a token"
        )
        lines.append(text)
    lines.append("--- totals")
    for name, built in data.training_shards.items():
        lines.append(f"{name}: {built.n_documents:,} documents, {built.n_tokens:,} tokens, {built.n_bytes:,} bytes")
    for name, held in data.validation.items():
        lines.append(f"held out from training, {name}: {held.n_tokens:,} tokens, {held.n_bytes:,} bytes")
    sequences = config.train.steps * config.train.batch_size
    lines.append(
        f"train.steps={config.train.steps} x train.batch_size={config.train.batch_size} x model.seq_len={config.model.seq_len} = "
        f"{sequences * config.model.seq_len:,} tokens, {data.train.epochs(sequences):.2f} passes over the data"
    )
    return "\n".join(lines + data.notes)


def _build(
    config: Config,
    name: str,
    source: SourceConfig,
    tokenizer: Tokenizer,
    holdout: int,
    report: Callable[[str, int, int, float], None],
) -> dict[str, BuiltShards]:
    try:
        return build_shards(
            source.path,
            tokenizer,
            config.data.cache_dir,
            text_key=source.text_key,
            holdout=holdout,
            on_bad=config.data.on_bad_document,
            workers=os.cpu_count() or 1,
            on_progress=lambda done, total, seconds: report(name, done, total, seconds),
        )
    except DataError as error:
        raise DataError(f"data source {name!r}: {error}") from error


def _check_epochs(config: Config, loader: Loader) -> None:
    sequences = config.train.steps * config.train.batch_size
    limit = config.data.max_epochs
    if limit is not None and loader.epochs(sequences) > limit:
        raise ConfigError(
            f"train.steps={config.train.steps} passes {loader.epochs(sequences):.2f} times over the data, "
            f"more than data.max_epochs={limit}; lower train.steps, or add text"
        )


def _open_validation(
    config: Config, built: BuiltShards, tokenizer: Tokenizer, hiding: span_corruption.SpanCorruption | None
) -> ValidationSet:
    shard = TokenShard(built.prefix)
    if hiding is not None:
        return _open_hidden(config, built, shard, hiding)
    sizes = dict(seq_len=config.model.seq_len, batch_size=config.train.batch_size)

    def text() -> bytes:
        tokens = np.asarray(shard.tokens)
        return tokenizer.decode_bytes(tokens[tokens != tokenizer.end_of_text])

    return ValidationSet(
        batches=lambda rows: evaluation_batches(
            shard, **sizes, rows=rows, isolate_documents=config.data.isolate_documents
        ),
        n_batches=count_evaluation_batches(shard, **sizes),
        n_tokens=shard.n_tokens - 1,
        n_bytes=built.n_bytes,
        text=text,
    )


def _open_hidden(config: Config, built: BuiltShards, shard: TokenShard, hiding: span_corruption.SpanCorruption) -> ValidationSet:
    """What is to be written counts, and the share of the bytes that it stands for; compressors see other text."""
    sequences = shard.n_tokens // hiding.text_len
    if sequences < 1:
        raise DataError(
            f"{built.prefix}: {shard.n_tokens:,} held-out tokens are less than one sequence of {hiding.text_len}; "
            "lower data.holdout_one_in or model.seq_len"
        )
    return ValidationSet(
        batches=lambda rows: span_corruption.span_evaluation_batches(
            shard, hiding, batch_size=config.train.batch_size, rows=rows
        ),
        n_batches=math.ceil(sequences / config.train.batch_size),
        n_tokens=sequences * hiding.target_len,
        n_bytes=max(round(built.n_bytes * sequences * hiding.n_noise_tokens / shard.n_tokens), 1),
        text=lambda: b"",
    )


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
