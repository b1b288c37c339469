# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Make token shards (DST.bin and DST.idx, the format of Megatron-LM and GPT-NeoX) from text, once for many runs.

SRC are files or folders of text, JSONL, Parquet, each also as .gz or .zst, or python-stdlib, or the .tfrecords of
mesh-transformer-jax and GPT-Neo or an .index of them, whose tokens are taken as they are. Interrupted, the same command
goes on where it was. A run reads the result with [data.train.NAME] path = "DST".

examples:
  python scripts/make_shards.py python-stdlib shards/stdlib
      the standard library, byte by byte
  python scripts/make_shards.py corpus/*.jsonl.zst shards/corpus --tokenizer tokenizer.json --holdout 1000 --workers 8
      one document in 1000 goes to shards/corpus-heldout, the others to shards/corpus-train
  python scripts/make_shards.py data/pile.train.index shards/pile --tokenizer gpt2/tokenizer.json
      the original's TFRecords, without TensorFlow; the tokenizer only says which ids there are
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ConfigError
from mesh_transformer.data.shard_builder import BuiltShards, build_shards
from mesh_transformer.data.shards import ShardWriter, TokenShard, is_shard
from mesh_transformer.data.tokenizers import load_tokenizer
from mesh_transformer.train.session import data_progress


def main(arguments: list[str]) -> int:
    """Build every source, then join them under the wanted name."""
    options = parse(arguments)
    tokenizer = load_tokenizer(options.tokenizer)
    console, started = Console(stderr=True), time.perf_counter()
    built: dict[str, list[BuiltShards]] = {}
    with data_progress(console) as report:
        for source in options.source:
            sides = build_shards(
                source,
                tokenizer,
                options.cache_dir,
                text_key=options.text_key,
                holdout=options.holdout,
                on_bad="skip" if options.skip_bad else "error",
                workers=options.workers,
                on_progress=lambda done, total, seconds, source=source: report(source, done, total, seconds),
            )
            for side, part in sides.items():
                built.setdefault(side, []).append(part)
    for side, parts in built.items():
        prefix = f"{options.destination}-{side}" if options.holdout else options.destination
        _join(prefix, parts)
        n_bytes, n_tokens = sum(part.n_bytes for part in parts), sum(part.n_tokens for part in parts)
        n_documents = sum(part.n_documents for part in parts)
        print(f"{prefix}: {n_documents:,} documents, {n_tokens:,} tokens, {n_bytes:,} bytes of text")
        for note in dict.fromkeys(note for part in parts for note in part.notes):
            print(note)
    seconds = time.perf_counter() - started
    total = sum(part.n_bytes for parts in built.values() for part in parts)
    print(f"{seconds:.1f} s, {total / seconds / 1e6:.1f} MB/s")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("source", nargs="+", metavar="SRC", help="a file, a folder, or python-stdlib")
    parser.add_argument("destination", metavar="DST", help="where the shard goes, without .bin")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a tokenizer.json; default: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: %(default)s")
    parser.add_argument("--text-key", default="text", help="field of JSONL and Parquet; default: %(default)s")
    parser.add_argument("--holdout", type=int, default=0, help="hold out one document in this many; default: none")
    parser.add_argument("--skip-bad", action="store_true", help="count damaged documents instead of stopping")
    parser.add_argument("--cache-dir", default="~/.cache/mesh-transformer", help="of parts; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.holdout < 0:
        raise ConfigError("--workers is at least 1, --holdout at least 0")
    sides = ("-train", "-heldout") if options.holdout else ("",)
    if there := [side for side in sides if is_shard(options.destination + side)]:
        raise ConfigError(f"{options.destination}{there[0]}.bin exists; remove it, or choose another name")
    return options


def _join(prefix: str, parts: Sequence[BuiltShards]) -> None:
    shards = [TokenShard(part.prefix) for part in parts]
    with ShardWriter(Path(prefix), shards[0].tokens.dtype) as joined:
        for shard in shards:
            for index in range(shard.n_documents):
                joined.add(shard.document(index))


if __name__ == "__main__":
    sys.exit(run_command(main))
