# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Builds token shards in the cache: documents -> tokens -> shards, in parallel, resumable, rebuilt if the data changes.

Validation split: with holdout = n > 0, a document is held out if and only if xxh3_64(its name in UTF-8) % n == 0. The
rule depends only on the document's name, so adding files never moves a document from one split to the other. The
validation split is stored as "<name>-heldout".

A dataset's partitions (files) are grouped, in order, into parts of about 32 MB. Each part becomes a small shard under a
temporary name, and an existing part is not built again. The parts are joined in order, so the result has the same bytes
for any number of workers and interruptions. The shard's name contains a digest of everything that the shard depends on:
path, size and modification time of each file, tokenizer, split and text key.

TFRecords already contain tokens. Each record is split after every end-of-text token; tokens after the last one are a
document without an end of text. Whole records are held out, by the name "FILE NAME:RECORD NUMBER".
"""

import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mesh_transformer.data.download import download_dataset, is_remote
from mesh_transformer.data.errors import DataError, SkippedDocuments
from mesh_transformer.data.readers import OnBad, Partition, ReadOptions, find_reader, list_partitions
from mesh_transformer.data.shards import ShardWriter, TokenShard, is_shard, token_dtype
from mesh_transformer.data.tfrecords import split_documents
from mesh_transformer.data.tokenizers import Tokenizer

VERSION = 1  # of the cache's content; a new version rebuilds all shards
PART_BYTES = 32_000_000  # of source files in a part
ENCODE_CHARACTERS = 4_000_000  # characters of text passed to the tokenizer in one call
TRAIN = "train"
VALIDATION = "heldout"  # name of the validation split on disk
SPLITS = (TRAIN, VALIDATION)
COUNTS = ("documents", "tokens", "bytes", "lost")  # counts of a split, as stored on disk


class BuiltShards(NamedTuple):
    """One split of a dataset, on disk."""

    prefix: Path
    n_documents: int
    n_tokens: int
    n_bytes: int  # of text, without end-of-text tokens
    notes: tuple[str, ...]  # skipped documents with their errors, and lost characters


class EncodedDocument(NamedTuple):
    """A document as tokens."""

    name: str
    tokens: np.ndarray  # with the end of text
    n_bytes: int  # of the document's text
    n_lost: int  # characters that the tokenizer cannot encode


class ShardTask(NamedTuple):
    """The input and output of the worker that builds one part."""

    partitions: list[Partition]
    options: ReadOptions
    holdout: int
    tokenizer: Tokenizer
    prefix: Path


ProgressFn = Callable[[int, int, float], None]  # bytes done, total bytes, seconds since the start


def build_shards(
    path: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    text_key: str = "text",
    holdout: int = 0,
    on_bad: OnBad = "error",
    workers: int = 1,
    on_progress: ProgressFn = lambda done, total, seconds: None,
) -> dict[str, BuiltShards]:
    """Return the shards of a dataset by split ("train", and "heldout" if `holdout`), from the cache or newly built.

    A shard whose prefix is `path` is used unchanged; the size of its text is the size of its decoded tokens.
    A URL is downloaded first. Raises DataError for damaged documents (or counts them, see `on_bad`), for a split
    without documents, and for an object store that cannot be reached.
    """
    if is_remote(path):
        start = time.perf_counter()
        path = download_dataset(
            path, cache_dir, lambda done, total: on_progress(done, total, time.perf_counter() - start)
        )
    prefix = os.path.expanduser(path).removesuffix(".bin").removesuffix(".idx")
    if is_shard(prefix):
        return {TRAIN: _use_shard(Path(prefix), tokenizer, holdout)}
    options = ReadOptions(path, text_key, on_bad)
    partitions = list_partitions(path)
    key = _fingerprint(partitions, options, tokenizer, holdout)
    base = Path(os.path.expanduser(cache_dir)) / f"{Path(path).name}-{key}"
    base.parent.mkdir(parents=True, exist_ok=True)
    splits = SPLITS if holdout else SPLITS[:1]
    with _locked(base.with_name(base.name + ".lock")):
        if not all(Path(f"{base}-{split}.json").is_file() and is_shard(f"{base}-{split}") for split in splits):
            _build(ShardTask(partitions, options, holdout, tokenizer, base), workers, on_progress)
    return {split: _open_built(Path(f"{base}-{split}"), path, split, holdout) for split in splits}


def is_validation_document(name: str, holdout: int) -> bool:
    """Return whether the split rule of this module holds out the document `name`."""
    return bool(holdout) and xxhash.xxh3_64_intdigest(name.encode()) % holdout == 0


def _fingerprint(partitions: list[Partition], options: ReadOptions, tokenizer: Tokenizer, holdout: int) -> str:
    # The order and structure of the digested values must not change: the names of existing caches contain this digest.
    parts = [VERSION, options.path, partitions, tokenizer.fingerprint, options.text_key, holdout, options.on_bad]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive file lock, so that only one process builds a dataset; the others wait and then use its shards."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(task: ShardTask, workers: int, on_progress: ProgressFn) -> None:
    """Build the shards of a whole dataset at `task.prefix`."""
    base = task.prefix
    for leftover in base.parent.glob(f"{base.name}-*.tmp-*"):  # left by a killed process: this process holds the lock
        leftover.unlink()
    parts_dir = base.with_name(base.name + ".parts")
    parts_dir.mkdir(exist_ok=True)
    groups = _group(task.partitions)
    tasks = [task._replace(partitions=group, prefix=parts_dir / f"{i:06d}") for i, group in enumerate(groups)]
    group_bytes = [sum(partition.n_bytes for partition in group) for group in groups]
    start, done = time.perf_counter(), 0
    with closing(_run(tasks, workers)) as waits:
        for n_bytes, wait in zip(group_bytes, waits, strict=True):
            wait()
            done += n_bytes
            on_progress(done, sum(group_bytes), time.perf_counter() - start)
    for split in SPLITS if task.holdout else SPLITS[:1]:
        _join(base, split, [part.prefix for part in tasks], task.tokenizer)
    shutil.rmtree(parts_dir)


def _group(partitions: list[Partition]) -> list[list[Partition]]:
    groups: list[list[Partition]] = [[]]
    n_bytes = 0
    for partition in partitions:
        if groups[-1] and n_bytes + partition.n_bytes > PART_BYTES:
            groups.append([])
            n_bytes = 0
        groups[-1].append(partition)
        n_bytes += partition.n_bytes
    return groups


def _run(tasks: list[ShardTask], workers: int) -> Generator[Callable[[], Any], None, None]:
    """Yield one callable per task, in order; calling it waits for the task."""
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            yield lambda task=task: _make_part(task)
        return
    context = multiprocessing.get_context("spawn")
    pool: Executor
    canceled = context.Event()
    with ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=end_with_parent, initargs=(canceled,)
    ) as pool:
        futures: list[Future[None]] = [pool.submit(_make_part, task) for task in tasks]
        try:
            for future in futures:
                yield future.result
        except BaseException:  # a stop request, or damaged data: the other results are not needed
            canceled.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent(canceled: Event | None = None) -> None:
    """Make this worker process exit when its parent process exits, even by kill -9, or sets `canceled`.

    Without this, a worker would continue to write parts.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        while parent.is_alive() and not (canceled or threading.Event()).wait(0.5):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_part(task: ShardTask) -> None:
    """Write both splits of one part. The statistics of the part are written last and mark the part as complete."""
    record = Path(f"{task.prefix}.json")
    if record.is_file() and all(is_shard(f"{task.prefix}-{split}") for split in SPLITS):
        return
    skipped = SkippedDocuments()
    dtype = token_dtype(task.tokenizer.n_vocab)
    counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
    with (
        ShardWriter(f"{task.prefix}-{TRAIN}", dtype) as train,
        ShardWriter(f"{task.prefix}-{VALIDATION}", dtype) as validation,
    ):
        for document in itertools.chain(_encode_texts(task, skipped), _split_records(task)):
            held_out = is_validation_document(document.name, task.holdout)
            (validation if held_out else train).add(document.tokens)
            count = counts[VALIDATION if held_out else TRAIN]
            added = (1, len(document.tokens), document.n_bytes, document.n_lost)
            for name, number in zip(COUNTS, added, strict=True):
                count[name] += number
    _write_json(record, {"counts": counts, "notes": skipped.summary_lines()})


def _encode_texts(task: ShardTask, skipped: SkippedDocuments) -> Iterator[EncodedDocument]:
    for texts, names in _batch_texts(task, skipped):
        for text, name, tokens in zip(texts, names, task.tokenizer.encode_batch(texts), strict=True):
            n_bytes, lost = len(text.encode("utf-8", "surrogatepass")), task.tokenizer.count_lost(text, tokens)
            yield EncodedDocument(name, np.append(tokens, task.tokenizer.end_of_text), n_bytes, lost)


def _batch_texts(task: ShardTask, skipped: SkippedDocuments) -> Iterator[tuple[list[str], list[str]]]:
    reader = find_reader(task.options.path)
    texts, names, characters = [], [], 0
    for partition in itertools.filterfalse(reader.holds_tokens, task.partitions):
        for document in reader.read_documents(partition, task.options, skipped):
            texts.append(document.text)
            names.append(document.name)
            characters += len(document.text)
            if characters > ENCODE_CHARACTERS:
                yield texts, names
                texts, names, characters = [], [], 0
    if texts:
        yield texts, names


def _split_records(task: ShardTask) -> Iterator[EncodedDocument]:
    """Yield the documents in TFRecords; each has the name of its record. Damage is an error also with on_bad="skip"."""
    reader = find_reader(task.options.path)
    partitions = list(filter(reader.holds_tokens, task.partitions))
    n_vocab, end_of_text = task.tokenizer.n_vocab, task.tokenizer.end_of_text
    lengths = np.array([len(task.tokenizer.decode_bytes([i])) for i in range(n_vocab if partitions else 0)])
    for record in itertools.chain.from_iterable(map(reader.read_tokens, partitions)):
        if len(record.tokens) and record.tokens.max() >= n_vocab:
            raise DataError(
                f"{record.location}: token id {record.tokens.max()}, but the tokenizer has {n_vocab:,} entries; set "
                "data.tokenizer to the tokenizer of these records (mesh-transformer-jax: GPT-2's)"
            )
        for document in split_documents(record.tokens, end_of_text):
            n_bytes = int(lengths[document[document != end_of_text]].sum())
            yield EncodedDocument(record.name, document, n_bytes, 0)


def _join(base: Path, split: str, parts: list[Path], tokenizer: Tokenizer) -> None:
    total: dict[str, Any] = {**dict.fromkeys(COUNTS, 0), "notes": [], "tokenizer": tokenizer.fingerprint}
    with ShardWriter(f"{base}-{split}", token_dtype(tokenizer.n_vocab)) as joined:
        for part in parts:
            shard = TokenShard(f"{part}-{split}")
            for index in range(shard.n_documents):
                joined.add(shard.document(index))
            record = json.loads(Path(f"{part}.json").read_text())
            for name, count in record["counts"][split].items():
                total[name] += count
            total["notes"] += record["notes"]
    _write_json(Path(f"{base}-{split}.json"), total)


def _open_built(prefix: Path, path: str, split: str, holdout: int) -> BuiltShards:
    record = json.loads(Path(f"{prefix}.json").read_text())
    notes = list(record["notes"])
    if not record["documents"]:
        details = f" ({'; '.join(notes)})" if notes else ""
        if split == VALIDATION:
            raise DataError(
                f"{path}: the validation split is empty, because data.holdout_one_in={holdout} selected no document; lower "
                f"data.holdout_one_in{details}"
            )
        fix = f", or raise data.holdout_one_in above {holdout}, or set it to 0" if holdout else ""
        raise DataError(f"{path}: the training split has no documents; add documents{fix}{details}")
    if lost := record.get("lost"):  # records of older versions have no such count
        notes.append(f"{lost:,} characters are unknown to the tokenizer and missing from the tokens")
    return BuiltShards(prefix, record["documents"], record["tokens"], record["bytes"], tuple(notes))


def _use_shard(prefix: Path, tokenizer: Tokenizer, holdout: int) -> BuiltShards:
    if holdout:
        raise DataError(
            f"{prefix}: a shard stores no document names, so it cannot be split; set data.holdout_one_in=0 and add a "
            "data.validation shard"
        )
    shard = TokenShard(prefix)
    n_bytes = 0
    for index in range(shard.n_documents):
        n_bytes += len(
            tokenizer.decode_bytes(token for token in shard.document(index) if token != tokenizer.end_of_text)
        )
        if index == 1000:  # the first 1001 documents are enough for the ratio of bytes to tokens
            n_bytes = n_bytes * shard.n_tokens // int(shard.ends[index])
            break
    return BuiltShards(prefix, shard.n_documents, shard.n_tokens, n_bytes, ())


def _write_json(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
