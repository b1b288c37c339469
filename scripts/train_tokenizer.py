# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level BPE vocabulary, as GPT-2 has, on documents of your own.

  python scripts/train_tokenizer.py python-stdlib tokenizers/python --vocab-size 8192
  python scripts/train_tokenizer.py books/ forum.jsonl.zst tokenizers/mine.json --vocab-size 32000 --skip-bad

SRC is a text file, a folder, JSON lines or Parquet, plain or as .zst or .gz, or "python-stdlib"; DST is a .json file or
a folder that gets a tokenizer.json. A run uses it by `data.tokenizer = "DST"`. Every 50th document, by a hash of its
name, is held out, and the bytes per token on these are printed. Word counts of all sources must fit in memory.
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
from mesh_transformer.data.readers import SkippedDocuments, find_files, find_root, read_file
from mesh_transformer.data.tokenizers import Tokenizer, load_tokenizer

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # all bytes and the end of text
HOLD_OUT = 50
HELD_OUT_BYTES = 10_000_000


class HeldOut:
    """Texts kept from training, up to a size, and the count of those trained on."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.size = 0
        self.trained = 0

    def keeps(self, name: str, text: str) -> bool:
        """Whether this document is held out; if so it is kept."""
        if zlib.crc32(name.encode()) % HOLD_OUT or self.size > HELD_OUT_BYTES:
            self.trained += 1
            return False
        self.texts.append(text)
        self.size += len(text.encode())
        return True


def main(argv: list[str]) -> int:
    """Train, write, measure; returns the exit status."""
    arguments = parse_arguments(argv)
    console = Console(stderr=True)
    bad, held_out = SkippedDocuments(), HeldOut()
    arguments.dst.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the training
    with make_progress(console) as progress:
        texts = read_texts(arguments, bad, held_out, progress)
        library = train_vocabulary(texts, arguments.vocab_size)
    for line in bad.summary_lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not held_out.trained:
        raise ValueError(f"no document to train on in {', '.join(arguments.src)}; the rest was held out or left out")
    write_atomically(arguments.dst, library.to_str(pretty=True))
    tokenizer = load_tokenizer(arguments.dst)
    print(f"{arguments.dst}: {tokenizer.n_vocab:,} tokens from {held_out.trained:,} documents")
    if tokenizer.n_vocab < arguments.vocab_size:
        print(f"fewer than the {arguments.vocab_size:,} asked for: the text repeats no further pairs of tokens")
    print(measure(tokenizer, held_out.texts))
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; wrong usage exits with status 2."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("src", nargs="+", metavar="SRC", help="documents to learn from")
    parser.add_argument("dst", type=Path, metavar="DST", help="tokenizer.json to write, or a folder for it")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help=f"tokens, at least {SMALLEST}")
    parser.add_argument("--text-key", default="text", help="key or column that holds the text (default: text)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count damaged documents, do not stop")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    arguments = parser.parse_args(argv)
    if arguments.vocab_size < SMALLEST:
        parser.error(f"--vocab-size {arguments.vocab_size} is less than {SMALLEST}, the 256 bytes and {END_OF_TEXT}")
    if arguments.dst.suffix != ".json":
        arguments.dst = arguments.dst / "tokenizer.json"
    if arguments.dst.exists() and not arguments.overwrite:
        parser.error(f"{arguments.dst} exists; give another DST or --overwrite")
    return arguments


def make_progress(console: Console) -> Progress:
    """A bar over files, with the number of documents."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def read_texts(
    arguments: argparse.Namespace, bad: SkippedDocuments, held_out: HeldOut, progress: Progress
) -> Iterator[str]:
    """Texts of all sources but the held-out ones; files are found before the first is read."""
    sources = [(find_root(src), file) for src in arguments.src for file in find_files(src)]
    on_bad = "skip" if arguments.skip_bad else "error"

    def generate() -> Iterator[str]:
        task = progress.add_task("reading files", total=len(sources))
        for root, file in sources:
            for document in read_file(file, root, text_key=arguments.text_key, on_bad=on_bad, skipped=bad):
                if not held_out.keeps(document.name, document.text):
                    yield document.text
            progress.advance(task)
        progress.update(task, description="merging pairs")

    return generate()


def train_vocabulary(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """GPT-2's scheme: words by ByteLevel's pattern, all 256 bytes, then the most frequent pairs."""
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
    """The whole file or none of it, also if the machine stops."""
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
    """Bytes per token on held-out texts."""
    if not texts:
        return "too few documents to hold any out: bytes per token not measured"
    size = sum(len(text.encode()) for text in texts)
    count = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return f"{size / max(count, 1):.3f} bytes per token on {len(texts):,} held-out documents of {size:,} bytes"


if __name__ == "__main__":
    sys.exit(run_command(main))
