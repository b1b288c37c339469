# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level BPE vocabulary, like GPT-2's, on your own documents.

SRC is a text file, a folder, JSON lines or Parquet (text and JSON lines also as .zst or .gz), or "python-stdlib". DST
is a .json file, or a folder in which tokenizer.json is written. A run uses it with `data.tokenizer = "DST"`. About one
document in 50, selected by a hash of its name, is held out, and the bytes per token on the held-out documents are printed. The word
counts of all documents must fit in memory.

examples:
  python scripts/train_tokenizer.py python-stdlib tokenizers/python --vocab-size 8192
      a vocabulary of 8192 tokens from the standard library's source
  python scripts/train_tokenizer.py books/ forum.jsonl.zst tokenizers/mine.json --vocab-size 32000 --skip-bad
      from a folder and a compressed JSON-lines file; damaged documents are skipped and counted
"""

import argparse
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.data.errors import SkippedDocuments
from mesh_transformer.data.readers import find_files, find_root, read_file
from mesh_transformer.data.tokenizers import Tokenizer, load_tokenizer

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # all bytes and the end of text
HOLDOUT_ONE_IN = 50  # about one document in this many is held out
HELD_OUT_BYTES = 10_000_000  # further documents are trained on


class HeldOut:
    """Held-out texts, up to a total size, and the number of documents trained on."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.size = 0
        self.n_trained = 0

    def add(self, name: str, text: str) -> bool:
        """Store the text if the document is held out, and return whether it is."""
        if zlib.crc32(name.encode()) % HOLDOUT_ONE_IN or self.size > HELD_OUT_BYTES:
            self.n_trained += 1
            return False
        self.texts.append(text)
        self.size += len(text.encode())
        return True


def main(argv: list[str]) -> int:
    """Train and write the vocabulary, and print its bytes per token."""
    arguments = parse_arguments(argv)
    console = Console(stderr=True)
    skipped, held_out = SkippedDocuments(), HeldOut()
    arguments.dst.parent.mkdir(parents=True, exist_ok=True)  # fail before training if this is impossible
    with make_progress(console) as progress:
        texts = read_texts(arguments, skipped, held_out, progress)
        library = train_vocabulary(texts, arguments.vocab_size)
    for line in skipped.summary_lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not held_out.n_trained:
        raise ValueError(
            f"{', '.join(arguments.src)}: no document to train on: {len(held_out.texts)} documents are held out, "
            f"{skipped.total} are skipped; add documents"
        )
    write_atomically(arguments.dst, library.to_str(pretty=True))
    tokenizer = load_tokenizer(arguments.dst)
    print(f"{arguments.dst}: {tokenizer.n_vocab:,} tokens from {held_out.n_trained:,} documents")
    if tokenizer.n_vocab < arguments.vocab_size:
        print(f"fewer than --vocab-size {arguments.vocab_size:,}: no other pair of tokens repeats in the text")
    print(measure(tokenizer, held_out.texts))
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; wrong usage exits with status 2."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("src", nargs="+", metavar="SRC", help="documents to train on")
    parser.add_argument("dst", type=Path, metavar="DST", help="tokenizer.json to write, or a folder for it")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help=f"number of tokens, at least {MIN_VOCAB_SIZE}"
    )
    parser.add_argument("--text-key", default="text", help="key or column that holds the text (default: text)")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count damaged documents instead of stopping")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    arguments = parser.parse_args(argv)
    if arguments.vocab_size < MIN_VOCAB_SIZE:
        parser.error(f"--vocab-size {arguments.vocab_size} is less than {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT})")
    if arguments.dst.suffix != ".json":
        arguments.dst = arguments.dst / "tokenizer.json"
    if arguments.dst.exists() and not arguments.overwrite:
        parser.error(f"{arguments.dst} exists; choose another DST, or pass --overwrite")
    return arguments


def make_progress(console: Console) -> Progress:
    """Return a progress bar over files."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def read_texts(
    arguments: argparse.Namespace, skipped: SkippedDocuments, held_out: HeldOut, progress: Progress
) -> Iterator[str]:
    """Return an iterator of all texts except the held-out ones; all files are found before the first is read."""
    files = [(find_root(src), file) for src in arguments.src for file in find_files(src)]
    on_bad = "skip" if arguments.skip_bad else "error"

    def generate() -> Iterator[str]:
        task = progress.add_task("reading files", total=len(files))
        for root, file in files:
            for document in read_file(file, root, text_key=arguments.text_key, on_bad=on_bad, skipped=skipped):
                if not held_out.add(document.name, document.text):
                    yield document.text
            progress.advance(task)
        progress.update(task, description="merging pairs")

    return generate()


def train_vocabulary(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a GPT-2 style BPE: words by ByteLevel's pattern, all 256 bytes, then merges of the most frequent pairs."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer=trainer)
    return library


def write_atomically(path: Path, text: str) -> None:
    """Write a file completely or not at all, even if the machine crashes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def measure(tokenizer: Tokenizer, texts: list[str]) -> str:
    """Return a line with the bytes per token on held-out texts."""
    if not texts:
        return "too few documents to hold any out; bytes per token were not measured"
    size = sum(len(text.encode()) for text in texts)
    count = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return f"{size / max(count, 1):.3f} bytes per token on {len(texts):,} held-out documents of {size:,} bytes"


if __name__ == "__main__":
    sys.exit(run_command(main))
