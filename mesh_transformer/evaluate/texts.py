# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Documents to score: files named in [evaluate], or the held-out text of the run."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mesh_transformer.config import Config, ConfigError, EvaluateConfig
from mesh_transformer.data.compression import COMPRESSED, read_chunks, split_lines
from mesh_transformer.data.download import download_dataset, is_remote
from mesh_transformer.data.errors import DataError, Document, DocumentError
from mesh_transformer.data.readers import find_files, holds_tokens, list_partitions, read_documents
from mesh_transformer.data.shard_builder import is_validation_document
from mesh_transformer.data.shards import TokenShard, is_shard
from mesh_transformer.data.tokenizers import Tokenizer


def read_texts(config: Config, tokenizer: Tokenizer, components: Iterable[str]) -> Iterator[tuple[str, Document]]:
    """Yield the documents of `components` of evaluate.data, or the run's held-out text if `components` is empty.

    Each document is paired with the name of its component, or of its data source.

    Raises DataError, with file and line, for damaged data.
    """
    evaluate, names = config.evaluate, list(components)
    for name in names:
        if evaluate.group_key:
            yield from _read_groups(evaluate.data[name], evaluate)
        else:
            documents = _read(evaluate.data[name], evaluate.text_key, config, tokenizer)
            yield from ((name, document) for document in documents)
    if names:
        return
    for name, source in config.data.train.items():
        if config.data.holdout_one_in and source.path:
            for document in _read(source.path, source.text_key, config, tokenizer):
                if is_validation_document(document.name, config.data.holdout_one_in):
                    yield name, document
    for name, source in config.data.validation.items():
        for document in _read(source.path, source.text_key, config, tokenizer):
            yield name, document


def check_paths(config: Config, components: Iterable[str]) -> None:
    """Check that the paths of [evaluate] exist and, if `components` is empty, that the run has held-out text.

    Raises DataError for a missing path, ConfigError if the run has no held-out text.
    """
    for path in (*config.evaluate.data.values(), *config.evaluate.fewshot_data.values()):
        if not is_remote(path) and not is_shard(path.removesuffix(".bin").removesuffix(".idx")):
            list_partitions(path)
    if not list(components) and not config.data.validation and not config.data.holdout_one_in:
        raise ConfigError(
            "the run has no held-out text: data.holdout_one_in is 0 and [data.validation] is empty; add text: "
            "--data NAME=PATH"
        )


def _read(path: str, text_key: str, config: Config, tokenizer: Tokenizer) -> Iterator[Document]:
    if is_remote(path):
        path = download_dataset(path, config.data.cache_dir)
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    if is_shard(prefix):
        shard = TokenShard(prefix)
        for index in range(shard.n_documents):
            tokens = np.asarray(shard.document(index))
            yield Document(tokenizer.decode(tokens[tokens != tokenizer.end_of_text].tolist()), f"{prefix}:{index}")
        return
    if holds_tokens(path):
        raise DataError(f"{path}: TFRecords contain token ids without their text; give the text: --data NAME=PATH")
    yield from read_documents(path, text_key=text_key)


def _read_groups(path: str, evaluate: EvaluateConfig) -> Iterator[tuple[str, Document]]:
    """Yield the documents of JSONL files, each with the value of the field evaluate.group_key.

    The field may be nested: "meta.pile_set_name".
    """
    for file in find_files(path):
        if ".jsonl" not in file.suffixes:
            raise DataError(
                f"{file}: evaluate.group_key={evaluate.group_key!r} needs .jsonl, .jsonl.zst or .jsonl.gz files; convert the "
                "file, or remove evaluate.group_key"
            )
        try:
            yield from _read_lines(file, evaluate)
        except DocumentError as error:
            raise DataError(f"{file}: {error.detail}") from None


def _read_lines(file: Path, evaluate: EvaluateConfig) -> Iterator[tuple[str, Document]]:
    suffix = file.suffix.lower()
    for number, line in enumerate(split_lines(read_chunks(file, suffix if suffix in COMPRESSED else None)), 1):
        if line.isspace() or not line:
            continue
        try:
            record = json.loads(line)
            group, text = record, record[evaluate.text_key]
            for key in evaluate.group_key.split("."):
                group = group[key]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}:{number}: not an object with fields {evaluate.text_key!r} and {evaluate.group_key!r} "
                f"({type(error).__name__}: {error}); set evaluate.text_key and evaluate.group_key to its fields"
            ) from None
        yield str(group), Document(str(text), f"{file.name}:{number}")
