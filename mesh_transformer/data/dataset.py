# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Opens the tokenizer, training loader and validation sets of a run, and previews training sequences as text."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mesh_transformer.config import Config, ConfigError, SourceConfig
from mesh_transformer.data import span_corruption
from mesh_transformer.data.errors import DataError
from mesh_transformer.data.loader import Batch, Dataset, Loader, count_evaluation_batches, evaluation_batches
from mesh_transformer.data.shard_builder import TRAIN, VALIDATION, BuiltShards, build_shards
from mesh_transformer.data.shards import TokenShard
from mesh_transformer.data.span_corruption import SpanCorruption, SpanCorruptionLoader
from mesh_transformer.data.tokenizers import Tokenizer, load_tokenizer

ProgressFn = Callable[[str, int, int, float], None]  # dataset, bytes done, total bytes, seconds since the start


class ValidationSet(NamedTuple):
    """Held-out text: its batches in order, and its sizes."""

    batches: Callable[
        [Sequence[int] | None], Iterator[Batch]
    ]  # argument: the rows to read of each batch; None: all rows
    n_batches: int
    n_tokens: int
    n_bytes: int  # of text, without end-of-text tokens
    text: Callable[[], bytes]


class Data(NamedTuple):
    """The tokenizer and the datasets of a run."""

    tokenizer: Tokenizer
    train: Loader
    validation: dict[str, ValidationSet]
    training_shards: dict[str, BuiltShards]  # training split of every dataset
    notes: list[str]  # text that the tokenizer loses, and skipped documents


def open_data(config: Config, *, on_progress: ProgressFn = lambda name, done, total, seconds: None) -> Data:
    """Find or build the shards of a run, and open the loader and the validation sets.

    Raises DataError for damaged or missing data, and ConfigError if the tokenizer does not fit the model.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if max(tokenizer.n_base_vocab, tokenizer.end_of_text + 1) > config.model.n_vocab:
        raise ConfigError(
            f"model.n_vocab={config.model.n_vocab} is smaller than the tokenizer's {tokenizer.n_vocab} entries "
            f"({config.data.tokenizer}); set model.n_vocab={_round_up(tokenizer.n_vocab, 64)}"
        )
    training: dict[str, BuiltShards] = {}
    held_out: dict[str, BuiltShards] = {}
    for name, source in config.data.train.items():
        splits = _build(config, name, source, tokenizer, config.data.holdout_one_in, on_progress)
        training[name] = splits[TRAIN]
        if VALIDATION in splits:
            held_out[name] = splits[VALIDATION]
    for name, source in config.data.validation.items():
        held_out[name] = _build(config, name, source, tokenizer, 0, on_progress)[TRAIN]
    datasets = [
        Dataset(name, TokenShard(built.prefix), config.data.train[name].weight) for name, built in training.items()
    ]
    corruption = None
    if config.model.n_encoder_layers is not None:
        tokenizer = span_corruption.SentinelTokenizer(tokenizer, config.model.n_vocab)
        corruption = span_corruption.make_span_corruption(config, tokenizer)
    loader = (Loader if corruption is None else partial(SpanCorruptionLoader, corruption))(
        datasets,
        seq_len=config.model.seq_len if corruption is None else corruption.text_len,
        n_vocab=config.model.n_vocab,
        seed=config.run.seed,
        end_of_text=tokenizer.end_of_text,
        shuffle=config.data.shuffle,
        isolate_documents=config.data.isolate_documents,
    )
    _check_epochs(config, loader)
    notes = [f"{config.data.tokenizer}: {tokenizer.loss}"] if tokenizer.loss else []
    notes += [f"{name}: {note}" for name, built in (training | held_out).items() for note in built.notes]
    validation = {name: _open_validation(config, built, tokenizer, corruption) for name, built in held_out.items()}
    return Data(tokenizer, loader, validation, training, notes)


def preview_sequences(config: Config, data: Data, count: int) -> str:
    """Return the first `count` training sequences as text, with statistics of each sequence and totals of the data."""
    lines = []
    for index in range(count):
        dataset, sequence = data.train.locate(index)
        batch = data.train.batch(index, 1)
        tokens = batch.tokens[0]
        text = data.tokenizer.decode(tokens)
        if isinstance(data.train, SpanCorruptionLoader):
            tokens = batch.encoder_tokens[0]
            parts = (data.tokenizer.decode(ids[0].tolist()) for ids in (batch.encoder_tokens, batch.targets))
            text = "\n--- targets\n".join(parts)
        ends = int(np.sum(tokens == data.tokenizer.end_of_text))
        n_bytes = len(data.tokenizer.decode_bytes(token for token in tokens if token != data.tokenizer.end_of_text))
        lines.append(
            f"--- sequence {index}: {data.train.datasets[dataset].name} sequence {sequence}; {len(tokens)} tokens, "
            f"{len(np.unique(tokens))} distinct, {ends} end(s) of text, {n_bytes / len(tokens):.2f} bytes per token"
        )
        lines.append(text)
    lines.append("--- totals")
    for name, built in data.training_shards.items():
        lines.append(f"{name}: {built.n_documents:,} documents, {built.n_tokens:,} tokens, {built.n_bytes:,} bytes")
    for name, held_out in data.validation.items():
        lines.append(f"validation set {name}: {held_out.n_tokens:,} tokens, {held_out.n_bytes:,} bytes")
    sequences = config.train.steps * config.train.batch_size
    lines.append(
        f"train.steps={config.train.steps} x train.batch_size={config.train.batch_size} x "
        f"model.seq_len={config.model.seq_len} = {sequences * config.model.seq_len:,} tokens, "
        f"{data.train.epochs(sequences):.2f} epochs"
    )
    return "\n".join(lines + data.notes)


def _build(
    config: Config, name: str, source: SourceConfig, tokenizer: Tokenizer, holdout: int, on_progress: ProgressFn
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
            on_progress=partial(on_progress, name),
        )
    except DataError as error:
        raise DataError(f"dataset {name!r}: {error}") from error


def _check_epochs(config: Config, loader: Loader) -> None:
    sequences = config.train.steps * config.train.batch_size
    limit = config.data.max_epochs
    if limit is not None and loader.epochs(sequences) > limit:
        raise ConfigError(
            f"train.steps={config.train.steps} makes {loader.epochs(sequences):.2f} epochs over the data, more than "
            f"data.max_epochs={limit}; lower train.steps, or add text"
        )


def _open_validation(
    config: Config, built: BuiltShards, tokenizer: Tokenizer, corruption: SpanCorruption | None
) -> ValidationSet:
    shard = TokenShard(built.prefix)
    if corruption is not None:
        return _open_corrupted(config, built, shard, corruption)
    batch_shape = dict(seq_len=config.model.seq_len, batch_size=config.train.batch_size)

    def text() -> bytes:
        tokens = np.asarray(shard.tokens)
        return tokenizer.decode_bytes(tokens[tokens != tokenizer.end_of_text])

    return ValidationSet(
        batches=lambda rows: evaluation_batches(
            shard, **batch_shape, rows=rows, isolate_documents=config.data.isolate_documents
        ),
        n_batches=count_evaluation_batches(shard, **batch_shape),
        n_tokens=shard.n_tokens - 1,
        n_bytes=built.n_bytes,
        text=text,
    )


def _open_corrupted(config: Config, built: BuiltShards, shard: TokenShard, corruption: SpanCorruption) -> ValidationSet:
    """Open a validation set with span corruption. `n_bytes` counts only the noise spans, in proportion to their tokens.

    `text` is empty, because targets are not text that a general compressor could be compared on.
    """
    sequences = shard.n_tokens // corruption.text_len
    if sequences < 1:
        raise DataError(
            f"{built.prefix}: {shard.n_tokens:,} held-out tokens are fewer than one sequence of {corruption.text_len}; "
            "lower data.holdout_one_in or model.seq_len"
        )
    return ValidationSet(
        batches=lambda rows: span_corruption.span_evaluation_batches(
            shard, corruption, batch_size=config.train.batch_size, rows=rows
        ),
        n_batches=math.ceil(sequences / config.train.batch_size),
        n_tokens=sequences * corruption.target_len,
        n_bytes=max(round(built.n_bytes * sequences * corruption.n_noise_tokens / shard.n_tokens), 1),
        text=lambda: b"",
    )


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
