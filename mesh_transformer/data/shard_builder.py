# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Documents -> tokens -> shards in the cache: in parallel, resumable, and never reused for a source that has changed.

The split rule: with holdout = n > 0, a document is held out exactly if xxh3_64(its name in UTF-8) % n == 0. It depends
on the document's name alone, so adding files moves none from one side to the other.

A source's files are cut into parts of about 32 MB in order; each part becomes a small shard under a temporary name, and
a part that is there is not made again. The parts are joined in order, so the result is the same bytes for any number of
workers and interruptions. Its name carries a digest of everything it depends on: path, size and time of change of each
file, tokenizer, split and text key.

Records of TFRecords are tokens already: each is cut behind every end of text, and what is left at its end is a document
without one. The split rule goes by the record, file name:number.
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
from mesh_transformer.data.errors import SkippedDocuments, DataError
from mesh_transformer.data.readers import OnBad, find_files, find_root, is_tfrecords, read_file
from mesh_transformer.data.shards import ShardWriter, TokenShard, is_shard, token_dtype
from mesh_transformer.data.tfrecords import split_documents, read_sequences
from mesh_transformer.data.tokenizers import Tokenizer

VERSION = 1  # of what is in the cache; a change of it rebuilds everything
PART_BYTES = 32_000_000
ENCODE_CHARACTERS = 4_000_000  # text handed to the tokenizer in one call
SPLITS = ("train", "heldout")


class BuiltShards(NamedTuple):
    """One side of a source, on disk."""

    prefix: Path
    n_documents: int
    n_tokens: int
    n_bytes: int  # of text, without ends of text
    notes: tuple[str, ...]  # what was left out, and why


class ShardTask(NamedTuple):
    """What one worker turns into one part."""

    files: list[Path]
    root: Path
    text_key: str
    on_bad: OnBad
    holdout: int
    tokenizer: Tokenizer
    prefix: Path


Report = Callable[[int, int, float], None]  # bytes of source done, bytes in all, seconds since the start


def build_shards(
    path: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    text_key: str = "text",
    holdout: int = 0,
    on_bad: OnBad = "error",
    workers: int = 1,
    on_progress: Report = lambda done, total, seconds: None,
) -> dict[str, BuiltShards]:
    """The shards of a source by side ("train", and "heldout" if `holdout`), from the cache or made now.

    A path that is a shard's prefix is used as it is; its text is taken to have the bytes its tokens decode to.
    A URL is fetched first. Raises DataError for damaged documents (or counts them, see `on_bad`), for a side without
    documents, and for a store that cannot be reached.
    """
    if is_remote(path):
        start = time.perf_counter()
        path = download_dataset(path, cache_dir, lambda done, total: on_progress(done, total, time.perf_counter() - start))
    given = os.path.expanduser(path).removesuffix(".bin").removesuffix(".idx")
    if is_shard(given):
        return {"train": _use_shard(Path(given), tokenizer, holdout)}
    files = find_files(path)
    key = _fingerprint(path, files, tokenizer, text_key, holdout, on_bad)
    base = Path(os.path.expanduser(cache_dir)) / f"{Path(path).name}-{key}"
    base.parent.mkdir(parents=True, exist_ok=True)
    sides = SPLITS if holdout else SPLITS[:1]
    with _locked(base.with_name(base.name + ".lock")):
        if not all(Path(f"{base}-{side}.json").is_file() and is_shard(f"{base}-{side}") for side in sides):
            _build(
                base,
                path,
                files,
                ShardTask([], find_root(path), text_key, on_bad, holdout, tokenizer, base),
                workers,
                on_progress,
            )
    return {side: _open_built(Path(f"{base}-{side}"), path, side, holdout) for side in sides}


def is_validation_document(name: str, holdout: int) -> bool:
    """The split rule of this module."""
    return bool(holdout) and xxhash.xxh3_64_intdigest(name.encode()) % holdout == 0


def _fingerprint(path: str, files: list[Path], tokenizer: Tokenizer, text_key: str, holdout: int, on_bad: str) -> str:
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = [VERSION, path, stats, tokenizer.fingerprint, text_key, holdout, on_bad]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; the others wait and then find the result."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(base: Path, path: str, files: list[Path], work: ShardTask, workers: int, report: Report) -> None:
    for leftover in base.parent.glob(f"{base.name}-*.tmp-*"):  # of a builder that was killed; this one holds the lock
        leftover.unlink()
    parts_dir = base.with_name(base.name + ".parts")
    parts_dir.mkdir(exist_ok=True)
    groups = _group(files)
    jobs = [work._replace(files=group, prefix=parts_dir / f"{i:06d}") for i, group in enumerate(groups)]
    sizes = [sum(file.stat().st_size for file in group) for group in groups]
    start, done = time.perf_counter(), 0
    with closing(_run(jobs, workers)) as waits:
        for size, wait in zip(sizes, waits, strict=True):
            wait()
            done += size
            report(done, sum(sizes), time.perf_counter() - start)
    for side in SPLITS if work.holdout else SPLITS[:1]:
        _join(base, side, [job.prefix for job in jobs], work.tokenizer)
    shutil.rmtree(parts_dir)


def _group(files: list[Path]) -> list[list[Path]]:
    groups: list[list[Path]] = [[]]
    size = 0
    for file in files:
        if groups[-1] and size + file.stat().st_size > PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.stat().st_size
    return groups


def _run(jobs: list[ShardTask], workers: int) -> Generator[Callable[[], Any], None, None]:
    """Callables, in order, that wait for each job."""
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            yield lambda job=job: _make_part(job)
        return
    context = multiprocessing.get_context("spawn")
    pool: Executor
    over = context.Event()
    with ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=end_with_parent, initargs=(over,)
    ) as pool:
        futures: list[Future[None]] = [pool.submit(_make_part, job) for job in jobs]
        try:
            for future in futures:
                yield future.result
        except BaseException:  # nobody waits for the rest: a stop, or damage
            over.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent(over: Event | None = None) -> None:
    """Have this worker end when the builder does, even by kill -9, or says so; it would go on writing parts."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        while parent.is_alive() and not (over or threading.Event()).wait(0.5):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_part(work: ShardTask) -> None:
    """Both sides of one part; its statistics are written last and mark it as done."""
    record = Path(f"{work.prefix}.json")
    if record.is_file() and all(is_shard(f"{work.prefix}-{side}") for side in SPLITS):
        return
    bad = SkippedDocuments()
    dtype = token_dtype(work.tokenizer.n_vocab)
    counts = {side: {"documents": 0, "tokens": 0, "bytes": 0} for side in SPLITS}
    with ShardWriter(f"{work.prefix}-train", dtype) as train, ShardWriter(f"{work.prefix}-heldout", dtype) as heldout:
        for name, document, n_bytes in itertools.chain(_encode_texts(work, bad), _read_tokens(work)):
            side = "heldout" if is_validation_document(name, work.holdout) else "train"
            (heldout if side == "heldout" else train).add(document)
            count = counts[side]
            count["documents"] += 1
            count["tokens"] += len(document)
            count["bytes"] += n_bytes
    _write_json(record, {"counts": counts, "notes": bad.summary_lines()})


def _encode_texts(work: ShardTask, bad: SkippedDocuments) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, tokens with the end of text, and bytes of every text."""
    for texts, names in _read_chunks(work, bad):
        for text, name, tokens in zip(texts, names, work.tokenizer.encode_batch(texts), strict=True):
            yield name, np.append(tokens, work.tokenizer.end_of_text), len(text.encode("utf-8", "surrogatepass"))


def _read_tokens(work: ShardTask) -> Iterator[tuple[str, np.ndarray, int]]:
    """Record, tokens and bytes of every document in TFRecords; damage is always an error, whatever `on_bad`."""
    files = [file for file in work.files if is_tfrecords(file)]
    n_vocab, end_of_text = work.tokenizer.n_vocab, work.tokenizer.end_of_text
    lengths = np.array([len(work.tokenizer.decode_bytes([i])) for i in range(n_vocab if files else 0)])
    for file in files:
        for number, sequence in enumerate(read_sequences(file)):
            if len(sequence) and sequence.max() >= n_vocab:
                raise DataError(
                    f"{file}: record {number}: token id {sequence.max()}, but the tokenizer has {n_vocab:,} entries; name "
                    "the one these records were made with (mesh-transformer-jax: GPT-2's) in data.tokenizer"
                )
            for document in split_documents(sequence, end_of_text):
                yield f"{file.name}:{number}", document, int(lengths[document[document != end_of_text]].sum())


def _read_chunks(work: ShardTask, bad: SkippedDocuments) -> Iterator[tuple[list[str], list[str]]]:
    texts, names, size = [], [], 0
    for file in itertools.filterfalse(is_tfrecords, work.files):
        for document in read_file(file, work.root, text_key=work.text_key, on_bad=work.on_bad, skipped=bad):
            texts.append(document.text)
            names.append(document.name)
            size += len(document.text)
            if size > ENCODE_CHARACTERS:
                yield texts, names
                texts, names, size = [], [], 0
    if texts:
        yield texts, names


def _join(base: Path, side: str, parts: list[Path], tokenizer: Tokenizer) -> None:
    total: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0, "notes": [], "tokenizer": tokenizer.fingerprint}
    with ShardWriter(f"{base}-{side}", token_dtype(tokenizer.n_vocab)) as joined:
        for part in parts:
            shard = TokenShard(f"{part}-{side}")
            for index in range(shard.n_documents):
                joined.add(shard.document(index))
            record = json.loads(Path(f"{part}.json").read_text())
            for name, count in record["counts"][side].items():
                total[name] += count
            total["notes"] += record["notes"]
    _write_json(Path(f"{base}-{side}.json"), total)


def _open_built(prefix: Path, path: str, side: str, holdout: int) -> BuiltShards:
    record = json.loads(Path(f"{prefix}.json").read_text())
    if not record["documents"]:
        remedy = (
            f"no document's name fell to it; lower data.holdout_one_in={holdout}"
            if side == "heldout"
            else "nothing to read"
        )
        raise DataError(f"{path}: the {side} part is empty: {remedy}; {'; '.join(record['notes'])}")
    return BuiltShards(prefix, record["documents"], record["tokens"], record["bytes"], tuple(record["notes"]))


def _use_shard(prefix: Path, tokenizer: Tokenizer, holdout: int) -> BuiltShards:
    if holdout:
        raise DataError(
            f"{prefix}: documents of a shard have no names to split by; set data.holdout_one_in=0 and add a data.validation shard"
        )
    shard = TokenShard(prefix)
    n_bytes = 0
    for index in range(shard.n_documents):
        n_bytes += len(
            tokenizer.decode_bytes(token for token in shard.document(index) if token != tokenizer.end_of_text)
        )
        if index == 1000:  # a sample is enough for a ratio
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
