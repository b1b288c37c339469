# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Build token shards (DST.bin and DST.idx, the format of Megatron-LM and GPT-NeoX) from text, for use by many runs.

SRC are files or folders of text, JSONL or Parquet (text and JSONL also as .gz or .zst), or python-stdlib, or the
.tfrecords of mesh-transformer-jax and GPT-Neo, or an .index that lists them; their tokens are copied unchanged. If this
program is interrupted, run the same command again to resume. A run reads the result with [data.train.NAME] path = "DST".

examples:
  python scripts/make_shards.py python-stdlib shards/stdlib
      the Python standard library, as bytes
  python scripts/make_shards.py corpus/*.jsonl.zst shards/corpus --tokenizer tokenizer.json --holdout 1000 --workers 8
      one document in 1000 goes to shards/corpus-heldout, the others to shards/corpus-train
  python scripts/make_shards.py data/pile.train.index shards/pile --tokenizer gpt2/tokenizer.json
      existing TFRecords, without TensorFlow; the tokenizer is used only to check the ids
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ConfigError
from mesh_transformer.config.schema import CACHE_DIR
from mesh_transformer.data.shard_builder import SPLITS, BuiltShards, build_shards
from mesh_transformer.data.shards import ShardWriter, TokenShard, is_shard
from mesh_transformer.data.tokenizers import load_tokenizer
from mesh_transformer.train.session import data_progress


def main(arguments: list[str]) -> int:
    """Build the shards of every dataset, then join them at the destination."""
    options = parse(arguments)
    tokenizer = load_tokenizer(options.tokenizer)
    console, start = Console(stderr=True), time.perf_counter()
    if tokenizer.loss:
        print(f"{options.tokenizer}: {tokenizer.loss}")
    built: dict[str, list[BuiltShards]] = {}
    with data_progress(console) as on_progress:
        for source in options.source:
            splits = build_shards(
                source,
                tokenizer,
                options.cache_dir,
                text_key=options.text_key,
                holdout=options.holdout,
                on_bad="skip" if options.skip_bad else "error",
                workers=options.workers,
                on_progress=partial(on_progress, source),
            )
            for split, part in splits.items():
                built.setdefault(split, []).append(part)
    for split, parts in built.items():
        prefix = f"{options.destination}-{split}" if options.holdout else options.destination
        _join(prefix, parts)
        n_documents = sum(part.n_documents for part in parts)
        n_tokens = sum(part.n_tokens for part in parts)
        n_bytes = sum(part.n_bytes for part in parts)
        print(f"{prefix}: {n_documents:,} documents, {n_tokens:,} tokens, {n_bytes:,} bytes of text")
        for note in dict.fromkeys(note for part in parts for note in part.notes):
            print(note)
    seconds = time.perf_counter() - start
    total = sum(part.n_bytes for parts in built.values() for part in parts)
    print(f"{seconds:.1f} s, {total / seconds / 1e6:.1f} MB/s")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("source", nargs="+", metavar="SRC", help="a file, a folder, or python-stdlib")
    parser.add_argument("destination", metavar="DST", help="path of the shard, without .bin")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a tokenizer.json; default: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes; default: %(default)s")
    parser.add_argument("--text-key", default="text", help="field of JSONL and Parquet; default: %(default)s")
    parser.add_argument("--holdout", type=int, default=0, metavar="N", help="hold out one document in N; default: none")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count damaged documents instead of stopping")
    parser.add_argument("--cache-dir", default=CACHE_DIR, help="folder for intermediate shards; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: must be at least 1")
    if options.holdout < 0:
        raise ConfigError(f"--holdout {options.holdout}: must be at least 0 (0: hold out no documents)")
    suffixes = [f"-{split}" for split in SPLITS] if options.holdout else [""]
    if existing := [suffix for suffix in suffixes if is_shard(options.destination + suffix)]:
        raise ConfigError(f"{options.destination}{existing[0]}.bin exists; remove it, or choose another DST")
    return options


def _join(prefix: str, parts: Sequence[BuiltShards]) -> None:
    shards = [TokenShard(part.prefix) for part in parts]
    with ShardWriter(Path(prefix), shards[0].tokens.dtype) as joined:
        for shard in shards:
            for index in range(shard.n_documents):
                joined.add(shard.document(index))


if __name__ == "__main__":
    sys.exit(run_command(main))
