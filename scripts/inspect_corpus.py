# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Look into a corpus that build_corpus.py made: random documents, what was dropped and why, nearest duplicates.

examples:
  python scripts/inspect_corpus.py corpora/machine --n 3 --component licences
      three documents for training, the same ones for the same --seed
  python scripts/inspect_corpus.py corpora/machine --dropped gopher
      what steps or reasons with this word in them took
  python scripts/inspect_corpus.py corpora/machine --near /usr/share/common-licenses/Apache-2.0
      documents that share a MinHash band with this one, also those that were removed, with their similarity
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import check_table
from mesh_transformer.corpus.parts import read_documents
from mesh_transformer.corpus.recipe import Recipe
from mesh_transformer.corpus.stage_dedup import BoundedSignature, minhash_config
from mesh_transformer.corpus.stages import CorpusError
from mesh_transformer.corpus.word_tokenizer import WORDS

Record = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Show what is asked for."""
    options = parse(arguments)
    if not (options.corpus / "manifest.json").is_file():
        raise CorpusError(f"{options.corpus}: no manifest.json: no corpus, or one that is not whole; build it again")
    if options.near:
        show_near(options)
        return 0
    if options.dropped is not None:
        records = sample(read_dropped(options), options)
    else:
        folder = options.corpus / "documents" / ("heldout" if options.heldout else "train")
        paths = sorted(folder.glob(f"{options.component or '*'}-*.jsonl.zst"))
        records = sample((record for path in paths for record in read_documents(path)), options)
    if not records:
        raise CorpusError("nothing there that fits; look at datasheet.html for components, steps and reasons")
    for record in records:
        show(record, options.characters)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="folder of a corpus")
    parser.add_argument("--n", type=int, default=5, help="how many documents; default: %(default)s")
    parser.add_argument("--component", default="", help="only of this one")
    parser.add_argument("--heldout", action="store_true", help="held-out documents")
    parser.add_argument("--dropped", metavar="WORD", nargs="?", const="", help="dropped ones, for this step or reason")
    parser.add_argument("--near", metavar="ID", default="", help="nearest duplicates of the document with this id")
    parser.add_argument("--seed", type=int, default=0, help="another choice; default: %(default)s")
    parser.add_argument("--characters", type=int, default=1000, help="shown of each; default: %(default)s")
    return parser.parse_args(arguments)


def sample(records: Iterator[Record], options: argparse.Namespace) -> list[Record]:
    """Evenly drawn, in one pass and bounded memory."""
    draw, kept = random.Random(options.seed), []
    for number, record in enumerate(records):
        if len(kept) < options.n:
            kept.append(record)
        elif (place := draw.randrange(number + 1)) < options.n:
            kept[place] = record
    return kept


def read_dropped(options: argparse.Namespace) -> Iterator[Record]:
    """Documents that steps, duplicates and lines took, whose step or reason has the word."""
    for path in sorted((options.corpus / "work").glob("*/dropped/*.jsonl.zst")):
        for record in read_documents(path):
            meta = record["meta"]
            fits = options.dropped in f"{meta['step']} {meta['reason']}"
            if fits and options.component in ("", meta["component"]):
                yield record


def show(record: Record, characters: int) -> None:
    """One document with what is known of it."""
    meta = ", ".join(f"{key} {value}" for key, value in record["meta"].items())
    print(f"--- {record['id']} ({meta})")
    text = record["text"]
    print(text[:characters] + (f"\n[... {len(text) - characters:,} more characters]" if len(text) > characters else ""))


def show_near(options: argparse.Namespace) -> None:
    """Candidates by equal bands, from the signatures of the build, then their true similarity."""
    table = json.loads((options.corpus / "manifest.json").read_text())["recipe"]
    recipe = check_table(Recipe, table, where=str(options.corpus / "manifest.json"))
    if recipe.duplicates.near == "none":
        raise CorpusError('this corpus has no signatures: its recipe says duplicates.near = "none"')
    work = options.corpus / "work"
    filtered, signed = (next(work.glob(f"{stage}-*")) for stage in ("filter", "sign"))
    parts = sorted((filtered / "documents").glob("*.jsonl.zst"))
    wanted = next((r for path in parts for r in read_documents(path) if r["id"] == options.near), None)
    if wanted is None:
        raise CorpusError(f"{options.near}: no such document after the steps; ids are shown by look.py without --near")
    language: Any = WORDS
    block = BoundedSignature(str(signed / "signatures"), minhash_config(recipe), language=language)
    shingles = block.get_shingles(wanted["text"])
    if not len(shingles):
        raise CorpusError(f"{options.near}: fewer than duplicates.n_gram words: only exact duplicates are found of it")
    signature = block.get_signature(shingles)
    found = [(similarity(block, shingles, r["text"]), r) for r in find_candidates(signed, parts, signature)]
    found.sort(key=lambda one: -one[0])
    for likeness, record in found[: options.n + 1]:
        print(f"{likeness:.3f}  {record['meta']['pile_set_name']}  {record['id']}")


def find_candidates(signed: Path, parts: list[Path], signature: list[list[int]]) -> Iterator[Record]:
    """Documents of all parts with a band of the signature, a part at a time."""
    for number, path in enumerate(parts):
        hits: set[int] = set()
        for band, hashes in enumerate(signature):
            record = np.dtype([("hashes", "<u8", len(hashes)), ("document", "<u4")])
            rows = np.fromfile(signed / f"signatures/bucket_{band:03d}/{number:05d}.minhash.sig", record)
            hits |= set(rows["document"][(rows["hashes"] == np.array(hashes, np.uint64)).all(axis=1)].tolist())
        if hits:
            yield from (one for place, one in enumerate(read_documents(path)) if place in hits)


def similarity(block: BoundedSignature, shingles: np.ndarray, text: str) -> float:
    """Jaccard similarity of two documents' n-grams."""
    other = block.get_shingles(text)
    return len(np.intersect1d(shingles, other)) / max(len(np.union1d(shingles, other)), 1)


if __name__ == "__main__":
    sys.exit(run_command(main))
